"""Adaptive layer normalisation: a condition scales, shifts and gates the residual branches (DiT, arXiv 2212.09748)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaLNModulation(nn.Module):
    """``num_chunks`` modulation vectors from one condition: Linear(SiLU(condition)).

    Args:
        condition_dim: width of the condition.
        hidden_size: width of each modulation vector.
        num_chunks: how many vectors; their order is the caller's.
    """

    def __init__(self, condition_dim: int, hidden_size: int, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(condition_dim, num_chunks * hidden_size)

    def forward(self, condition: Tensor) -> Tensor:
        """(B, condition_dim) -> (B, num_chunks, hidden_size)."""
        return self.linear(F.silu(condition)).unflatten(-1, (self.num_chunks, -1))


def modulated_norm(hidden_states: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm without affine parameters, then ``x * (1 + scale) + shift``; scale and shift are (B, 1, C)."""
    normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=eps)
    return torch.addcmul(shift.to(normed.dtype), normed, 1 + scale.to(normed.dtype))
