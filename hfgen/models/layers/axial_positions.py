"""Learned positions on grids of any size and number of axes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AxialPositionEmbed(nn.Module):
    """The sum of a small network of each coordinate, with linear layers 1 -> 2 C -> 2 C -> C and SiLU between them.

    Args:
        width: C.
        num_axes: axes of the grid.
    """

    def __init__(self, width: int, num_axes: int):
        super().__init__()
        self.axes = nn.ModuleList(
            nn.Sequential(
                nn.Linear(1, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, 2 * width),
                nn.SiLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(num_axes)
        )

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """Sizes of the axes -> (product of the sizes, C), the last axis fastest."""
        weight = self.axes[0][0].weight
        positions = weight.new_zeros(1, weight.shape[0] // 2)
        for axis, size in zip(self.axes, grid):
            coordinates = torch.arange(size, device=weight.device, dtype=weight.dtype)[:, None]
            positions = (positions[:, None] + axis(coordinates)).flatten(0, 1)
        return positions
