"""Cross-entropy of masked-token prediction (MaskGIT, arXiv 2202.04200, eq. 1; TiTok, arXiv 2406.07550)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REDUCTIONS = ("tokens", "images")


def masked_token_loss(
    logits: Tensor,
    codes: Tensor,
    mask: Tensor,
    *,
    unmasked_weight: float = 0.0,
    label_smoothing: float = 0.1,
    reduction: str = "tokens",
) -> Tensor:
    """The weighted mean cross-entropy of tokens.

    Args:
        logits: (B, N, V) float.
        codes: (B, N) int64, the true ids.
        mask: (B, N) boolean or float weights; True where the token was masked.
        unmasked_weight: weight of the others: 0 in MaskGIT, 0.1 in TiTok's generators.
        label_smoothing: share of the target that is spread evenly over V.
        reduction: ``tokens``, one mean over the batch (TiTok), or ``images``, the mean over images of their means
            (MaskGIT).

    Returns:
        A scalar, float32.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"Unknown reduction {reduction!r}; choose one of {', '.join(REDUCTIONS)}.")
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), codes.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(codes)
    weights = torch.where(mask, 1.0, unmasked_weight) if mask.dtype == torch.bool else mask
    dims = None if reduction == "tokens" else -1
    return ((weights * losses).sum(dims) / (weights.sum(dims) + 1e-8)).mean()


def masked_token_accuracy(logits: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """The share of masked tokens whose likeliest code is right, per image and averaged; a scalar in [0, 1].

    Args:
        logits: (B, N, V).
        codes: (B, N) int64, the true ids.
        mask: (B, N) boolean.
    """
    right = (logits.argmax(dim=-1) == codes) & mask
    return (right.sum(dim=-1) / (mask.sum(dim=-1) + 1e-8)).mean()
