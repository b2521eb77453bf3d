"""Winograd's minimal filtering for 3x3 convs: half of the products, for inference on CPUs.

Lavin & Gray (arXiv 1509.09308, section 4.1): four outputs of a filter with three taps follow from six products instead
of twelve. Here along the rows alone: what remains are six convs with three taps within rows, and all sums are of whole
rows, which lie together in memory. Errors of rounding grow from about 3e-7 to 1e-6 of the largest value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_OUTPUTS, _PRODUCTS = 4, 6
# Polynomials are evaluated at 0, 1, -1, 2, -2 and infinity: rows of the matrix G of the paper.
_TAPS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# Bands of rows whose intermediate values, three times as large, stay in the cache of a core.
_BAND_BYTES = 3 * 2**20


def winograd_conv_over(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv2d(images, weight, bias, padding=1)``, written over ``images``.

    Args:
        images: (B, C, H, W) float32, contiguous.
        weight: (C, C, 3, 3) float32.
        bias: (C,) float32, or None.
    """
    channels, height, width = images.shape[1:]
    taps = weight.new_tensor(_TAPS)
    kernels = torch.einsum("pt,octs->pocs", taps, weight).reshape(_PRODUCTS * channels, channels, 1, 3)
    if bias is not None:  # all outputs read the product at 1 with a factor of 1
        bias = F.pad(bias[None], (0, 0, 1, _PRODUCTS - 2)).flatten()  # (6 C,)
    tiles = max(_BAND_BYTES // images[0, :, 0].nbytes // _OUTPUTS, 1)
    tiles = min(tiles, -(-height // _OUTPUTS))
    rows = tiles * _OUTPUTS
    band = images.new_empty(channels, rows + 2, width)  # with the neighbours that the conv reads
    sums = images.new_empty(_PRODUCTS, channels, tiles, width)
    for image in images:
        band[:, 0] = 0
        for first in range(0, height, rows):
            below = image[:, first : first + rows + 1]
            band[:, 1 : 1 + below.shape[1]] = below
            band[:, 1 + below.shape[1] :] = 0
            _sum_inputs([band[:, row : row + rows - 3 : _OUTPUTS] for row in range(_PRODUCTS)], sums)
            products = F.conv2d(sums.view(1, -1, tiles, width), kernels, bias, padding=(0, 1), groups=_PRODUCTS)
            outputs = _sum_products(products.view(_PRODUCTS, channels, tiles, width).unbind())
            last = min(first + rows, height)
            for row, values in enumerate(outputs):
                written = image[:, first + row : last : _OUTPUTS]
                written.copy_(values[:, : written.shape[1]])
            band[:, 0] = band[:, rows].clone()
    return images


def _sum_inputs(rows: list[Tensor], sums: Tensor) -> None:
    """B' of the paper times six rows (C, tiles, W) of every tile, into ``sums`` (6, C, tiles, W)."""
    even, odd = torch.sub(rows[4], rows[2], alpha=4), torch.sub(rows[3], rows[1], alpha=4)
    torch.add(even, odd, out=sums[1])
    torch.sub(even, odd, out=sums[2])
    torch.sub(rows[4], rows[2], out=even)
    torch.sub(rows[3], rows[1], out=odd)
    torch.add(even, odd, alpha=2, out=sums[3])
    torch.sub(even, odd, alpha=2, out=sums[4])
    torch.sub(rows[4], rows[2], alpha=5, out=sums[0]).add_(rows[0], alpha=4)
    torch.sub(rows[5], rows[3], alpha=5, out=sums[5]).add_(rows[1], alpha=4)


def _sum_products(products: tuple[Tensor, ...]) -> list[Tensor]:
    """A' of the paper times the six products (C, tiles, W) of every tile: its four rows (C, tiles, W)."""
    zero, plus, minus, plus_two, minus_two, infinity = products
    sum_one, difference_one = plus + minus, plus - minus
    sum_two, difference_two = plus_two + minus_two, plus_two - minus_two
    return [
        zero.add_(sum_one).add_(sum_two),
        torch.add(difference_one, difference_two, alpha=2),
        torch.add(sum_one, sum_two, alpha=4),
        infinity.add_(difference_one).add_(difference_two, alpha=8),
    ]
