"""The convolutional encoder and decoder of MaskGIT's VQGAN, without attention.

Chang et al., "MaskGIT: Masked Generative Image Transformer", arXiv 2202.04200, section 3.1 and the released network.
They differ from :mod:`hfgen.models.layers.conv` in what the released weights rely on: residual convolutions without
bias, average pooling instead of strided convolutions, and a shortcut that reads the branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskGITResBlock(nn.Module):
    """Twice group norm, SiLU and a 3x3 convolution without bias.

    Where the width changes, the sum is ``branch + conv_shortcut(branch)``: the input does not reach the output. That
    is how the published network computes, and its weights depend on it.

    Args:
        in_channels, out_channels: of the block; multiples of ``norm_num_groups``.
        norm_num_groups: groups of both normalisations.
        dropout: before the second convolution.
        eps: of both normalisations.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int, dropout: float, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv_shortcut = (
            nn.Conv2d(out_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W)."""
        branch = self.conv1(F.silu(self.norm1(hidden_states), inplace=True))
        branch = self.conv2(self.dropout(F.silu(self.norm2(branch), inplace=True)))
        if self.conv_shortcut is None:
            return branch.add_(hidden_states)
        return branch + self.conv_shortcut(branch)


class _Stack(nn.Module):
    """What encoder and decoder share."""

    def __init__(self, widths: Sequence[int], norm_num_groups: int):
        super().__init__()
        if any(width % norm_num_groups for width in widths):
            raise ValueError(
                f"norm_num_groups={norm_num_groups} does not divide every width of {tuple(widths)}; choose other "
                "widths or fewer groups."
            )
        self.gradient_checkpointing = False

    def _run(self, blocks: nn.ModuleList, hidden_states: Tensor) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states


class MaskGITEncoder(_Stack):
    """Images (B, in_channels, H, W) to features (B, latent_channels, H / f, W / f) with f = 2^(levels - 1).

    Args:
        in_channels: channels of the image.
        latent_channels: channels of the output.
        base_channels: width after the first convolution.
        widths: of each level, from full resolution to the coarsest.
        layers_per_block: residual blocks per level and in the middle.
        norm_num_groups: groups of every group normalisation; divides every width.
        dropout: in every residual block.
    """

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        base_channels: int,
        widths: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        dropout: float,
    ):
        super().__init__((base_channels, *widths), norm_num_groups)
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1, bias=False)
        channels = base_channels
        self.down_blocks = nn.ModuleList()
        for width in widths:
            ins = [channels, *[width] * (layers_per_block - 1)]
            self.down_blocks.append(
                nn.ModuleList(MaskGITResBlock(each, width, norm_num_groups, dropout) for each in ins)
            )
            channels = width
        self.mid_block = nn.ModuleList(
            MaskGITResBlock(channels, channels, norm_num_groups, dropout) for _ in range(layers_per_block)
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, channels, 1e-6)
        self.conv_out = nn.Conv2d(channels, latent_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W), H and W multiples of f -> (B, latent_channels, H / f, W / f)."""
        hidden_states = self.conv_in(images)
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                hidden_states = F.avg_pool2d(hidden_states, 2)
            hidden_states = self._run(blocks, hidden_states)
        hidden_states = self._run(self.mid_block, hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states), inplace=True))


class MaskGITDecoder(_Stack):
    """Features (B, latent_channels, h, w) to images (B, out_channels, h * f, w * f): the encoder mirrored.

    The arguments are those of :class:`MaskGITEncoder`, with ``widths`` in the encoder's order. ``up_blocks`` run from
    the coarsest level to the finest; between two levels the nearest neighbour is repeated and ``upsamplers`` convolve.
    """

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        widths: Sequence[int],
        layers_per_block: int,
        norm_num_groups: int,
        dropout: float,
    ):
        super().__init__(widths, norm_num_groups)
        channels = widths[-1]
        self.conv_in = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.mid_block = nn.ModuleList(
            MaskGITResBlock(channels, channels, norm_num_groups, dropout) for _ in range(layers_per_block)
        )
        self.up_blocks = nn.ModuleList()
        for width in reversed(widths):
            ins = [channels, *[width] * (layers_per_block - 1)]
            self.up_blocks.append(
                nn.ModuleList(MaskGITResBlock(each, width, norm_num_groups, dropout) for each in ins)
            )
            channels = width
        self.upsamplers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in reversed(widths[1:]))
        self.norm_out = nn.GroupNorm(norm_num_groups, channels, 1e-6)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, out_channels, h * f, w * f)."""
        hidden_states = self._run(self.mid_block, self.conv_in(latents))
        for step, blocks in enumerate(self.up_blocks):
            if step > 0:
                hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
                hidden_states = self.upsamplers[step - 1](hidden_states)
            hidden_states = self._run(blocks, hidden_states)
        return self.conv_out(F.silu(self.norm_out(hidden_states), inplace=True))
