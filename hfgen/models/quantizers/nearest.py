"""Nearest-code search in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

LATENTS_PER_TILE = 2048
CODES_PER_TILE = 4096


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Run float32 arithmetic as float32: without autocast and without TF32.

    A code is a discrete choice, so the rounding of bfloat16 or TF32 would turn into other codes, and in a residual
    quantizer into other residuals for every code after it.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        reduced = [switch for switch in switches if switch.fp32_precision == "tf32"]
        try:
            for switch in reduced:
                switch.fp32_precision = "ieee"
            yield
        finally:
            for switch in reduced:
                switch.fp32_precision = "tf32"


@torch.no_grad()
def nearest_code(latents: Tensor, codebook: Tensor, *, cosine: bool = False) -> Tensor:
    """The index of the nearest code of each latent vector.

    The search goes over tiles of vectors and codes and keeps a running minimum of ``|e|^2 - 2 z.e`` (the squared
    distance without the term that all codes share), so its memory does not grow with the product of both sizes.

    Args:
        latents: (N, d), any float dtype; compared in float32.
        codebook: (K, d), any float dtype.
        cosine: choose the largest cosine similarity instead of the smallest Euclidean distance.

    Returns:
        (N,) int64; among equally near codes the first, as ``argmin`` and ``argmax`` choose.
    """
    with full_float32(latents.device):
        latents, codebook = latents.float(), codebook.float()
        if cosine:
            latents, codebook = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
            offset, factor = codebook.new_zeros(len(codebook)), -1.0
        else:
            offset, factor = codebook.square().sum(-1), -2.0
        return torch.cat(
            [_nearest_in_tiles(tile, codebook, offset, factor) for tile in latents.split(LATENTS_PER_TILE)]
        )


def _nearest_in_tiles(latents: Tensor, codebook: Tensor, offset: Tensor, factor: float) -> Tensor:
    """argmin over codes of ``offset + factor * latents.code`` for one tile of vectors."""
    best = nearest = None
    for start in range(0, len(codebook), CODES_PER_TILE):
        tile = slice(start, start + CODES_PER_TILE)
        cost, index = torch.addmm(offset[tile], latents, codebook[tile].T, alpha=factor).min(dim=1)
        if best is None:
            best, nearest = cost, index
        else:
            # Strict, so that the first of equally near codes stays.
            closer = cost < best
            best, nearest = torch.where(closer, cost, best), torch.where(closer, index + start, nearest)
    return nearest
