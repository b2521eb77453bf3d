"""Rules of next-scale sampling beside the draw itself: smooth embeddings and edit masks (VAR, arXiv 2404.02905)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen.sampling.logits import gumbel_softmax


def smooth_probabilities(logits: Tensor, draws: Tensor, progress: float) -> Tensor:
    """Relaxed codes that make smoother images than drawn ones.

    The weights of the codes are a Gumbel-softmax of ``(1 + r) logits`` at temperature
    ``max(0.27 (1 - 0.95 r), 0.005)`` for the progress r from 0 at the first scale to 1 at the last.

    Args:
        logits: (B, S, V), already filtered.
        draws: Exponential(1) of the same shape.
        progress: r.

    Returns:
        (B, S, V) that sum to 1 over V.
    """
    return gumbel_softmax(logits * (1 + progress), draws, max(0.27 * (1 - 0.95 * progress), 0.005))


def keep_mask_at_scale(keep: Tensor, side: int) -> Tensor:
    """Which tokens of one scale an edit keeps, (B, 1, side, side) boolean.

    Args:
        keep: (B, 1, P, P) float in [0, 1] at the resolution of the latents, 1 where the image stays.
        side: of the scale. Scales of at most three tokens carry the whole image and are always kept.
    """
    if side * side <= 3:
        return torch.ones(keep.shape[0], 1, side, side, dtype=torch.bool, device=keep.device)
    return F.interpolate(keep, size=(side, side), mode="bilinear", align_corners=False) > 0.5
