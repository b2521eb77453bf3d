"""Layers of the U-Nets of score SDE (Song et al., arXiv 2011.13456), which :class:`hfgen.NCSNpp` puts together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import downsample_2d
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import upsample_2d
from torch import Tensor, nn

from hfgen.models.layers.attention import SelfAttention

_EPSILON = 1e-6
_FIR = (1, 3, 3, 1)


def halve(image: Tensor, fir: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
    return downsample_2d(image, _FIR) if fir else F.avg_pool2d(image, 2)


def double(image: Tensor, fir: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
    return upsample_2d(image, _FIR) if fir else F.interpolate(image, scale_factor=2.0)


def _num_groups(channels: int) -> int:
    groups = min(channels // 4, 32)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"A layer of {channels} channels does not split into min(C / 4, 32) groups: base_channels must be a "
            "multiple of 4, and of 32 if a layer, or two that are joined, have more than 128."
        )
    return groups


def image_norm(channels: int) -> nn.GroupNorm:
    """The normalisation of all layers."""
    return nn.GroupNorm(_num_groups(channels), channels, eps=_EPSILON)


def residual_block(
    in_channels: int,
    out_channels: int,
    temb_channels: int,
    dropout: float,
    fir: bool,
    *,
    up: bool = False,
    down: bool = False,
) -> ResnetBlock2D:
    """The residual block, with the time embedding, of which one may halve or double the side.

    Args:
        in_channels, out_channels, temb_channels: widths of the input, the output and the time embedding.
        dropout: before the last convolution.
        fir: resample with the filter [1, 3, 3, 1] instead of nearest neighbours and means.
        up, down: whether the block doubles or halves the side.
    """
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=temb_channels,
        dropout=dropout,
        groups=_num_groups(in_channels),
        groups_out=_num_groups(out_channels),
        eps=_EPSILON,
        output_scale_factor=math.sqrt(2),
        use_in_shortcut=in_channels != out_channels or up or down,
        kernel="fir" if fir else "sde_vp",
        up=up,
        down=down,
    )


class PositionalFeatures(nn.Module):
    """Sine and cosine of a number at frequencies from 1 to 1/10000.

    Args:
        width: twice the number of frequencies.
    """

    def __init__(self, width: int):
        super().__init__()
        self.num_frequencies = width // 2

    def forward(self, values: Tensor) -> Tensor:
        """(B,) float32 -> (B, width) float32."""
        # In diffusers' Timesteps the exponents are rounded differently, which 999 t makes 1e-4 of an angle.
        indices = torch.arange(self.num_frequencies, dtype=torch.float32, device=values.device)
        angles = values[:, None] * torch.exp(indices * -(math.log(10000) / (self.num_frequencies - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class FourierFeatures(nn.Module):
    """Sine and cosine of the logarithm of a positive number, at fixed random frequencies.

    Args:
        num_frequencies: how many there are.
    """

    def __init__(self, num_frequencies: int):
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(num_frequencies, dtype=torch.float32))

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierFeatures:
        # The frequencies move with the model but stay float32: rounded to half precision, the angles would be noise.
        def moved(tensor: Tensor) -> Tensor:
            result = function(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def forward(self, values: Tensor) -> Tensor:
        """(B,) float32 -> (B, 2 * num_frequencies) float32."""
        angles = values.log()[:, None] * self.frequencies * 2 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ImageAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with the rescaled residual sum.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norm = image_norm(channels)
        self.attn = SelfAttention(channels, num_heads=1, head_dim=channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        tokens = self.norm(hidden_states).flatten(2).transpose(1, 2)  # (B, H * W, C)
        attended = self.attn(tokens).transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return (hidden_states + attended) / math.sqrt(2)


class DownLevel(nn.Module):
    """The layers of one level on the way down, which :class:`NCSNpp` calls.

    Args:
        block: makes a residual block of (in_channels, out_channels).
        widths: channels before the first residual block and after each of them.
        attention: whether attention follows each of them.
        last: whether this is the coarsest level; others end with a block that halves the side.
        image_channels: channels of the image, whose projection is added to the output of that block; None: it is not.
    """

    def __init__(
        self,
        block: Callable[..., ResnetBlock2D],
        widths: Sequence[int],
        attention: bool,
        last: bool,
        image_channels: int | None,
    ):
        super().__init__()
        width = widths[-1]
        self.resnets = nn.ModuleList(block(*pair) for pair in zip(widths, widths[1:]))
        self.attentions = nn.ModuleList(ImageAttention(width) for _ in self.resnets if attention)
        self.downsampler = None if last else block(width, width, down=True)
        self.combiner = None if last or image_channels is None else nn.Conv2d(image_channels, width, 1)


class UpLevel(nn.Module):
    """The layers of one level on the way up, which :class:`NCSNpp` calls.

    Args:
        block: makes a residual block of (in_channels, out_channels).
        in_channels: of the first residual block, before a skip is joined to its input.
        width: channels after each residual block.
        skips: channels of the skip that each of them takes.
        attention: whether attention follows the last of them.
        last: whether this is the finest level; others end with a block that doubles the side.
        image_channels: channels of the image, to which the level adds its part; None: it does not.
    """

    def __init__(
        self,
        block: Callable[..., ResnetBlock2D],
        in_channels: int,
        width: int,
        skips: Sequence[int],
        attention: bool,
        last: bool,
        image_channels: int | None,
    ):
        super().__init__()
        inputs = [in_channels] + [width] * (len(skips) - 1)
        self.resnets = nn.ModuleList(block(one + other, width) for one, other in zip(inputs, skips))
        self.attention = ImageAttention(width) if attention else None
        self.norm_out = None if image_channels is None else image_norm(width)
        self.conv_out = None if image_channels is None else nn.Conv2d(width, image_channels, 3, padding=1)
        self.upsampler = None if last else block(width, width, up=True)
