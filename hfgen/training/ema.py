"""Exponential moving average of a module, buffers included."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA:
    """A frozen copy of a module whose parameters follow the trained ones slowly.

    Parameters become ``decay * average + (1 - decay) * trained``. Buffers (codebooks kept by moving averages, batch
    norm statistics, usage counters) are copied, because they are statistics already.

    Args:
        module: the trained module, before it is wrapped for several processes.
        decay: in (0, 1).
        warmup: use min(decay, (1 + n) / (10 + n)) at update n, so that the random initial weights fade early.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = True) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"decay is {decay}; it must be between 0 and 1.")
        self.decay = decay
        self.warmup = warmup
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    def decay_at(self, update: int) -> float:
        """The decay of update number ``update`` (0 is the first)."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, module: nn.Module, update: int) -> None:
        """Move the average towards ``module``; ``update`` counts the updates before this one."""
        averages, trained = ([_local(value) for value in part.parameters()] for part in (self.module, module))
        torch._foreach_lerp_(averages, trained, 1.0 - self.decay_at(update))
        for average, buffer in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(buffer)


def _local(parameter: Tensor) -> Tensor:
    """The slice of a sharded parameter that this process holds: averages are sharded alike."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
