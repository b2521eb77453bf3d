"""Which tokens of a sequence of texts and images attend which (Transfusion, arXiv 2408.11039, section 3.2).

Legend: B batch, L tokens of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_runs(is_image: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """Number the images of a batch.

    Args:
        is_image: (B, L) boolean, True at the slots of images. Slots side by side are one image.
        segment_ids: (B, L) int64 of packed sequences; an image does not reach into the next segment.

    Returns:
        (B, L) int64: 0 outside images, k at the slots of the k-th image, counted from 1 over the flattened batch.
    """
    continues = torch.zeros_like(is_image)
    continues[:, 1:] = is_image[:, :-1]
    if segment_ids is not None:
        continues[:, 1:] &= segment_ids[:, 1:] == segment_ids[:, :-1]
    starts = is_image & ~continues
    return starts.flatten().cumsum(0).view_as(starts) * is_image


def segment_positions(segment_ids: Tensor) -> Tensor:
    """(B, L) int64 ids of packed sequences -> (B, L) int64 positions, which start at 0 in every segment."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def causal_mask(length: int, num_past: int = 0, device: torch.device | str | None = None) -> Tensor:
    """(length, num_past + length) boolean: ``length`` tokens after ``num_past`` others, which all of them attend."""
    allowed = torch.ones(length, num_past + length, dtype=torch.bool, device=device)
    return allowed.tril(diagonal=num_past)


def sequence_mask(is_pad: Tensor, runs: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
    """Causal over the sequence and bidirectional within an image.

    Token i may attend j if j <= i or both lie in the same image, and j is no padding or i itself: every row can attend
    something, which the softmax needs. Begin and end markers are not part of their image.

    Args:
        is_pad: (B, L) boolean.
        runs: (B, L) int64 as :func:`image_runs` returns them; None if images are causal as well.
        segment_ids: (B, L) int64; tokens attend only those of their own segment.

    Returns:
        (B, 1, L, L) boolean, True may be attended.
    """
    length = is_pad.shape[1]
    allowed = causal_mask(length, device=is_pad.device)[None]
    if runs is not None:
        allowed = allowed | ((runs[:, :, None] == runs[:, None, :]) & (runs > 0)[:, None, :])
    if segment_ids is not None:
        allowed = allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])
    itself = torch.eye(length, dtype=torch.bool, device=is_pad.device)
    return ((allowed & ~is_pad[:, None, :]) | itself)[:, None]
