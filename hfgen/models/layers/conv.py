"""The convolutional encoder and decoder of VQGAN, built from the diffusers blocks.

The layout of Esser et al. 2021 (arXiv 2012.09841, appendix table 7): residual blocks at falling resolution,
single-head self-attention after every block of the coarsest level and between the two middle blocks. VAR, LlamaGen,
RQ-VAE and the latent diffusion autoencoders share it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from hfgen.models.layers.large_conv import NearestUpsampleConv, conv_over, in_cpu_inference

_CACHE_BYTES = 2**22


class ConvResnetBlock(nn.Module):
    """The residual block of VQGAN without time embedding: twice group norm, SiLU and a 3x3 conv.

    Its parameters are those of diffusers' ``ResnetBlock2D``, whose place it takes. At full resolution every
    extra buffer costs a CPU as much time as the activation itself: here activations and the sum are computed
    in place, and there is no division by a constant 1.

    Args:
        in_channels, out_channels: of the block; a 1x1 conv in the shortcut where they differ.
        norm_num_groups: groups of both normalisations.
        dropout: before the second conv.
        eps: of both normalisations.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int, dropout: float, eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_states: Tensor, temb: None = None) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W). ``temb`` is what the diffusers stacks pass: None."""
        if hidden_states.device.type == "cpu":
            # Attention leaves channels-last strides behind, which convs hand on and for which they would reorder
            # their weights at every call.
            hidden_states = hidden_states.contiguous(memory_format=_memory_format(self.conv1.weight))
        branch = F.silu(self.norm1(hidden_states), inplace=True)
        branch = conv_over(self.conv1, branch) if self.conv_shortcut is None else self.conv1(branch)
        branch = self.dropout(_norm_silu_over(self.norm2, branch))
        branch = conv_over(self.conv2, branch)
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        return branch.add_(hidden_states)


def _norm_silu_over(norm: nn.GroupNorm, hidden_states: Tensor) -> Tensor:
    """``silu(norm(hidden_states))``; may write the result over its argument.

    Inference on a CPU normalises and activates one group of channels after the other where an image does not fit into
    the cache of a core: each value then comes from memory and returns to it once, and no memory is asked for.
    """
    if not in_cpu_inference(hidden_states) or hidden_states[0].nbytes <= _CACHE_BYTES:
        return F.silu(norm(hidden_states), inplace=True)
    width = norm.num_channels // norm.num_groups
    for image in hidden_states.split(1):
        for first in range(0, norm.num_channels, width):
            group = slice(first, first + width)
            normed = F.group_norm(image[:, group], 1, norm.weight[group], norm.bias[group], norm.eps)
            torch.ops.aten.silu.out(normed, out=image[:, group])
    return hidden_states


def _memory_format(weight: Tensor) -> torch.memory_format:
    """The layout of activations that a user chose with ``model.to(memory_format=...)``."""
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def vqgan_encoder(
    in_channels: int,
    latent_channels: int,
    block_out_channels: Sequence[int],
    *,
    layers_per_block: int = 2,
    norm_num_groups: int = 32,
    dropout: float = 0.0,
    last_level_attention: bool = True,
    mid_block_attention: bool = True,
    double_z: bool = False,
) -> Encoder:
    """Pixels (B, in_channels, H, W) to features (B, latent_channels, H / f, W / f) with f = 2^(levels - 1).

    Args:
        in_channels: channels of the image.
        latent_channels: channels of the output; twice as many with ``double_z``.
        block_out_channels: width of each level, from full resolution to the coarsest. ``norm_num_groups`` must divide
            every one of them.
        layers_per_block: residual blocks per level.
        norm_num_groups: groups of every group normalisation.
        dropout: dropout inside every residual block.
        last_level_attention: self-attention after every block of the coarsest level.
        mid_block_attention: self-attention between the two middle blocks.
        double_z: put out the mean and log-variance of a Gaussian instead of one feature.
    """
    _check_widths(block_out_channels, norm_num_groups)
    last = "AttnDownEncoderBlock2D" if last_level_attention else "DownEncoderBlock2D"
    encoder = Encoder(
        in_channels=in_channels,
        out_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * (len(block_out_channels) - 1) + (last,),
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        double_z=double_z,
        mid_block_add_attention=mid_block_attention,
    )
    _finish(encoder, dropout)
    return encoder


def vqgan_decoder(
    latent_channels: int,
    out_channels: int,
    block_out_channels: Sequence[int],
    *,
    layers_per_block: int = 2,
    norm_num_groups: int = 32,
    dropout: float = 0.0,
    last_level_attention: bool = True,
    mid_block_attention: bool = True,
) -> Decoder:
    """Features (B, latent_channels, h, w) to pixels (B, out_channels, h * f, w * f): :func:`vqgan_encoder` mirrored.

    The widths are given in the encoder's order and each level has ``layers_per_block + 1`` residual blocks.
    """
    _check_widths(block_out_channels, norm_num_groups)
    first = "AttnUpDecoderBlock2D" if last_level_attention else "UpDecoderBlock2D"
    decoder = Decoder(
        in_channels=latent_channels,
        out_channels=out_channels,
        up_block_types=(first,) + ("UpDecoderBlock2D",) * (len(block_out_channels) - 1),
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        mid_block_add_attention=mid_block_attention,
    )
    _finish(decoder, dropout)
    return decoder


def _check_widths(block_out_channels: Sequence[int], norm_num_groups: int) -> None:
    if any(width % norm_num_groups for width in block_out_channels):
        raise ValueError(
            f"norm_num_groups={norm_num_groups} does not divide every width of {tuple(block_out_channels)}; "
            "choose other widths or fewer groups."
        )


def _finish(stack: Encoder | Decoder, dropout: float) -> None:
    """Put our blocks in place of those of diffusers, and compute the last activation in place too."""
    for parent in list(stack.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, ResnetBlock2D):
                groups, eps = block.norm1.num_groups, block.norm1.eps
                setattr(parent, name, ConvResnetBlock(block.in_channels, block.out_channels, groups, dropout, eps))
            elif isinstance(block, Upsample2D):
                setattr(parent, name, NearestUpsampleConv(block.conv))
    stack.conv_act = nn.SiLU(inplace=True)
