"""Every process holds every model, and a share of the optimizer states: ZeRO 1 and 2 of DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from hfgen.training.replicated import Replicated, holds_quantizer

REDUCE_BUCKET_SIZE = 50_000_000  # elements; each engine allocates them in float32 (DeepSpeed's default: 2 GB)


class PartitionedStates(Replicated):
    """ZeRO 1 and 2 (arXiv 1910.02054): optimizer states, and in 2 gradients too, are divided among the processes.

    Every phase has a DeepSpeed engine, which reduces the gradients, clips them and runs the phase's own optimizer on
    one flat float32 slice per parameter group. Weights stay whole and in float32 in every process; autocast, the
    learning rate and the averages are the trainer's.

    Optimizer states leave and enter in the form that they have without DeepSpeed: a checkpoint does not tell how it
    was trained.

    Args:
        accelerator: of the run, with more than one process.
        mixed_precision: "no" or "bf16".
        settings: "zero_optimization" of a DeepSpeed configuration. Only the stage counts; offloading is an error.
        max_grad_norm: to which gradients are clipped; 0 does not clip.
    """

    def __init__(
        self, accelerator: Accelerator, mixed_precision: str, settings: Mapping[str, Any], max_grad_norm: float
    ) -> None:
        stage = int(settings.get("stage", 0))
        if stage not in (1, 2):
            raise ValueError(
                f"DeepSpeed ZeRO stage {stage} is not supported, only 1 and 2. For weights that do not fit on a GPU "
                "use --sharding fsdp, or launch with examples/accelerate/fsdp2.yaml."
            )
        for part in ("offload_optimizer", "offload_param"):
            device = (settings.get(part) or {}).get("device")
            if device not in (None, "none"):
                raise ValueError(
                    f"DeepSpeed's {part} is {device!r} and offloading is not supported: set {part}_device to none, or "
                    "use --sharding fsdp to need less memory."
                )
        super().__init__(accelerator)
        if mixed_precision == "fp16":
            raise ValueError("DeepSpeed works with --mixed_precision bf16 or no, not with fp16 and its loss scaling.")
        self.configuration = {
            # Of the trainer's. One micro-step of one image, because the trainer accumulates and scales the losses.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": max_grad_norm,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": REDUCE_BUCKET_SIZE},
            "timers": {"throughput": {"enabled": False}},  # they wait for the device
        }
        self._engines: dict[torch.optim.Optimizer, nn.Module] = {}
        self._parameters: dict[torch.optim.Optimizer, list[list[nn.Parameter]]] = {}

    def attach(self, optimizer: torch.optim.Optimizer, modules: Sequence[nn.Module]) -> None:
        """Make the engine of a phase. From now on its optimizer has a slice of each group."""
        for module in modules:
            if holds_quantizer(module):
                raise ValueError(
                    f"{type(module).__name__} holds a quantizer, whose training changes the codebook in place (moving "
                    "averages, restarts); DeepSpeed would overwrite it. Launch with "
                    "examples/accelerate/multi_gpu_ddp.yaml."
                )
        try:
            import deepspeed
        except ImportError as error:
            raise ImportError(f"This launch needs DeepSpeed ({error}): pip install 'hfgen[deepspeed]'.") from error
        self._parameters[optimizer] = [list(group["params"]) for group in optimizer.param_groups]
        # The engine never runs this list. It reduces gradients by hooks on the weights, so models can be called as
        # they are; hooks on outputs, which its forward would add, do not survive torch.autograd.grad.
        model = nn.ModuleList(modules)
        self._engines[optimizer], *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self.configuration
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def no_sync(self, module: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def backward(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        # The engine leaves out a step if a gradient is not finite, so let such a loss give such gradients.
        loss = loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self._engines[optimizer].backward(loss)

    def step(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, bool, bool]:
        """The engine clips to the norm of its configuration. A norm that is not finite is given as infinity."""
        engine = self._engines[optimizer]
        engine.step()
        norm = torch.as_tensor(engine.get_global_grad_norm(), dtype=loss.dtype, device=loss.device)
        return norm, *torch.isfinite(torch.stack([loss, norm])).tolist()

    def load_weights(self, module: nn.Module, folder: Path) -> None:
        super().load_weights(module, folder)
        for engine in self._engines.values():  # each process has its slice once more
            engine.optimizer.refresh_fp32_params()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Complete on the main process only; the others keep no tensors."""
        state = optimizer.state_dict()
        values, groups, first = {}, [], 0
        for index, (group, parameters) in enumerate(
            zip(state["param_groups"], self._parameters[optimizer], strict=True)
        ):
            numbers = list(range(first, first + len(parameters)))
            first += len(parameters)
            groups.append({**group, "params": numbers})
            for name, value in state["state"].get(index, {}).items():
                for number, part in zip(numbers, self._gather(value, parameters), strict=True):
                    values.setdefault(number, {})[name] = part
        return {"state": values, "param_groups": groups}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        values, groups = {}, []
        for index, (group, parameters) in enumerate(
            zip(state["param_groups"], self._parameters[optimizer], strict=True)
        ):
            groups.append({**group, "params": [index]})
            entries = [state["state"].get(number, {}) for number in group["params"]]
            slice_size = optimizer.param_groups[index]["params"][0].numel()
            for name, example in max(entries, key=len).items():
                # A weight that no loss has reached has no state yet; the flat one has zeros there.
                parts = [entry.get(name) for entry in entries]
                values.setdefault(index, {})[name] = self._slice(example, parts, parameters, slice_size)
        optimizer.load_state_dict({"state": values, "param_groups": groups})

    def _gather(self, value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Parts of the parameters of one group; a counter is the same for all."""
        if value.ndim == 0:
            return [value.cpu().clone() for _ in parameters]
        is_main = self.accelerator.is_main_process
        slices = [torch.empty_like(value) for _ in range(self.accelerator.num_processes)] if is_main else None
        dist.gather(value, slices)
        if slices is None:
            return [None] * len(parameters)
        # The group's parameters one after the other, and zeros that fill up the last slice.
        sizes = [parameter.numel() for parameter in parameters]
        parts = torch.cat(slices)[: sum(sizes)].split(sizes)
        return [part.view(weight.shape).to("cpu", copy=True) for part, weight in zip(parts, parameters, strict=True)]

    def _slice(
        self, example: Tensor, parts: Sequence[Tensor | None], parameters: list[nn.Parameter], slice_size: int
    ) -> Tensor:
        """The inverse of :meth:`_gather`, for this process."""
        if example.ndim == 0:
            return example
        flat = torch.cat(
            [
                torch.zeros(weight.numel(), dtype=example.dtype) if part is None else part.flatten()
                for part, weight in zip(parts, parameters, strict=True)
            ]
        )
        flat = F.pad(flat, (0, slice_size * self.accelerator.num_processes - flat.numel()))
        start = slice_size * self.accelerator.process_index
        return flat[start : start + slice_size].clone()
