"""How the processes of a run hold its models: each a slice of every weight (FSDP2), or what else was asked for."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, str_to_bool
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from hfgen.training.config import TrainingConfig
from hfgen.training.precision import DTYPES
from hfgen.training.replicated import Replicated, holds_quantizer
from hfgen.training.zero import PartitionedStates

# Methods besides forward that run weights carry this decorator; all its wrappers share one code object.
_HOOKED = apply_forward_hook(lambda self: None).__code__


class FullySharded(Replicated):
    """Every process holds a slice of each weight, its gradient, its average and its optimizer state.

    torch's ``fully_shard`` (FSDP2) is applied to every block that a model names in ``_repeated_blocks`` or
    ``_no_split_modules``, and to the model itself: a block's weights are whole only while it runs. The methods marked
    with ``apply_forward_hook`` gather them as ``forward`` does. Gradients are reduced in every micro-step, so that no
    process ever holds those of a whole model.

    Weights and optimizer states leave and enter in the form that they have without sharding: a checkpoint does not
    tell how it was trained.

    Args:
        accelerator: of the run, with more than one process.
        mixed_precision: "no" or "bf16", the dtype in which weights are gathered; gradients are reduced in float32.
    """

    def __init__(self, accelerator: Accelerator, mixed_precision: str) -> None:
        super().__init__(accelerator)
        if mixed_precision == "fp16":
            raise ValueError("Sharding works with --mixed_precision bf16 or no, not with fp16 and its loss scaling.")
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self.policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self._frames: dict[nn.Module, nn.Module] = {}

    def place(self, module: nn.Module) -> None:
        """Slice the weights, in place."""
        kind = type(module)
        if holds_quantizer(module):
            raise ValueError(
                f"{kind.__name__} holds a quantizer, whose training changes the codebook in place (moving averages, "
                "restarts) and thus needs whole weights; train it with --sharding none."
            )
        self._frames[module] = _frame(module)
        entry_points = [name for name in dir(kind) if getattr(getattr(kind, name), "__code__", None) is _HOOKED]
        blocks = {*(getattr(kind, "_repeated_blocks", None) or ()), *(getattr(kind, "_no_split_modules", None) or ())}
        # Inner ones first. By default the outermost module keeps its weights whole after a forward pass; True gives
        # them back, so that `parameters()` are the slices whenever no pass is running.
        for part in reversed(list(module.modules())):
            if part is module or type(part).__name__ in blocks:
                fully_shard(part, mesh=self.mesh, mp_policy=self.policy, reshard_after_forward=True)
        for name in entry_points:
            register_fsdp_forward_method(module, name)

    def wrap(self, module: nn.Module) -> nn.Module:
        # In its first pass FSDP notes the dtype of the parameters that take gradients. An empty pass now finds them
        # all; a first pass inside `frozen` would find none.
        module.first_pass = lambda: None
        register_fsdp_forward_method(module, "first_pass")
        with torch.no_grad():
            module.first_pass()
        del module.first_pass
        return module

    def no_sync(self, module: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def whole(self, module: nn.Module) -> nn.Module | None:
        """A copy on the CPU; None on the other processes."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(module, options=options)
        if not self.accelerator.is_main_process:
            return None
        result = copy.deepcopy(self._frames[module])
        result.load_state_dict(state, assign=True)
        return result

    def load_weights(self, module: nn.Module, folder: Path) -> None:
        state = {}
        if self.accelerator.is_main_process:
            state = type(self._frames[module]).from_pretrained(folder).state_dict()
        set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Complete on the main process only; the others keep no tensors."""
        keep = self.accelerator.is_main_process
        state = optimizer.state_dict()
        values = {
            index: {name: _whole_tensor(value, keep) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return {**state, "state": values}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        values = {
            index: {name: _slice_like(value, parameters[index]) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": values})


def make_placement(config: TrainingConfig, accelerator: Accelerator, mixed_precision: str) -> Replicated:
    """``--sharding``, or what ``accelerate launch`` was told: its FSDP or DeepSpeed switches it on.

    Only the switch counts, and DeepSpeed's stage. Which modules are wrapped, the precision, accumulation, clipping and
    the form of checkpoints are the trainer's.
    """
    # On the CPU accelerate makes DDP of both without a word, so its distributed type would not tell.
    fsdp = _launched_with("ACCELERATE_USE_FSDP")
    deepspeed = _launched_with("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and config.sharding != "none":
        raise ValueError(
            f"--sharding {config.sharding} cannot be combined with a DeepSpeed configuration of accelerate launch; "
            "drop one of them."
        )
    if fsdp and _launched_with("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "With fsdp_cpu_ram_efficient_loading transformers loads weights on the first process only: frozen text "
            "encoders would be empty on the others. Set it to false, as examples/accelerate/fsdp2.yaml does."
        )
    if not (fsdp or deepspeed) and config.sharding == "none":
        return Replicated(accelerator)
    if config.optimizer != "adamw":
        # Adafactor's and 8-bit states are not slices like their weights; Muon works on whole matrices.
        raise ValueError(
            f"--optimizer {config.optimizer} does not work on slices of weights; sharding works with adamw."
        )
    if accelerator.num_processes == 1:
        raise ValueError(
            "Sharding needs several processes, and this run has one: start it with torchrun --nproc_per_node N or "
            "accelerate launch --num_processes N, or use --sharding none."
        )
    if deepspeed:
        settings = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
        return PartitionedStates(accelerator, mixed_precision, settings, config.max_grad_norm)
    return FullySharded(accelerator, mixed_precision)


def _launched_with(variable: str) -> bool:
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _frame(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters take no memory."""
    memory = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memory)


def _whole_tensor(value: Any, keep: bool) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if keep else None


def _slice_like(value: Any, parameter: Tensor) -> Any:
    """State that has the shape of its parameter is sliced like it; counters stay as they are."""
    if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
