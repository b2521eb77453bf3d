"""Root-mean-square normalisation by the length of the vector, with a gain around one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UnitRMSNorm(nn.Module):
    """``x / |x| * sqrt(D) * (1 + gamma)``; gamma (D,) starts at zero, so that weight decay pulls the gain to one.

    Args:
        width: D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.scale = width**0.5
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.normalize(hidden_states, dim=-1) * (self.scale * (1 + self.gamma))
