"""The convolutional encoder and decoder of VQGAN, built from the diffusers blocks.

The layout of Esser et al. 2021 (arXiv 2012.09841, appendix table 7): residual blocks at falling resolution,
single-head self-attention after every block of the coarsest level and between the two middle blocks. VAR, LlamaGen,
RQ-VAE and the latent diffusion autoencoders share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


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
    """Set what the diffusers stacks have no argument for: dropout, and activations in place.

    Each activation follows a normalisation whose output nothing else reads. At full resolution a second buffer of that
    size costs a CPU as much time as the activation itself.
    """
    for block in stack.modules():
        if isinstance(block, ResnetBlock2D):
            block.dropout.p = dropout
            block.nonlinearity = nn.SiLU(inplace=True)
    stack.conv_act = nn.SiLU(inplace=True)
