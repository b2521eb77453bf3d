"""Nearest-neighbour upsampling followed by a 3x3 convolution, as convolutional decoders use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NearestUpsampleConv(nn.Module):
    """Double the size by repeating pixels, then convolve: (B, C, H, W) -> (B, C', 2 H, 2 W).

    Each output pixel sees only 2x2 different input pixels through its 3x3 window, so the operation equals four 2x2
    convolutions of the small input, one per position in a 2x2 block of the output (Shi et al., arXiv 1609.05158), with
    4/9 of the multiplications. For inference on a CPU, which is bound by them, this form is used; elsewhere the plain
    one, since more and smaller kernels do not pay there.

    Args:
        conv: 3x3, stride 1, padding 1.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type == "cpu" and not torch.is_grad_enabled():
            return self._by_phase(hidden_states)
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))

    def _by_phase(self, hidden_states: Tensor) -> Tensor:
        height, width = hidden_states.shape[-2:]
        padded = F.pad(hidden_states, (1, 1, 1, 1))
        phases = [
            F.conv2d(padded[:, :, top : top + height + 1, left : left + width + 1], weight, self.conv.bias)
            for top, rows in enumerate(_merge_taps(self.conv.weight, 2))
            for left, weight in enumerate(_merge_taps(rows, 3))
        ]
        return F.pixel_shuffle(torch.stack(phases, dim=2).flatten(1, 2), 2)


def _merge_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two taps that an even and an odd output position give to the input pixels under three taps of a window."""
    first, second, third = weight.unbind(dim)
    return torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)
