"""How flow pipelines call the networks that they know: sizes of the latents, names of the condition, units of time.

Every network answers with the velocity ``eps - x0`` at a point of the flow. A condition is a dictionary of keyword
arguments of the network's ``forward``, each with one row per image.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from diffusers.models import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from hfgen.models.generators.dit import DiT
from hfgen.models.generators.ncsnpp import NCSNpp
from hfgen.sampling.flow_paths import even_sigmas

Condition = dict[str, Tensor]
TIME_UNITS = 1000.0  # the timestep of sigma = 1


class FlowNetwork:
    """An unconditional network of images, such as :class:`hfgen.NCSNpp`, and what the others have in common.

    Args:
        transformer: the network.
        guidance_channels: classifier-free guidance acts on so many first channels of the velocity, None is all.

    Attributes:
        takes: the argument of the pipeline that states the condition.
        default_guidance: scale of classifier-free guidance when none is given.
        embeds_guidance: the guidance scale is an input of the network, which was distilled from guided sampling.
        clip_context: CLIP encoders give a sequence beside the pooled vector.
    """

    takes: Literal["prompt", "class_labels", None] = None
    default_guidance = 1.0
    embeds_guidance = False
    clip_context = True

    def __init__(self, transformer: nn.Module, guidance_channels: int | None = None):
        self.transformer = transformer
        self.config = transformer.config
        self.guidance_channels = guidance_channels

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the network; diffusers visits all its modules to tell, which is too much for every pass."""
        return self.transformer.dtype

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.config.in_channels

    @property
    def sample_size(self) -> int:
        """Side of the latents that the network was trained on."""
        return self.config.sample_size

    @property
    def multiple(self) -> int:
        """What the sides of the latents must be divisible by."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    @property
    def max_size(self) -> int | None:
        """The largest side of the latents; None without a limit."""
        return None

    def default_sigmas(self, num_inference_steps: int) -> list[float] | None:
        """The flow times that the network is sampled with, before any shift; None leaves them to the scheduler."""
        return None

    def velocity(self, latents: Tensor, timestep: float, condition: Condition, guidance_scale: float) -> Tensor:
        """(B, C, h, w) float32 at a ``timestep`` in [0, 1000]; the scale is for networks that embed it."""
        steps = torch.full(latents.shape[:1], timestep, device=latents.device, dtype=torch.float32)
        return self._call(latents.to(self.dtype), steps, condition, guidance_scale).float()

    def _call(self, latents: Tensor, timestep: Tensor, condition: Condition, guidance_scale: float) -> Tensor:
        return self.transformer(latents, timestep=timestep, return_dict=False, **condition)[0]


class LabelFlowNetwork(FlowNetwork):
    """:class:`hfgen.DiT` with class labels."""

    takes = "class_labels"
    default_guidance = 4.5

    @property
    def multiple(self) -> int:
        return self.config.patch_size

    def default_sigmas(self, num_inference_steps: int) -> list[float] | None:
        return even_sigmas(num_inference_steps)

    @property
    def num_classes(self) -> int:
        """Classes; the index after the last is the unconditional class."""
        return self.config.num_classes


class PromptFlowNetwork(FlowNetwork):
    """``diffusers.SD3Transformer2DModel``: a sequence of text states and one pooled vector."""

    takes = "prompt"
    default_guidance = 4.5  # of SD3.5 large

    @property
    def multiple(self) -> int:
        return self.config.patch_size

    @property
    def max_size(self) -> int | None:
        return self.config.pos_embed_max_size * self.config.patch_size

    @property
    def context_width(self) -> int:
        """Width of the text states."""
        return self.config.joint_attention_dim

    @property
    def pooled_width(self) -> int:
        """Width of the pooled vector."""
        return self.config.pooled_projection_dim

    def condition(self, context: Tensor, pooled: Tensor) -> Condition:
        """The condition of text states (B, N, context_width) and pooled vectors (B, pooled_width)."""
        return {"encoder_hidden_states": context.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}


class FluxFlowNetwork(PromptFlowNetwork):
    """``diffusers.FluxTransformer2DModel``: patches of 2x2 latents as tokens, CLIP for the pooled vector only."""

    clip_context = False
    multiple = 2
    max_size = None
    sample_size = 128  # of the released networks, whose configuration does not say

    def __init__(self, transformer: nn.Module, guidance_channels: int | None = None):
        super().__init__(transformer, guidance_channels)
        self.embeds_guidance = self.config.guidance_embeds
        self.default_guidance = 3.5 if self.embeds_guidance else 1.0  # dev and schnell

    @property
    def channels(self) -> int:
        return self.config.in_channels // 4

    def default_sigmas(self, num_inference_steps: int) -> list[float] | None:
        return even_sigmas(num_inference_steps)

    def _call(self, latents: Tensor, timestep: Tensor, condition: Condition, guidance_scale: float) -> Tensor:
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        tokens = latents.unflatten(3, (width, 2)).unflatten(2, (height, 2))  # (B, C, h/2, 2, w/2, 2)
        tokens = tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 4 C)
        rows = torch.arange(height, device=latents.device, dtype=tokens.dtype).repeat_interleave(width)
        columns = torch.arange(width, device=latents.device, dtype=tokens.dtype).repeat(height)
        context = condition["encoder_hidden_states"]
        tokens = self.transformer(
            tokens,
            timestep=timestep / TIME_UNITS,  # the network multiplies time and guidance by 1000 itself
            guidance=torch.full_like(timestep, guidance_scale) if self.embeds_guidance else None,
            img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=1),
            txt_ids=torch.zeros(context.shape[1], 3, device=latents.device, dtype=tokens.dtype),
            return_dict=False,
            **condition,
        )[0]
        patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))  # (B, h/2, w/2, C, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


_NETWORKS: dict[type[nn.Module], type[FlowNetwork]] = {
    DiT: LabelFlowNetwork,
    NCSNpp: FlowNetwork,
    SD3Transformer2DModel: PromptFlowNetwork,
    FluxTransformer2DModel: FluxFlowNetwork,
}


def flow_network(transformer: nn.Module, guidance_channels: int | None = None) -> FlowNetwork:
    """How to call ``transformer``, which may be compiled, and how many of its channels are guided.

    Raises:
        ValueError: it is no network that predicts the velocity of a flow.
    """
    module = transformer._orig_mod if is_compiled_module(transformer) else transformer
    network = next((network for kind, network in _NETWORKS.items() if isinstance(module, kind)), None)
    if network is None:
        known = ", ".join(kind.__name__ for kind in _NETWORKS)
        raise ValueError(f"{type(module).__name__} is no flow network that this pipeline calls; it knows {known}.")
    config = module.config
    if config.get("has_duration"):
        raise ValueError("This DiT predicts average velocities over an interval; use MeanFlowPipeline.")
    if network is not FluxFlowNetwork and config.get("out_channels") not in (None, config.in_channels):
        raise ValueError(
            f"The network has {config.in_channels} input and {config.out_channels} output channels, but a velocity "
            "has those of the input; a diffusion with learned variance runs in ImageDiffusionPipeline."
        )
    return network(transformer, guidance_channels)
