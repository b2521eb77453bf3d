"""How much of a codebook is in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """The number of processes, 1 without ``torch.distributed``."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add ``value`` up over all processes, in place; without ``torch.distributed`` it stays as it is."""
    if world_size() > 1:
        distributed.all_reduce(value)
    return value


def check_codes(codes: Tensor, num_codes: int) -> None:
    """Raise a ``ValueError`` unless all ``codes`` lie in [0, num_codes)."""
    low, high = (bound.item() for bound in codes.aminmax())
    if low < 0 or high >= num_codes:
        raise ValueError(f"codes lie in [{low}, {high}], expected ids in [0, {num_codes - 1}].")


def code_counts(codes: Tensor, num_codes: int) -> Tensor:
    """(num_codes,) int64: how often each code occurs in ``codes`` of any shape, over all processes."""
    return sum_over_ranks(codes.flatten().bincount(minlength=num_codes))


def codebook_usage(codes: Tensor, num_codes: int) -> dict[str, Tensor]:
    """Usage of a codebook by a batch of codes, over all processes.

    Args:
        codes: int64 of any shape, in [0, num_codes).
        num_codes: size of the codebook.

    Returns:
        Two float32 scalars: ``perplexity``, exp of the entropy of the code frequencies, from 1 to ``num_codes``, and
        ``used_fraction``, distinct codes / num_codes.
    """
    counts = code_counts(codes, num_codes).float()
    frequencies = counts / counts.sum()
    return {
        "perplexity": torch.special.entr(frequencies).sum().exp(),
        "used_fraction": (counts > 0).float().mean(),
    }


class ScaleUsage:
    """VAR's running usage of a shared codebook by each scale.

    An exponential moving average of the hits of each code at each scale. It follows the published training code: the
    update counter advances once per scale, so that only the first scale of the first step is copied; then the decay is
    0.9 until the counter reaches 100 and 0.99 afterwards. A metric only, hence no part of a model or its checkpoint.

    Args:
        num_scales: number of scales.
        num_codes: size of the codebook.
    """

    def __init__(self, num_scales: int, num_codes: int):
        self.hits = torch.zeros(num_scales, num_codes)
        self.updates = 0

    def update(self, codes: Sequence[Tensor]) -> None:
        """Add one step: the int64 codes of each scale, of any shape, coarse to fine; summed over processes."""
        num_codes = self.hits.shape[1]
        counts = torch.stack([scale.flatten().bincount(minlength=num_codes) for scale in codes])
        self.hits = self.hits.to(counts.device)
        for hits, count in zip(self.hits, sum_over_ranks(counts).float(), strict=True):
            decay = 0.0 if self.updates == 0 else 0.9 if self.updates < 100 else 0.99
            hits.mul_(decay).add_(count, alpha=1 - decay)
            self.updates += 1

    def percent(self, tokens_per_step: int) -> Tensor:
        """(num_scales,) float32 in [0, 100]: the codes with at least 8 % of their even share of the last scale.

        Args:
            tokens_per_step: codes of the last scale in one step of one process, B * h * w.
        """
        threshold = world_size() * tokens_per_step / self.hits.shape[1] * 0.08
        return (self.hits >= threshold).float().mean(dim=1) * 100
