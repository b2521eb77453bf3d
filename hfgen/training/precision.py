"""How forward passes are computed: in half precision, with recomputation, compiled.

In mixed precision the forward passes run in half precision; weights, losses and optimizer stay in float32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfgen.training.param_groups import repeated_blocks

DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_mixed_precision(requested: str | None, device: torch.device) -> str:
    """``requested``, or what ``accelerate launch --mixed_precision`` said; "no", "fp16" or "bf16"."""
    mixed_precision = requested or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision not in DTYPES:
        raise ValueError(f"mixed_precision is {mixed_precision!r}; choose one of {', '.join(DTYPES)}.")
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    return mixed_precision


def autocast_forward(module: nn.Module, device: torch.device, mixed_precision: str) -> None:
    """Run ``module.forward`` under autocast and return its floating tensors as float32, so that losses are exact.

    Accelerate's own wrapper would rebuild the output object, which output classes with several required fields do not
    survive.
    """
    dtype = DTYPES[mixed_precision]
    if dtype is None:
        return
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype=dtype):
            output = forward(*args, **kwargs)
        return _to_float32(output)

    module.forward = wrapped


def _to_float32(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float() if output.is_floating_point() else output
    if isinstance(output, dict):  # also diffusers' outputs, changed in place
        for name, value in output.items():
            output[name] = _to_float32(value)
        return output
    if isinstance(output, tuple):
        return tuple(_to_float32(value) for value in output)
    return output


def enable_gradient_checkpointing(models: Mapping[str, nn.Module], required: Collection[str]) -> None:
    """Recompute activations in the backward pass of every model that can.

    Args:
        models: the trained models by name.
        required: names of those that must support it; the others (a discriminator) may not.
    """
    for name, model in models.items():
        if getattr(model, "_supports_gradient_checkpointing", False):
            model.enable_gradient_checkpointing()
        elif name in required:
            raise ValueError(f"--gradient_checkpointing: {type(model).__name__} does not support it; drop the flag.")


def compile_blocks(models: Mapping[str, nn.Module], required: Collection[str]) -> None:
    """Compile the repeated blocks of every model that names them, in place: names of weights stay as they are.

    Args:
        models: the trained models by name, before they are wrapped.
        required: names of those that must have repeated blocks; the others (a discriminator) may not.
    """
    for name, model in models.items():
        blocks = repeated_blocks(model)
        if blocks:
            # Blocks with constants of their own (drop path) are a graph each, and torch gives up after 8 by default.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, len(blocks) + 8)
            model.compile_repeated_blocks(fullgraph=True)
        elif name in required:
            raise ValueError(f"--compile: {type(model).__name__} names no repeated blocks to compile; drop the flag.")
