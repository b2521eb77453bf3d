"""DiT, SiT and MeanFlow: one class-conditional transformer on patches of latents or pixels.

DiT (Peebles and Xie, arXiv 2212.09748) predicts the noise of a diffusion and its variance, SiT (Ma et al., arXiv
2401.08740) the velocity of an interpolant, MeanFlow (Geng et al., arXiv 2505.13447) the average velocity over an
interval, whose length is a second time. Time and class modulate every block (adaLN-Zero).

Legend: B batch, C channels, P patch size, N patches, D width.

What the released weights rely on: fixed sine-cosine positions, column first; time frequencies 10000^(-i/128), cosines
first; LayerNorm without affine parameters and epsilon 1e-6; tanh-approximated GELU; modulation chunks ordered shift,
scale, gate of the attention, then of the MLP; channels last in the vector of a patch. SiT's time runs from noise at 0
to data at 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from hfgen.models.layers.activations import TanhGELU
from hfgen.models.layers.attention import SelfAttention
from hfgen.models.layers.embeddings import SinCosPositionEmbed, TimeEmbed
from hfgen.models.layers.modulation import AdaLNModulation, modulated_norm
from hfgen.models.layers.patch import PatchEmbed, unpatchify
from hfgen.models.modeling import HFGenModel

_NORM_EPS = 1e-6

# Published sizes: layers, width, heads. M is MeanFlow's.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "M": (16, 1024, 16), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
DIT_PATCH_SIZES = (2, 4, 8)


def _presets() -> dict[str, dict[str, Any]]:
    """The published sizes, such as "XL/2", and those with released weights as their method needs them."""
    sizes = {
        f"{size}/{patch_size}": {
            "patch_size": patch_size,
            "num_layers": num_layers,
            "width": width,
            "num_heads": num_heads,
        }
        for size, (num_layers, width, num_heads) in DIT_SIZES.items()
        for patch_size in DIT_PATCH_SIZES
    }
    return sizes | {
        "DiT-XL/2-256": sizes["XL/2"] | {"out_channels": 8},
        "DiT-XL/2-512": sizes["XL/2"] | {"out_channels": 8, "sample_size": 64},
        "SiT-XL/2-256": sizes["XL/2"] | {"timestep_scale": 1e-3, "reverse_time": True},
        "MeanFlow-B/4": sizes["B/4"] | {"has_duration": True},
    }


class DiTBlock(nn.Module):
    """A transformer block whose two branches are modulated and gated by the condition.

    Args:
        width, num_heads, mlp_ratio: sizes.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.modulation = AdaLNModulation(width, width, 6)
        self.attn = SelfAttention(width, num_heads, width // num_heads)
        inner_dim = int(width * mlp_ratio)
        self.ff = FeedForward(width, inner_dim=inner_dim, activation_fn="gelu-approximate")
        self.ff.net[0] = TanhGELU(width, inner_dim)

    def forward(self, hidden_states: Tensor, condition: Tensor) -> Tensor:
        """(B, N, D) and the condition (B, D) -> (B, N, D)."""
        modulation = self.modulation(condition).unsqueeze(2)  # (B, 6, 1, D)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unbind(1)
        normed = modulated_norm(hidden_states, scale_attn, shift_attn, _NORM_EPS)
        hidden_states = torch.addcmul(hidden_states, gate_attn, self.attn(normed))
        normed = modulated_norm(hidden_states, scale_ff, shift_ff, _NORM_EPS)
        return torch.addcmul(hidden_states, gate_ff, self.ff(normed))


class DiT(HFGenModel, AttentionMixin):
    """The DiT transformer.

    Args:
        sample_size: side of the latents or pixels that it is trained on; others are possible.
        patch_size: P.
        in_channels: C.
        out_channels: channels of the output, ``in_channels`` by default; DiT has twice as many, noise and variance.
        num_classes: classes; index ``num_classes`` is the unconditional class.
        num_layers, width, num_heads, mlp_ratio: sizes.
        timestep_scale: the network's time is the timestep times this: 1 for the integer steps of DiT and the times in
            [0, 1] of MeanFlow; networks in a flow pipeline are called with 1000 sigma.
        reverse_time: the weights have 0 for noise and 1 for data, and predict data minus noise (SiT). The class turns
            time and output, so that it is called like every other flow network.
        has_duration: the network predicts the average velocity over an interval and also gets its length (MeanFlow).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DiTBlock"]
    _repeated_blocks = ["DiTBlock"]
    _skip_layerwise_casting_patterns = ["embed", "modulation", "norm"]

    original_system = "dit"
    original_part = "transformer"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = _presets()

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_classes: int = 1000,
        num_layers: int = 28,
        width: int = 1152,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        timestep_scale: float = 1.0,
        reverse_time: bool = False,
        has_duration: bool = False,
    ):
        super().__init__()
        if width % num_heads or width % 4:
            raise ValueError(f"width={width} must be a multiple of num_heads={num_heads} and of 4.")
        if sample_size % patch_size or sample_size < patch_size:
            raise ValueError(f"sample_size={sample_size} must be a multiple of patch_size={patch_size}.")
        self.out_channels = in_channels if out_channels is None else out_channels
        self.patch_embed = PatchEmbed(in_channels, width, patch_size)
        self.position_embed = SinCosPositionEmbed(width, sample_size // patch_size)
        self.time_embed = TimeEmbed(width)
        if has_duration:
            self.duration_embed = TimeEmbed(width)
        self.class_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads, mlp_ratio) for _ in range(num_layers))
        self.norm_out = AdaLNModulation(width, width, 2)
        self.proj_out = nn.Linear(width, patch_size**2 * self.out_channels)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation: every block starts as the identity, the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        width = self.config.width
        for block in self.blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                # Xavier's bound for the fused projection (3 D, D) of the published network.
                nn.init.uniform_(projection.weight, -((1.5 / width) ** 0.5), (1.5 / width) ** 0.5)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        times = [self.time_embed, self.duration_embed] if self.config.has_duration else [self.time_embed]
        for table in (self.class_embed, *(layer for time in times for layer in (time.linear_1, time.linear_2))):
            nn.init.normal_(table.weight, std=0.02)
        for layer in (*(block.modulation.linear for block in self.blocks), self.norm_out.linear, self.proj_out):
            nn.init.zeros_(layer.weight)

    @property
    def unconditional_label(self) -> int:
        """The label without a class."""
        return self.config.num_classes

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        duration: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """What the network predicts of noisy latents.

        Args:
            hidden_states: (B, C, H, W) of any float dtype; the patches divide H and W.
            timestep: (B,) float or int; what it means is said by ``timestep_scale``.
            class_labels: (B,) int64 in [0, num_classes]; ``num_classes`` is the unconditional class.
            duration: (B,) float, length of the interval that ends at ``timestep`` on its scale; for a network with
                ``has_duration`` only.

        Returns:
            ``sample`` (B, out_channels, H, W) in the dtype of the model.

        Raises:
            ValueError: another number of channels, timesteps or labels; sides that the patches do not divide; a
                missing or unexpected duration.
        """
        self._check_inputs(hidden_states, timestep, class_labels, duration)
        patch_size = self.config.patch_size
        grid = (hidden_states.shape[-2] // patch_size, hidden_states.shape[-1] // patch_size)
        tokens = self.patch_embed(hidden_states.to(self.patch_embed.proj.weight.dtype))
        tokens = tokens + self.position_embed(grid).to(tokens.dtype)
        condition = self._embed_condition(timestep, class_labels, duration)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition)
            else:
                tokens = block(tokens, condition)
        shift, scale = self.norm_out(condition).unsqueeze(2).unbind(1)
        sample = unpatchify(self.proj_out(modulated_norm(tokens, scale, shift, _NORM_EPS)), patch_size, grid)
        if self.config.reverse_time:
            sample = -sample
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def _embed_condition(self, timestep: Tensor, class_labels: Tensor, duration: Tensor | None) -> Tensor:
        """(B, D): the sum of the embeddings of time, duration and class."""
        time = timestep.float() * self.config.timestep_scale
        condition = self.time_embed(1 - time if self.config.reverse_time else time)
        if duration is not None:
            condition = condition + self.duration_embed(duration.float() * self.config.timestep_scale)
        return condition + self.class_embed(class_labels)

    def _check_inputs(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor, duration: Tensor | None
    ) -> None:
        channels = self.config.in_channels
        if hidden_states.ndim != 4 or hidden_states.shape[1] != channels:
            raise ValueError(
                f"hidden_states have shape {tuple(hidden_states.shape)}, expected (batch, {channels}, height, width)."
            )
        if (duration is not None) != self.config.has_duration:
            raise ValueError(
                "This network has no second time: leave duration out."
                if duration is not None
                else "This network predicts the average velocity over an interval: give its length as duration."
            )
        for name, value in (("timestep", timestep), ("class_labels", class_labels), ("duration", duration)):
            if value is not None and value.shape != hidden_states.shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, expected one value for each of the "
                    f"{len(hidden_states)} rows of hidden_states."
                )
