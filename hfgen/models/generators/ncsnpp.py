"""NCSN++ and DDPM++, the U-Nets of score SDE (arXiv 2011.13456), with the weights of rectified flow (2209.03003).

They predict the velocity between images and noise. Legend: B batch, C channels, H, W sides of the image.

The network is called as every flow network is, with ``timestep = 1000 sigma``, and answers ``noise - image``. The
released weights count the other way: inside, the time is t = 1 - sigma and the output changes its sign. They also rely
on the network time 999 t with t in [0.001, 1], residual sums divided by the square root of 2, group norms of
min(C / 4, 32) groups, and one attention at the end of a rising level; those of 256 pixels furthermore on Fourier
features of log(999 t), the resampling filter [1, 3, 3, 1], image pyramids at both ends, and outputs divided by 999 t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from hfgen.models.layers.score_unet import (
    DownLevel,
    FourierFeatures,
    ImageAttention,
    PositionalFeatures,
    UpLevel,
    double,
    halve,
    image_norm,
    residual_block,
)
from hfgen.models.modeling import HFGenModel

_FIRST_TIME = 0.999  # network time
_FOURIER_SCALE = 16.0
_OUTPUT_GAIN = 1e-10  # of the layers that end a branch: at the start the network is almost the identity


class NCSNpp(HFGenModel, AttentionMixin):
    """The unconditional flow U-Net of the rectified flow repository.

    Args:
        sample_size: side of the training images in pixels.
        in_channels: channels of the image.
        base_channels: width of the first level.
        channel_multipliers: width of each level over ``base_channels``, from full resolution to the coarsest.
        layers_per_block: residual blocks per level on the way down; one more on the way up.
        attention_levels: levels with attention, 0 is full resolution.
        time_embedding: ``"positional"`` (DDPM++) or ``"fourier"`` (NCSN++).
        resampling: ``"box"``, nearest neighbours and means, or ``"fir"``, the filter [1, 3, 3, 1].
        pyramid: the input image enters every level and the output image is a sum over the levels.
        divide_by_time: the output is divided by 999 t.
        unit_range: the weights were trained with images in [0, 1] (LSUN); the paths between these and the noise are
            rescaled to those of images in [-1, 1], on which the model is called like any other.
        dropout: inside of the residual blocks.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D", "ImageAttention"]
    _repeated_blocks = ["ResnetBlock2D"]
    _skip_layerwise_casting_patterns = ["time_", "norm"]
    _keep_in_fp32_modules = ["time_proj"]

    original_system = "rectified_flow"
    original_part = "transformer"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "cifar10": {},
        "ncsnpp-256": {
            "sample_size": 256,
            "channel_multipliers": (1, 1, 2, 2, 2, 2, 2),
            "layers_per_block": 2,
            "attention_levels": (4,),
            "time_embedding": "fourier",
            "resampling": "fir",
            "pyramid": True,
            "divide_by_time": True,
            "dropout": 0.0,
        },
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 2, 2),
        layers_per_block: int = 4,
        attention_levels: tuple[int, ...] = (1,),
        time_embedding: Literal["positional", "fourier"] = "positional",
        resampling: Literal["box", "fir"] = "box",
        pyramid: bool = False,
        divide_by_time: bool = False,
        unit_range: bool = False,
        dropout: float = 0.15,
    ):
        super().__init__()
        if time_embedding not in ("positional", "fourier"):
            raise ValueError(f"time_embedding={time_embedding!r}; choose 'positional' or 'fourier'.")
        if resampling not in ("box", "fir"):
            raise ValueError(f"resampling={resampling!r}; choose 'box' or 'fir'.")
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        deepest = len(widths) - 1
        image_channels = in_channels if pyramid else None
        temb_channels = 4 * base_channels
        block = partial(residual_block, temb_channels=temb_channels, dropout=dropout, fir=resampling == "fir")

        fourier = time_embedding == "fourier"
        self.time_proj = FourierFeatures(base_channels) if fourier else PositionalFeatures(base_channels)
        self.time_embed = TimestepEmbedding(base_channels * (1 + fourier), temb_channels)
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)

        self.down_levels, self.up_levels = nn.ModuleList(), nn.ModuleList()
        skips, channels = [base_channels], base_channels
        for level, width in enumerate(widths):
            level_widths = [channels] + [width] * layers_per_block
            self.down_levels.append(
                DownLevel(block, level_widths, level in attention_levels, level == deepest, image_channels)
            )
            skips += [width] * (layers_per_block + (level != deepest))
            channels = width
        self.mid_resnet_1 = block(channels, channels)
        self.mid_attention = ImageAttention(channels)
        self.mid_resnet_2 = block(channels, channels)
        for level, width in reversed(list(enumerate(widths))):
            level_skips = [skips.pop() for _ in range(layers_per_block + 1)]
            self.up_levels.append(
                UpLevel(block, channels, width, level_skips, level in attention_levels, level == 0, image_channels)
            )
            channels = width
        self.norm_out = None if pyramid else image_norm(channels)
        self.conv_out = None if pyramid else nn.Conv2d(channels, in_channels, 3, padding=1)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Uniform by the mean of fan-in and fan-out, almost zero for the layers that end a branch; biases 0."""
        ends = [module for name, module in self.named_modules() if name.endswith(("conv2", "to_out.0", "conv_out"))]
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(_OUTPUT_GAIN) if module in ends else 1.0)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ImageAttention):
                for part in (module.attn.to_q, module.attn.to_k, module.attn.to_v):
                    nn.init.xavier_uniform_(part.weight, gain=math.sqrt(0.1))
            elif isinstance(module, FourierFeatures):
                nn.init.normal_(module.frequencies, std=_FOURIER_SCALE)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """The velocity at a point of the flow.

        Args:
            hidden_states: (B, in_channels, H, W), x = (1 - sigma) image + sigma noise with images in [-1, 1]; H and W
                must be multiples of 2^(levels - 1).
            timestep: (B,) 1000 sigma in [0, 1000]. Above 999 it counts as 999, the largest of the training.
            return_dict: whether to return a ``UNet2DOutput`` or a tuple.

        Returns:
            ``sample``: noise - image, like ``hidden_states``.
        """
        factor = 2 ** (len(self.down_levels) - 1)
        if any(side % factor for side in hidden_states.shape[2:]):
            raise ValueError(f"Sides {tuple(hidden_states.shape[2:])} must be multiples of {factor}.")
        hidden_states = hidden_states.to(self.dtype)
        if self.config.unit_range:
            velocity = self._unit_range_velocity(hidden_states, timestep)
        else:
            # 1000 - timestep is exact where the network is most sensitive, at the first steps of sampling.
            velocity = -self._network(hidden_states, (1000 - timestep) * 0.999)
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)

    def _unit_range_velocity(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        """The velocity on the path of images in [-1, 1], from that of the path of the same ratio of image to noise.

        With images u = (x0 + 1) / 2, the point y = t u + (1 - t) noise has this ratio at t = 2 (1 - s) / (2 - s).
        """
        signal = ((1000 - timestep).float() * 1e-3)[:, None, None, None]  # 1 - s
        total = 1 + signal  # 2 - s
        point = (hidden_states + signal) / total
        output = self._network((2 * point - 1).to(hidden_states.dtype), 999 * (2 * signal / total).flatten())
        return ((1 - 2 * output - hidden_states) / total).to(hidden_states.dtype)

    def _network(self, hidden_states: Tensor, time: Tensor) -> Tensor:
        """What the weights were trained to be: the velocity image - noise, at the network times 999 t (B,)."""
        fir = self.config.resampling == "fir"
        time = time.float().clamp(min=_FIRST_TIME)
        temb = self.time_embed(self.time_proj(time).to(hidden_states.dtype))
        image = hidden_states
        skips = [self.conv_in(hidden_states)]
        for level in self.down_levels:
            for index, resnet in enumerate(level.resnets):
                hidden_states = self._run(resnet, skips[-1], temb)
                if level.attentions:
                    hidden_states = self._run(level.attentions[index], hidden_states)
                skips.append(hidden_states)
            if level.downsampler is not None:
                hidden_states = self._run(level.downsampler, skips[-1], temb)
                if level.combiner is not None:
                    image = halve(image, fir)
                    hidden_states = hidden_states + level.combiner(image)
                skips.append(hidden_states)

        hidden_states = self._run(self.mid_resnet_1, skips[-1], temb)
        hidden_states = self._run(self.mid_attention, hidden_states)
        hidden_states = self._run(self.mid_resnet_2, hidden_states, temb)

        output = None
        for level in self.up_levels:
            for resnet in level.resnets:
                hidden_states = self._run(resnet, torch.cat([hidden_states, skips.pop()], dim=1), temb)
            if level.attention is not None:
                hidden_states = self._run(level.attention, hidden_states)
            if level.conv_out is not None:
                part = level.conv_out(F.silu(level.norm_out(hidden_states)))
                output = part if output is None else double(output, fir) + part
            if level.upsampler is not None:
                hidden_states = self._run(level.upsampler, hidden_states, temb)
        if self.conv_out is not None:
            output = self.conv_out(F.silu(self.norm_out(hidden_states)))
        if self.config.divide_by_time:
            output = output / time[:, None, None, None].to(output.dtype)
        return output

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
