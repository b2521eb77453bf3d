"""The training loop that all example scripts share."""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hfgen.counters import counter_seed
from hfgen.images import save_png
from hfgen.training import schedules
from hfgen.training.batches import BlockSampler, Draws, make_loader
from hfgen.training.checkpoints import load_checkpoint, save_checkpoint, write_folder
from hfgen.training.config import TrainingConfig
from hfgen.training.ema import EMA
from hfgen.training.history import History, Window
from hfgen.training.param_groups import parameter_groups
from hfgen.training.precision import autocast_forward, resolve_mixed_precision
from hfgen.training.run_folder import FINAL_FOLDER, VALIDATION_FOLDER, open_run
from hfgen.training.task import Task

logger = logging.getLogger(__name__)


class Trainer:
    """One loop over optimizer steps.

    Create it before the models: it seeds torch's global generators from ``config.seed``, so that the initial weights
    are the same in every process and every start.

    Every draw and every hyper-parameter is a function of counters (seed, epoch, index, step, block). A checkpoint thus
    needs no generator or loader state, and a run that stops and resumes equals one that did not stop, bit by bit on
    one process.
    """

    def __init__(self, config: TrainingConfig) -> None:
        if config.report_to is not None:
            available = sorted(str(getattr(name, "value", name)) for name in get_available_trackers())
            if config.report_to not in available:
                raise ValueError(
                    f"--report_to {config.report_to}: not installed or unknown to accelerate; available: "
                    f"{', '.join(available) or 'none'}. The run always writes log.jsonl."
                )
        self.config = config
        # Autocast and loss scaling are the trainer's: accelerate's scaler is made for a single optimizer.
        # Buffers are not broadcast: modules reduce their own statistics, and a discriminator called twice before the
        # backward pass would find its buffers overwritten.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(mixed_precision="no", log_with=config.report_to, kwargs_handlers=[ddp])
        self.device = self.accelerator.device
        self.mixed_precision = resolve_mixed_precision(config.mixed_precision, self.device)
        self.output_dir = Path(config.output_dir)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mixed_precision == "fp16")
        torch.manual_seed(counter_seed(config.seed))

    def fit(self, task: Task, dataset: Dataset) -> bool:
        """Train until ``max_train_steps``, validate and save the result into ``output_dir/final``.

        Args:
            task: the method.
            dataset: map-style; ``dataset[(epoch, index)]`` is a dict.

        Returns:
            True when finished; False when SIGTERM came first and the run stopped after writing a checkpoint.
        """
        self._prepare(task, dataset)
        previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            finished = self._loop()
        finally:
            signal.signal(signal.SIGTERM, previous_handler)
        if finished and self.accelerator.is_main_process:
            self.history.plot()
            result = task.pipeline(self._inference_modules()).to(getattr(torch, self.config.final_dtype))
            write_folder(self.output_dir / FINAL_FOLDER, result.save_pretrained)
            logger.info("Saved %s; load it with from_pretrained.", self.output_dir / FINAL_FOLDER)
        self.accelerator.wait_for_everyone()
        if self.config.report_to is not None:
            self.accelerator.end_training()
        return finished

    # ------------------------------------------------------------------------------------------------ preparation

    def _prepare(self, task: Task, dataset: Dataset) -> None:
        config, accelerator = self.config, self.accelerator
        # First of all, because it rejects data that is too small before an old run is touched.
        sampler = BlockSampler(
            len(dataset),
            config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            seed=config.seed,
        )
        self.task = task
        for module in task.frozen:
            module.to(self.device).eval().requires_grad_(False)
        self.models = {name: module.to(self.device).train() for name, module in task.modules.items()}
        # Before the forward methods are wrapped: the copy of a wrapped method would run the original's weights.
        self.averages = (
            {name: EMA(self.models[name], config.ema_decay, warmup=config.ema_warmup) for name in task.averaged}
            if config.ema_decay > 0
            else {}
        )
        self.optimizers = {name: self._make_optimizer(name) for name in task.phases}

        self.step = self.skipped_steps = self.skipped_images = 0
        self.window = Window()
        self.consecutive_skips: dict[str, int] = {}
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
            task.modules[name] = accelerator.prepare_model(module)
        sampler.start_step = self.step
        self.loader = make_loader(
            dataset, sampler, num_workers=config.num_workers, pin_memory=self.device.type == "cuda"
        )
        if config.report_to is not None:
            accelerator.init_trackers("hfgen", config=_flat(dataclasses.asdict(config)))
        logger.info(
            "%d items, global batch %d, %d steps per epoch; steps %d to %d on %d process(es), %s.",
            len(dataset), sampler.global_batch, sampler.steps_per_epoch, self.step, config.max_train_steps,
            accelerator.num_processes, self.device,
        )  # fmt: skip

    def _make_optimizer(self, name: str) -> torch.optim.Optimizer:
        phase, config = self.task.phases[name], self.config
        groups = parameter_groups([self.models[module] for module in phase.modules], phase.no_decay)
        if not groups:
            raise ValueError(f"Phase {name!r} has no trainable parameters in {', '.join(phase.modules)}.")
        return torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=self.device.type == "cuda",
        )

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self._components())
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.window.load_state_dict(state["window"], self.device)
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
        self._restart_clock()
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
        self._set_hyperparameters()
        losses: dict[str, Tensor] = {}
        for micro_step in range(accumulation):
            started = time.perf_counter()
            batch = self._to_device(next(batches))
            self.data_seconds += time.perf_counter() - started
            block = micro_step * self.accelerator.num_processes + self.accelerator.process_index
            draws = Draws(self.config.seed, self.step, block, self.device)
            draws.seed_global()
            with ExitStack() as stack:
                if micro_step < accumulation - 1:
                    for module in self.task.modules.values():
                        stack.enter_context(self.accelerator.no_sync(module))
                for phase, loss, values in self.task.training_step(batch, draws):
                    self.scaler.scale(loss / accumulation).backward()
                    losses[phase] = losses.get(phase, 0.0) + loss.detach() / accumulation
                    self.window.add({f"{phase}/{name}": value for name, value in values.items()})
                    if micro_step == 0:
                        self._check_gradients(losses)
        for phase, loss in losses.items():
            self._update(phase, loss)
        if self.scaler.is_enabled():
            self.scaler.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        for name, average in self.averages.items():
            average.update(self.models[name], self.step)

    def _update(self, phase: str, loss: Tensor) -> None:
        """Clip and apply the gradients of one phase, unless the loss or a gradient is not finite."""
        optimizer = self.optimizers[phase]
        self.scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or float("inf"))
        loss = self.accelerator.reduce(loss, reduction="mean")
        loss_is_finite, norm_is_finite = torch.isfinite(torch.stack([loss, norm])).tolist()
        if loss_is_finite and norm_is_finite:
            self.window.add({f"{phase}/loss": loss, f"{phase}/grad_norm": norm})
            self.scaler.step(optimizer)
            self.consecutive_skips[phase] = 0
            return
        # With fp16 some of these are expected: the scaler finds its scale by overflowing gradients.
        self.skipped_steps += 1
        self.consecutive_skips[phase] = self.consecutive_skips.get(phase, 0) + 1
        what = "loss" if not loss_is_finite else "gradient norm"
        logger.warning("Step %d: the %s of phase %r is not finite; no update.", self.step + 1, what, phase)
        if self.consecutive_skips[phase] >= self.config.max_skipped_steps:
            raise FloatingPointError(
                f"Step {self.step + 1}: the {what} of phase {phase!r} was not finite {self.consecutive_skips[phase]} "
                "times in a row. Resume an earlier checkpoint with a lower --learning_rate or --mixed_precision bf16."
            )

    def _check_gradients(self, phases_so_far: Mapping[str, Tensor]) -> None:
        """A loss must reach only the modules of its own phase; see ``hfgen.training.frozen``."""
        for phase, optimizer in self.optimizers.items():
            if phase not in phases_so_far and any(
                parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]
            ):
                raise RuntimeError(
                    f"The loss of phase {list(phases_so_far)[-1]!r} left gradients on the parameters of phase "
                    f"{phase!r}; call that module inside `with frozen(module)`."
                )

    def _set_hyperparameters(self) -> None:
        config = self.config
        for name, optimizer in self.optimizers.items():
            phase = self.task.phases[name]
            rate = schedules.learning_rate(
                self.step,
                schedule=config.lr_schedule,
                peak=config.learning_rate if phase.learning_rate is None else phase.learning_rate,
                max_steps=config.max_train_steps,
                warmup_steps=config.warmup_steps,
                warmup_start=config.lr_warmup_start,
                final=config.lr_final,
            )
            decay = schedules.weight_decay(
                self.step,
                start=config.weight_decay if phase.weight_decay is None else phase.weight_decay,
                end=config.weight_decay_end,
                max_steps=config.max_train_steps,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
                group["weight_decay"] = decay if group["decay"] else 0.0

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
        if self.averages:
            return {name: average.module for name, average in self.averages.items()}
        return {name: self.models[name].eval() for name in self.task.averaged}

    def _log(self) -> str:
        """Write a line of the log; returns a short text for the progress bar."""
        self.window.reduce(self.accelerator)
        values = self.window.means()
        seconds = max(time.perf_counter() - self.clock, 1e-9)
        images = (
            (self.step - self.clock_step)
            * self.config.batch_size
            * self.config.gradient_accumulation_steps
            * self.accelerator.num_processes
        )
        for name, optimizer in self.optimizers.items():
            values[f"{name}/learning_rate"] = optimizer.param_groups[0]["lr"]
        record = {
            "step": self.step,
            **values,
            "images_per_second": round(images / seconds, 2),
            "data_wait_fraction": round(self.data_seconds / seconds, 4),
            "skipped_steps": self.skipped_steps,
            "skipped_images": self.skipped_images,
        }
        if self.device.type == "cuda":
            record["max_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self._write_record(record)
        self._restart_clock()
        return ", ".join(f"{name} {values[name]:.4g}" for name in values if name.endswith("/loss"))

    def _write_record(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.history.append(record)
        if self.config.report_to is not None:
            self.accelerator.log(
                {name: value for name, value in record.items() if name != "step"}, step=record["step"]
            )

    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            with torch.no_grad():
                result = self.task.validate(self._inference_modules(), self.step)
            for name, image in result.images.items():
                save_png(image, self.output_dir / VALIDATION_FOLDER / f"step-{self.step:07d}_{name}.png")
            metrics = {f"validation/{name}": float(value) for name, value in result.metrics.items()}
            if metrics:
                self._write_record({"step": self.step, **metrics})
            self.history.plot()
        for module in self.models.values():
            module.train()
        self.accelerator.wait_for_everyone()
        self._restart_clock()

    def _save(self) -> None:
        self.window.reduce(self.accelerator)
        if self.accelerator.is_main_process:
            state = {
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "scaler": self.scaler.state_dict(),
                "window": self.window.state_dict(),
                "skipped_steps": self.skipped_steps,
                "skipped_images": self.skipped_images,
            }
            limit = self.config.checkpoints_total_limit
            save_checkpoint(self.output_dir, self.step, self._components(), state, total_limit=limit)
        self.accelerator.wait_for_everyone()
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.clock, self.clock_step, self.data_seconds = time.perf_counter(), self.step, 0.0

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


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that every tracker accepts."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
    }
