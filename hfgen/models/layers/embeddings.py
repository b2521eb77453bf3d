"""Embeddings of positions on a grid, and of times.

Legend: B batch, N = h w positions of a grid in raster order, D width.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

_TIME_CHANNELS = 256
_MAX_PERIOD = 10000.0


def sincos_positions(
    grid: tuple[int, int], width: int, base_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Fixed positions of a grid (MAE, arXiv 2111.06377; DiT, arXiv 2212.09748).

    Half of the channels tell the column and half the row, each as sines and then cosines. A grid of another size spans
    the same range of positions as one of ``base_size``: in between, the values are those of fractional positions.

    Args:
        grid: (h, w).
        width: D, a multiple of 4.
        base_size: side of the grid that the model was trained on.

    Returns:
        (N, D) float32.
    """
    quarter = width // 4
    frequencies = _MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    halves = []
    for size in grid:
        places = torch.arange(size, dtype=torch.float64) * (base_size / size)
        angles = places[:, None] * frequencies
        halves.append(torch.cat([angles.sin(), angles.cos()], dim=1).float().to(device=device))
    rows, columns = halves[0][:, None], halves[1][None]
    return torch.cat([columns.expand(*grid, -1), rows.expand(*grid, -1)], dim=-1).flatten(0, 1)


class SinCosPositionEmbed(nn.Module):
    """:func:`sincos_positions`, kept for square grids of one size and computed for others.

    Args:
        width: D, a multiple of 4.
        base_size: side of the grid that the model is trained on.
    """

    def __init__(self, width: int, base_size: int):
        super().__init__()
        self.width = width
        self.base_size = base_size
        table = sincos_positions((base_size, base_size), width, base_size)
        self.register_buffer("table", table, persistent=False)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(h, w) -> (N, D) in the dtype of the table."""
        if grid == (self.base_size, self.base_size):
            return self.table
        return sincos_positions(grid, self.width, self.base_size, self.table.device).to(self.table.dtype)


class TimeEmbed(TimestepEmbedding):
    """A time as cosines and sines of 128 frequencies from 1 to 1/10000 (exclusive), and two linear layers (DiT).

    The parameters are those of diffusers' ``TimestepEmbedding``.

    Args:
        width: D.
    """

    def __init__(self, width: int):
        super().__init__(_TIME_CHANNELS, width)

    def forward(self, time: Tensor) -> Tensor:
        """(B,) of any dtype and scale -> (B, D); the waves are computed in float32."""
        waves = get_timestep_embedding(time, _TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        return super().forward(waves.to(self.linear_1.weight.dtype))
