"""A learned mixture of the outputs of all layers so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hfgen.models.layers.unit_norm import UnitRMSNorm


class DepthAttention(nn.Module):
    """Each token attends what it was after the embedding and after every layer so far, by one learned query.

    The keys are the normalised states, ``softmax_l(query . norm(x_l) / sqrt(C))`` are the weights of the x_l.

    Args:
        width: C.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = UnitRMSNorm(width)
        self.query = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.query, std=0.02)

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """L tensors (B, N, C) -> (B, N, C)."""
        stacked = torch.stack(list(states), dim=-2)  # (B, N, L, C)
        scores = self.norm(stacked) @ self.query * self.query.shape[0] ** -0.5
        return torch.matmul(scores.softmax(dim=-1).unsqueeze(-2), stacked).squeeze(-2)
