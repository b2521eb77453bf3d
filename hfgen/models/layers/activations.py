"""Activations that PyTorch computes slowly on some device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch import Tensor

_BLOCK_ELEMENTS = 2**16  # per thread, 256 KiB in float32: a block and its temporary stay in the cache of a core


class TanhGELU(GELU):
    """A linear layer and the tanh approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).

    The parameters are those of diffusers' ``GELU``. PyTorch's CPU kernel takes several times as long for the
    approximation as for the exact function, so inference on a CPU uses the equal form ``x * sigmoid(2 u)`` with
    ``u = sqrt(2 / pi) (x + 0.044715 x^3)``, computed in place, block by block.

    Args:
        dim_in, dim_out: of the linear layer.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__(dim_in, dim_out, approximate="tanh")

    def gelu(self, gate: Tensor) -> Tensor:
        """The activation of (..., dim_out); may overwrite its argument where no gradients are needed."""
        plain = gate.device.type != "cpu" or gate.dtype != torch.float32
        if plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.gelu(gate, approximate="tanh")
        return tanh_gelu_(gate)


@torch.no_grad()
def tanh_gelu_(x: Tensor) -> Tensor:
    """The tanh approximation of GELU in place, of a contiguous tensor."""
    linear = 2 * math.sqrt(2 / math.pi)
    for block in x.view(-1).split(_BLOCK_ELEMENTS * torch.get_num_threads()):
        twice_u = (block * block).mul_(linear * 0.044715).add_(linear).mul_(block)
        block.mul_(twice_u.sigmoid_())
    return x
