"""The training loop that all example scripts share."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hfgen.counters import counter_seed
from hfgen.images import save_png
from hfgen.training.batches import Draws, make_loader, make_sampler
from hfgen.training.checkpoints import load_checkpoint, save_checkpoint, write_folder
from hfgen.training.config import TrainingConfig
from hfgen.training.ema import EMA
from hfgen.training.guard import NonFiniteGuard
from hfgen.training.history import History, Window
from hfgen.training.optimizers import make_optimizers, set_hyperparameters
from hfgen.training.precision import (
    autocast_forward,
    compile_blocks,
    enable_gradient_checkpointing,
    resolve_mixed_precision,
)
from hfgen.training.publishing import make_publisher, write_result
from hfgen.training.run_folder import FINAL_FOLDER, VALIDATION_FOLDER, check_run_folder, open_run
from hfgen.training.sharding import make_placement
from hfgen.training.streams import StreamSampler
from hfgen.training.task import Task
from hfgen.training.throughput import Throughput, known_peak_tflops
from hfgen.training.trackers import TRACKERS_FOLDER, flat_values, log_images, tracker_names

logger = logging.getLogger(__name__)


class Trainer:
    """One loop over optimizer steps.

    Create it before the models: it seeds torch's global generators from ``config.seed``, so that the initial weights
    are the same in every process and every start.

    Every draw and every hyper-parameter is a function of counters (seed, epoch, index, step, block). A checkpoint thus
    needs no generator or loader state, and a run that stops and resumes equals one that did not stop, bit by bit on
    one process.

    Raises:
        ValueError: settings that do not fit, or an ``output_dir`` that holds something else than a run.
    """

    def __init__(self, config: TrainingConfig) -> None:
        trackers = tracker_names(config.report_to)
        self.config = config
        # Autocast and loss scaling are the trainer's: accelerate's scaler is made for a single optimizer.
        # Buffers are not broadcast: modules reduce their own statistics, and a discriminator called twice before the
        # backward pass would find its buffers overwritten.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(
            mixed_precision="no",
            log_with=trackers or None,
            project_dir=os.path.join(config.output_dir, TRACKERS_FOLDER),
            kwargs_handlers=[ddp],
        )
        self.device = self.accelerator.device
        self.mixed_precision = resolve_mixed_precision(config.mixed_precision, self.device)
        self.placement = make_placement(config, self.accelerator, self.mixed_precision)
        self.output_dir = Path(config.output_dir)
        if self.accelerator.is_main_process:
            check_run_folder(self.output_dir)  # before a script writes tokens or pairs into it
        self.publisher = make_publisher(config, self.accelerator)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mixed_precision == "fp16")
        torch.manual_seed(counter_seed(config.seed))

    def fit(self, task: Task, dataset: Dataset) -> bool:
        """Train until ``max_train_steps``, validate and save the result into ``output_dir/final``.

        Args:
            task: the method.
            dataset: map-style, ``dataset[(epoch, index)]`` is a dict; or a stream, :class:`TarImages`.

        Returns:
            True when finished; False when SIGTERM came first and the run stopped after writing a checkpoint.
        """
        self._prepare(task, dataset)
        previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            finished = self._loop()
        finally:
            signal.signal(signal.SIGTERM, previous_handler)
        modules = self._inference_modules() if finished else {}
        if finished and self.accelerator.is_main_process:
            self.history.plot()
            result = task.pipeline(modules)
            dtype = getattr(torch, self.config.final_dtype)
            if result.dtype != dtype:
                result.to(dtype)
            write = partial(write_result, result=result, task=task, config=self.config, accelerator=self.accelerator)
            write_folder(self.output_dir / FINAL_FOLDER, write)
            logger.info("Saved %s; load it with from_pretrained.", self.output_dir / FINAL_FOLDER)
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # end_training would close the process group too
            tracker.finish()
        if self.publisher is not None:
            self.publisher.finish(self.output_dir / FINAL_FOLDER if finished else None)
        return finished

    # ------------------------------------------------------------------------------------------------ preparation

    def _prepare(self, task: Task, dataset: Dataset) -> None:
        config, accelerator = self.config, self.accelerator
        # First of all, because it rejects data that is too small before an old run is touched.
        sampler = make_sampler(dataset, config, rank=accelerator.process_index, world_size=accelerator.num_processes)
        self.task = task
        for module in task.frozen:
            module.to(self.device).eval().requires_grad_(False)
        self.models = dict(task.modules)
        self._train_mode()
        # Before the forward methods are wrapped: the copy of a wrapped method would run the original's weights.
        self.averages = (
            {name: EMA(self.models[name], config.ema_decay, warmup=config.ema_warmup) for name in task.averaged}
            if config.ema_decay > 0
            else {}
        )
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(self.models, task.averaged)
        if config.compile:
            compile_blocks(self.models, task.averaged)
        for module in self._components().values():
            self.placement.place(module)
        self.optimizers = make_optimizers(task.phases, self.models, config, self.device)
        for phase, optimizer in self.optimizers.items():
            self.placement.attach(optimizer, [self.models[name] for name in task.phases[phase].modules])

        self.step = self.skipped_steps = self.skipped_images = 0
        self.window = Window()
        self.throughput = Throughput(
            self.device,
            images_per_step=config.batch_size * config.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
            peak_tflops=config.peak_tflops or known_peak_tflops(self.device, self.mixed_precision),
        )
        self.guard = NonFiniteGuard(
            self.output_dir,
            sampler,
            limit=config.max_skipped_steps,
            is_main_process=accelerator.is_main_process,
        )
        self.stop_requested = False
        with accelerator.main_process_first():
            checkpoint = open_run(config) if accelerator.is_main_process else None
        if config.resume is not None and accelerator.num_processes > 1:
            found = [str(checkpoint) if checkpoint else ""]
            torch.distributed.broadcast_object_list(found)
            checkpoint = Path(found[0]) if found[0] else None
        if checkpoint is not None:
            self._restore(checkpoint)
        if accelerator.is_main_process:
            self.history = History(self.output_dir, resumed_step=self.step)

        for name, module in self.models.items():
            autocast_forward(module, self.device, self.mixed_precision)
            task.modules[name] = self.placement.wrap(module)
        sampler.start_step = self.step
        if isinstance(sampler, StreamSampler) and accelerator.is_main_process:
            sampler.check_record(self.output_dir)
        self.loader = make_loader(
            dataset, sampler, num_workers=config.num_workers, pin_memory=self.device.type == "cuda"
        )
        accelerator.init_trackers("hfgen", config=flat_values(dataclasses.asdict(config)))
        logger.info(
            "%s; steps %d to %d on %d process(es), %s.",
            sampler.describe(), self.step, config.max_train_steps, accelerator.num_processes, self.device,
        )  # fmt: skip

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self._components(), load=self.placement.load_weights)
        for name, optimizer in self.optimizers.items():
            self.placement.load_optimizer_state(optimizer, state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.window.load_state_dict(state["window"], self.device)
        self.throughput.load_state_dict(state["throughput"])
        self.step = state["step"]
        self.skipped_steps, self.skipped_images = state["skipped_steps"], state["skipped_images"]
        logger.info("Resumed %s.", checkpoint)

    # ------------------------------------------------------------------------------------------------------- loop

    def _loop(self) -> bool:
        config = self.config
        batches = iter(self.loader)
        progress = tqdm(
            initial=self.step,
            total=config.max_train_steps,
            disable=not (config.progress and self.accelerator.is_main_process),
            dynamic_ncols=True,
        )
        self.throughput.restart()
        with progress:
            while self.step < config.max_train_steps:
                self._train_one_step(batches)
                self.step += 1
                progress.update()
                last = self.step == config.max_train_steps
                if self.step % config.logging_steps == 0 or last:
                    progress.set_postfix_str(self._log())
                if _due(self.step, config.validation_steps) or last:
                    self._validate()
                stopping = not last and self._should_stop()
                if _due(self.step, config.checkpointing_steps) or last or stopping:
                    self._save()
                if stopping:
                    logger.info("SIGTERM: stopped after step %d; continue with --resume latest.", self.step)
                    return False
        return True

    def _train_one_step(self, batches: Any) -> None:
        """All micro-steps of one optimizer step, then the update of every phase that had a loss."""
        accumulation = self.config.gradient_accumulation_steps
        for name, optimizer in self.optimizers.items():
            set_hyperparameters(optimizer, self.task.phases[name], self.config, self.step)
        losses: dict[str, Tensor] = {}
        blocks: dict[str, list[dict[str, Tensor | float]]] = {}
        for micro_step in range(accumulation):
            with self.throughput.waiting():
                batch = self._to_device(next(batches))
            block = micro_step * self.accelerator.num_processes + self.accelerator.process_index
            draws = Draws(self.config.seed, self.step, block, self.device)
            draws.seed_global()
            with ExitStack() as stack:
                if micro_step < accumulation - 1:
                    for module in self.task.modules.values():
                        stack.enter_context(self.placement.no_sync(module))
                stack.enter_context(self.throughput.working())
                for phase, loss, values in self.task.training_step(batch, draws):
                    self.placement.backward(self.optimizers[phase], self.scaler.scale(loss / accumulation))
                    loss = loss.detach()
                    losses[phase] = losses.get(phase, 0.0) + loss / accumulation
                    values = {name: torch.as_tensor(value).detach() for name, value in values.items()}
                    self.window.add({f"{phase}/{name}": value for name, value in values.items()})
                    blocks.setdefault(phase, []).append({**values, "loss": loss})
                    if micro_step == 0:
                        self._check_gradients(losses)
        for phase, loss in losses.items():
            self._update(phase, loss, blocks[phase], batch)
        self.throughput.end_step(list(losses))
        if self.scaler.is_enabled():
            self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for name, average in self.averages.items():
            average.update(self.models[name], self.step)

    def _update(self, phase: str, loss: Tensor, blocks: Sequence[Mapping[str, Tensor]], fields: Iterable[str]) -> None:
        """Clip and apply the gradients of one phase, unless the loss or a gradient is not finite."""
        loss = self.accelerator.reduce(loss, reduction="mean")
        max_norm = self.config.max_grad_norm or float("inf")
        norm, loss_is_finite, norm_is_finite = self.placement.step(self.optimizers[phase], loss, max_norm, self.scaler)
        if loss_is_finite and norm_is_finite:
            self.window.add({f"{phase}/loss": loss, f"{phase}/grad_norm": norm})
            self.guard.passed(phase)
            return
        # With fp16 some of these are expected: the scaler finds its scale by overflowing gradients.
        self.skipped_steps += 1
        what = "gradient norm" if loss_is_finite else "loss"
        self.guard.skipped(phase, self.step, what, grad_norm=float(norm), blocks=blocks, fields=fields)

    def _check_gradients(self, phases_so_far: Mapping[str, Tensor]) -> None:
        """A loss must reach only the modules of its own phase; see ``hfgen.training.frozen``."""
        for phase, parts in self.task.phases.items():
            if phase not in phases_so_far and any(
                parameter.grad is not None for name in parts.modules for parameter in self.models[name].parameters()
            ):
                raise RuntimeError(
                    f"The loss of phase {list(phases_so_far)[-1]!r} left gradients on the parameters of phase "
                    f"{phase!r}; call that module inside `with frozen(module)`."
                )

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.skipped_images += sum(len(names) for names in batch.pop("skipped", ()))
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    # ----------------------------------------------------------------------------------------------------- output

    def _components(self) -> dict[str, nn.Module]:
        return {**self.models, **{f"ema_{name}": average.module for name, average in self.averages.items()}}

    def _inference_modules(self) -> dict[str, nn.Module]:
        """What is validated and saved, whole and in evaluation mode; empty on processes other than the main one."""
        averaged = {name: average.module for name, average in self.averages.items()}
        averaged = averaged or {name: self.models[name] for name in self.task.averaged}
        whole = {name: self.placement.whole(module) for name, module in averaged.items()}
        if not self.accelerator.is_main_process:
            return {}
        return {name: module.to(self.device).eval() for name, module in whole.items()}

    def _train_mode(self) -> None:
        for module in self.models.values():
            module.train()
        for module in self.task.frozen:  # which may be a part of one of them
            module.eval()

    def _log(self) -> str:
        """Write a line of the log; returns a short text for the progress bar."""
        self.window.reduce(self.accelerator)
        values = self.window.means()
        for name, optimizer in self.optimizers.items():
            values[f"{name}/learning_rate"] = float(optimizer.param_groups[0]["lr"])
        record = {
            "step": self.step,
            **values,
            **self.throughput.record(),
            "skipped_steps": self.skipped_steps,
            "skipped_images": self.skipped_images,
        }
        self._write_record(record)
        self.throughput.restart()
        return ", ".join(f"{name} {values[name]:.4g}" for name in values if name.endswith("/loss"))

    def _write_record(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.history.append(record)
        self.accelerator.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def _validate(self) -> None:
        modules = self._inference_modules()
        if self.accelerator.is_main_process:
            # Sampling has many shapes, each of which a compiled block would compile again.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                result = self.task.validate(modules, self.step)
            log_images(self.accelerator, result.images, self.step)
            for name, image in result.images.items():
                save_png(image, self.output_dir / VALIDATION_FOLDER / f"step-{self.step:07d}_{name}.png")
            metrics = {f"validation/{name}": float(value) for name, value in result.metrics.items()}
            if metrics:
                self._write_record({"step": self.step, **metrics})
            self.history.plot()
        self._train_mode()
        self.accelerator.wait_for_everyone()
        self.throughput.restart()

    def _save(self) -> None:
        self.window.reduce(self.accelerator)
        placement = self.placement
        components = {name: placement.whole(module) for name, module in self._components().items()}
        optimizers = {name: placement.optimizer_state(optimizer) for name, optimizer in self.optimizers.items()}
        if self.accelerator.is_main_process:
            state = {
                "optimizers": optimizers,
                "scaler": self.scaler.state_dict(),
                "window": self.window.state_dict(),
                "throughput": self.throughput.state_dict(),
                "skipped_steps": self.skipped_steps,
                "skipped_images": self.skipped_images,
            }
            limit = self.config.checkpoints_total_limit
            checkpoint = save_checkpoint(self.output_dir, self.step, components, state, total_limit=limit)
            if self.publisher is not None:
                self.publisher.push_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()
        self.throughput.restart()

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        self.stop_requested = True

    def _should_stop(self) -> bool:
        """Whether any process was told to stop: all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        flag = torch.tensor(float(self.stop_requested), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
