"""Scales, shifts and gates of a residual branch that differ from token to token of a mixed sequence.

Legend: B batch, L tokens, N conditions, C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM_EPS = 1e-5


class TokenModulation(nn.Module):
    """Text gets learned vectors, every image those of its condition (adaLN-Zero, DiT, arXiv 2212.09748).

    Text is scaled by ``1 + text_scale`` before the branch and by ``1 + text_gate`` after it. An image is scaled and
    shifted by a linear layer of its condition, and gated by the sigmoid of another.

    Args:
        width: C.
        condition_dim: width of the condition.
    """

    def __init__(self, width: int, condition_dim: int):
        super().__init__()
        self.text_scale = nn.Parameter(torch.zeros(width))
        self.text_gate = nn.Parameter(torch.zeros(width))
        self.image_film = nn.Linear(condition_dim, 2 * width)
        self.image_gate = nn.Linear(condition_dim, width)

    def forward(self, hidden_states: Tensor, condition: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the branch and the gate of its output.

        Args:
            hidden_states: (B, L, C).
            condition: (N, condition_dim); None if all tokens are text.
            rows: (B, L) int64, 0 for text and 1 + i for the tokens with condition i.

        Returns:
            (B, L, C), and a gate that broadcasts to it.
        """
        normed = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=_NORM_EPS)
        if condition is None:
            return normed * (1 + self.text_scale), 1 + self.text_gate
        scale, shift = self.image_film(condition).chunk(2, dim=-1)  # (N, C)
        scale = torch.cat([self.text_scale[None], scale])[rows]
        shift = F.pad(shift, (0, 0, 1, 0))[rows]
        gate = torch.cat([1 + self.text_gate[None], self.image_gate(condition).sigmoid()])[rows]
        return torch.addcmul(shift, normed, 1 + scale), gate
