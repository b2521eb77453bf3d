"""From logits to codes: temperature, top-k, top-p and draws. Pure functions of tensors and generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set the logits outside the top-k and then outside the nucleus to -inf.

    Args:
        logits: (..., V) float.
        top_k: keep every logit at least as large as the k-th largest; 0 keeps all.
        top_p: then keep the smallest set of largest probabilities whose sum exceeds ``top_p`` (Holtzman et al.,
            arXiv 1904.09751); the largest always stays; 1 keeps all.
    """
    num_codes = logits.shape[-1]
    limited = 0 < top_k < num_codes
    if not limited and top_p >= 1.0:
        return logits
    # The nucleus is found among the top-k alone: sorting them is much less work than sorting all codes.
    largest = logits.topk(top_k if limited else num_codes, dim=-1, sorted=top_p < 1.0).values
    threshold = largest.amin(dim=-1, keepdim=True)
    if top_p < 1.0:
        ascending = largest.flip(-1)
        outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
        outside[..., -1] = False
        threshold = ascending.gather(-1, outside.sum(dim=-1, keepdim=True))
    return logits.masked_fill(logits < threshold, -torch.inf)


def exponential_draws(shape: Sequence[int], generator: Generators, device: torch.device | str) -> Tensor:
    """Exponential(1) float32 draws of ``shape`` = (B, ...).

    One generator (or None, torch's own) draws the whole batch; a list of B generators draws each row from its own, so
    that an image does not depend on the batch it is in. The draws are made on each generator's device.
    """
    if not isinstance(generator, Sequence):
        return _draw(shape, generator, device)
    if len(generator) != shape[0]:
        raise ValueError(f"Got {len(generator)} generators for a batch of {shape[0]}; give one per image.")
    return torch.cat([_draw((1, *shape[1:]), one, device) for one in generator])


def _draw(shape: Sequence[int], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    source = device if generator is None else generator.device
    return torch.empty(tuple(shape), device=source).exponential_(generator=generator).to(device)


def sample_codes(logits: Tensor, draws: Tensor | None) -> Tensor:
    """Codes (B, L) int64 from logits (B, L, V): categorical by an exponential race, or the largest without draws.

    ``argmax softmax(logits) / E`` with E ~ Exponential(1) is a categorical draw; it is what ``torch.multinomial``
    computes for one sample, without its host synchronisation.
    """
    if draws is None:
        return logits.argmax(dim=-1)
    return (logits.softmax(dim=-1) / draws).argmax(dim=-1)


def gumbel_softmax(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """``softmax((logits - log draws) / temperature)``: relaxed one-hot codes (Jang et al., arXiv 1611.01144).

    ``draws`` are Exponential(1), so that ``-log draws`` is standard Gumbel noise.
    """
    return ((logits - draws.log()) / temperature).softmax(dim=-1)
