"""Latents of images as tokens of a language model, and back (Transfusion, arXiv 2408.11039, section 3.2).

Two pairs of layers with one interface: a linear layer of each patch, or the two halves of a U-Net.

Legend: N images, C latent channels, P patch size, n = (H / P) (W / P) tokens of an image in raster order, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D
from torch import Tensor, nn

from hfgen.models.layers.patch import patchify, unpatchify

_NORM_EPS = 1e-5
_LAYERS_PER_BLOCK = 2


@dataclass(frozen=True)
class ImageEmbeddings:
    """Images as tokens, and what the way back needs besides the tokens.

    Attributes:
        hidden_states: (N, n, D).
        grid: rows and columns of tokens.
        time: (N, T), the embedded timesteps.
        skips: feature maps (N, ...) of the U-Net's first half, fine to coarse; none for linear layers.
    """

    hidden_states: Tensor
    grid: tuple[int, int]
    time: Tensor
    skips: tuple[Tensor, ...] = ()

    def repeat(self, times: int) -> ImageEmbeddings:
        """The same images ``times`` times, one after the other, such as for guidance as one batch."""
        return replace(
            self,
            hidden_states=self.hidden_states.repeat(times, 1, 1),
            time=self.time.repeat(times, 1),
            skips=tuple(skip.repeat(times, 1, 1, 1) for skip in self.skips),
        )


class LinearImageIn(nn.Module):
    """The time is added to every patch vector, then comes a linear layer.

    Args:
        latent_channels: C.
        patch_size: P.
        width: D.
    """

    def __init__(self, latent_channels: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(patch_size**2 * latent_channels, width)

    def forward(self, latents: Tensor, time: Tensor) -> ImageEmbeddings:
        """(N, C, H, W) and the time (N, P P C) -> tokens."""
        grid = token_grid(latents, self.patch_size)
        patches = patchify(latents, self.patch_size) + time[:, None]
        return ImageEmbeddings(self.proj(patches), grid, time)


class LinearImageOut(nn.Module):
    """A linear layer of each token, whose outputs are the numbers of a patch.

    Args:
        latent_channels: C.
        patch_size: P.
        width: D.
    """

    def __init__(self, latent_channels: int, patch_size: int, width: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(width, patch_size**2 * latent_channels)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, hidden_states: Tensor, embedded: ImageEmbeddings) -> Tensor:
        """(N, n, D) and what the first half returned -> (N, C, H, W)."""
        return unpatchify(self.proj(hidden_states), self.patch_size, embedded.grid)


class UNetImageIn(nn.Module):
    """The first half of a U-Net: residual blocks at every level, halved sides in between, then a linear layer.

    The time enters every residual block. Normalisation is over all channels and places of an image, without adaption
    to the time.

    Args:
        latent_channels: C.
        channels: of each level, fine to coarse; the last level has one place for each token, so P is
            ``2 ** (len(channels) - 1)``.
        width: D.
        time_dim: T, channels of the embedded time.
    """

    def __init__(self, latent_channels: int, channels: Sequence[int], width: int, time_dim: int):
        super().__init__()
        self.patch_size = 2 ** (len(channels) - 1)
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            DownBlock2D(
                in_channels=channels[max(level - 1, 0)],
                out_channels=channels[level],
                temb_channels=time_dim,
                num_layers=_LAYERS_PER_BLOCK,
                resnet_eps=_NORM_EPS,
                resnet_groups=1,
                add_downsample=level + 1 < len(channels),
            )
            for level in range(len(channels))
        )
        self.proj = nn.Linear(channels[-1], width)

    def forward(self, latents: Tensor, time: Tensor) -> ImageEmbeddings:
        """(N, C, H, W) and the time (N, T) -> tokens."""
        grid = token_grid(latents, self.patch_size)
        features = self.conv_in(latents)
        skips = (features,)
        for block in self.blocks:
            features, outputs = block(features, time)
            skips += outputs
        return ImageEmbeddings(self.proj(features.flatten(2).transpose(1, 2)), grid, time, skips)


class UNetImageOut(nn.Module):
    """The second half of a U-Net: a linear layer, then residual blocks on the features and those of the first half.

    Args:
        latent_channels, channels, width, time_dim: as for :class:`UNetImageIn`.
    """

    def __init__(self, latent_channels: int, channels: Sequence[int], width: int, time_dim: int):
        super().__init__()
        self.proj = nn.Linear(width, channels[-1])
        self.blocks = nn.ModuleList(
            UpBlock2D(
                in_channels=channels[max(level - 1, 0)],
                prev_output_channel=channels[min(level + 1, len(channels) - 1)],
                out_channels=channels[level],
                temb_channels=time_dim,
                num_layers=_LAYERS_PER_BLOCK + 1,
                resnet_eps=_NORM_EPS,
                resnet_groups=1,
                add_upsample=level > 0,
            )
            for level in reversed(range(len(channels)))
        )
        self.norm_out = nn.GroupNorm(1, channels[0], eps=_NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], latent_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, hidden_states: Tensor, embedded: ImageEmbeddings) -> Tensor:
        """(N, n, D) and what the first half returned -> (N, C, H, W)."""
        features = self.proj(hidden_states).transpose(1, 2).unflatten(2, embedded.grid)
        skips = embedded.skips
        for block in self.blocks:
            taken = len(block.resnets)
            features = block(features, skips[-taken:], embedded.time)
            skips = skips[:-taken]
        return self.conv_out(F.silu(self.norm_out(features)))


def token_grid(latents: Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the tokens of latents (N, C, H, W).

    Raises:
        ValueError: sides that the patches do not divide.
    """
    height, width = latents.shape[-2:]
    if height % patch_size or width % patch_size or not height * width:
        raise ValueError(
            f"The latents have the size {height}x{width}, which patches of {patch_size}x{patch_size} do not divide; "
            f"use sides that are multiples of {patch_size}."
        )
    return height // patch_size, width // patch_size
