"""The open implementation of Transfusion, lucidrains/transfusion-pytorch: next tokens and flow matching in one model.

Transfusion (Zhou et al., arXiv 2408.11039) models text and the patches of images in one sequence, causal over the
sequence and bidirectional within an image. The authors released no code. This network follows
github.com/lucidrains/transfusion-pytorch, which differs from the paper in much: it is trained by flow matching, has
any number of modalities with grids of any size and number of axes, writes the grid of an image as text before it, and
modulates the tokens of an image by its time. The transformer of the paper is ``TransfusionTransformer``.

Legend: B sequences, L tokens, V ids of the vocabulary, N images, P patches of all images, D width.

What the implementation relies on: all tokens of an image share one rotary position; adjacent channels are rotated
together; scores are capped at 50; the second half of the layers gets the states of the first half back, last first;
after every layer each token attends its own earlier states; time runs from noise at 0 to data at 1 inside.

Two defects of it are not repeated. Its batched sampling forgets the learned positions of an image. Its path "naive"
adds noise of the time of the first image to every image of a sequence; here each has its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from hfgen.models.layers.axial_positions import AxialPositionEmbed
from hfgen.models.layers.depth_attention import DepthAttention
from hfgen.models.layers.kv_cache import KVCache
from hfgen.models.layers.mixed_sequence import MixedCache, MixedLayout, MixedVocabulary, mixed_layout, slot_id
from hfgen.models.layers.score_unet import FourierFeatures
from hfgen.models.layers.softcap_attention import SoftcapAttention, rotations
from hfgen.models.layers.token_modulation import TokenModulation
from hfgen.models.layers.unit_norm import UnitRMSNorm
from hfgen.models.modeling import HFGenModel

_TIMESTEP_SCALE = 1e-3
_INITIAL_GATE = -2.0


@dataclass
class TransfusionFlowOutput(BaseOutput):
    """What the network predicts.

    Attributes:
        logits: (B, L, V) float32, of the token that follows.
        sample: noise minus data, in the form and layout of the latents that were given: one tensor or a list with one
            for each image; None without images.
    """

    logits: Tensor
    sample: Tensor | list[Tensor] | None = None


class FourierTime(FourierFeatures):
    """A time, and sines and cosines of it at fixed random frequencies."""

    def forward(self, values: Tensor) -> Tensor:
        """(N,) float32 -> (N, 1 + 2 * num_frequencies) float32."""
        angles = values[:, None] * self.frequencies * (2 * torch.pi)
        return torch.cat([values[:, None], angles.sin(), angles.cos()], dim=-1)


class TransfusionFlowBlock(nn.Module):
    """Attention and feed-forward, each modulated token by token, then attention over the layers so far.

    Args:
        width, num_heads, head_dim, ff_dim: sizes.
        has_skip: whether the block gets the input of an earlier one.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, ff_dim: int, has_skip: bool):
        super().__init__()
        self.skip_proj = nn.Linear(2 * width, width, bias=False) if has_skip else None
        self.attn_modulation = TokenModulation(width, 4 * width)
        self.attn = SoftcapAttention(width, num_heads, head_dim)
        self.ff_modulation = TokenModulation(width, 4 * width)
        self.ff = FeedForward(width, inner_dim=ff_dim, activation_fn="geglu")
        self.depth_attn = DepthAttention(width)

    def forward(
        self,
        hidden_states: Tensor,
        skip: Tensor | None,
        earlier: Sequence[Tensor],
        condition: Tensor | None,
        rows: Tensor,
        rotary: Tensor,
        mask: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> the input of the next block, and the output of this one, both (B, L, D).

        Args:
            skip: (B, L, D) for a block that ``has_skip``.
            earlier: the embeddings and the outputs of the blocks before.
            condition: (N, 4 D) of the images, None without any.
            rows: (B, L) int64, 0 for text and 1 + i for the tokens with condition i.
            rotary: (B, L, head_dim / 2) complex64.
            mask: (B, 1, L, M) boolean.
            cache: the sampler's cache; ``layer`` is this block's index in it.
        """
        if self.skip_proj is not None:
            hidden_states = hidden_states + self.skip_proj(torch.cat([hidden_states, skip], dim=-1))
        modulated, gate = self.attn_modulation(hidden_states, condition, rows)
        hidden_states = torch.addcmul(hidden_states, gate, self.attn(modulated, rotary, mask, cache, layer))
        modulated, gate = self.ff_modulation(hidden_states, condition, rows)
        hidden_states = torch.addcmul(hidden_states, gate, self.ff(modulated))
        return self.depth_attn([*earlier, hidden_states]), hidden_states


class TransfusionFlowTransformer(HFGenModel):
    """One transformer over text and any number of continuous modalities.

    Args:
        num_text_tokens: ids of the text tokenizer; those of ``vocabulary`` follow them.
        latent_channels: C of every modality.
        num_axes: axes of the grid of every modality: 1 for sound, 2 for images, 3 for video.
        channel_first: for every modality whether its latents are (C, *grid), as everywhere in hfgen, or (*grid, C).
        has_positions: for every modality whether learned positions on the grid are added to its tokens.
        num_layers, width, num_heads, head_dim: sizes; the implementation's defaults have ``head_dim`` 64.
        ff_dim: width inside the feed-forward; the implementation has 8/3 of the width, rounded down.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransfusionFlowBlock"]
    _repeated_blocks = ["TransfusionFlowBlock"]
    _skip_layerwise_casting_patterns = ["embed", "time_", "norm", "modulation"]
    _keep_in_fp32_modules = ["time_proj"]
    _skip_keys = ["cache", "layout"]

    original_system = "transfusion_pytorch"
    original_part = "transformer"

    @register_to_config
    def __init__(
        self,
        num_text_tokens: int = 256,
        latent_channels: Sequence[int] = (4,),
        num_axes: Sequence[int] = (2,),
        channel_first: Sequence[bool] = (True,),
        has_positions: Sequence[bool] = (False,),
        num_layers: int = 8,
        width: int = 512,
        num_heads: int = 8,
        head_dim: int = 64,
        ff_dim: int = 1365,
    ):
        super().__init__()
        counts = {len(values) for values in (latent_channels, num_axes, channel_first, has_positions)}
        if counts == {0} or len(counts) > 1:
            raise ValueError(
                f"latent_channels={tuple(latent_channels)}, num_axes={tuple(num_axes)}, "
                f"channel_first={tuple(channel_first)} and has_positions={tuple(has_positions)} need one value for "
                "each modality."
            )
        if head_dim % 2 or width % 2:
            raise ValueError(f"head_dim={head_dim} and width={width} must be even.")
        self.vocabulary = MixedVocabulary(num_text_tokens, len(latent_channels))
        self.text_embed = nn.Embedding(self.vocabulary.size, width)
        self.proj_in = nn.ModuleList(
            nn.Identity() if channels == width else nn.Linear(channels, width) for channels in latent_channels
        )
        self.position_embeds = nn.ModuleList(
            AxialPositionEmbed(width, axes) if learned else nn.Identity()
            for axes, learned in zip(num_axes, has_positions)
        )
        self.time_proj = FourierTime(width // 2)
        self.time_embed = nn.Linear(width + 1, 4 * width)
        self.blocks = nn.ModuleList(
            TransfusionFlowBlock(width, num_heads, head_dim, ff_dim, has_skip=2 * layer >= num_layers)
            for layer in range(num_layers)
        )
        self.norm_out = UnitRMSNorm(width)
        self.text_head = nn.Linear(width, self.vocabulary.size, bias=False)
        self.proj_out = nn.ModuleList(nn.Linear(width, channels, bias=False) for channels in latent_channels)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The initialisation of the implementation: images begin with the same small gate in every block."""
        nn.init.normal_(self.time_proj.frequencies)
        for module in self.modules():
            if isinstance(module, TokenModulation):
                nn.init.zeros_(module.image_film.weight)
                nn.init.zeros_(module.image_gate.weight)
                nn.init.constant_(module.image_gate.bias, _INITIAL_GATE)

    def forward(
        self,
        input_ids: Tensor,
        latents: Tensor | Sequence[Tensor] | None = None,
        timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> TransfusionFlowOutput | tuple:
        """What follows each token, and the velocity of each image; whole sequences at once.

        Args:
            input_ids: (B, L) int64 as :func:`hfgen.sampling.mixed_parts.assemble` makes them: ids of
                ``vocabulary``, runs of negative slots for images, and -1 for padding. An image alone, without any
                text, is a sequence too.
            latents: noisy images in order of appearance over the flattened batch: (N, C, *grid) if they are of one
                size, else a list of (C, *grid); channels last where ``channel_first`` is False.
            timesteps: (N,) float from 0, data, to 1000, noise; or (1,) for all images.

        Raises:
            ValueError: ids outside the vocabulary; images of another number, size or number of channels than the
                slots and the configuration ask for; timesteps of another number.
        """
        output = self.extend(self.layout(input_ids), None, latents, timesteps)
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def new_cache(self, batch_size: int, max_length: int) -> MixedCache:
        """An empty cache for ``batch_size`` sequences of at most ``max_length`` tokens, patches included."""
        config, weight = self.config, self.text_embed.weight
        kv = KVCache(
            config.num_layers,
            batch_size,
            max_length,
            config.num_heads,
            config.head_dim,
            dtype=self.dtype,
            device=weight.device,
        )
        is_padding = torch.zeros(batch_size, max_length, dtype=torch.bool, device=weight.device)
        return MixedCache(kv, is_padding, torch.zeros(batch_size, dtype=torch.int64, device=weight.device))

    def layout(self, input_ids: Tensor, cache: MixedCache | None = None) -> MixedLayout:
        """What follows from ids alone, see :func:`hfgen.models.layers.mixed_sequence.mixed_layout`."""
        return mixed_layout(input_ids, self.vocabulary, cache)

    @apply_forward_hook
    def extend(
        self,
        layout: MixedLayout,
        cache: MixedCache | None,
        latents: Tensor | Sequence[Tensor] | None = None,
        timesteps: Tensor | None = None,
        num_logits: int | None = None,
    ) -> TransfusionFlowOutput:
        """As ``forward``, of the tokens of ``layout`` alone, after those in the cache.

        The keys and values are written behind the cache; ``cache.keep(layout)`` keeps them, and without it the next
        call overwrites them, which a step of denoising wants.

        Args:
            layout, cache: of the new tokens and of what comes before; None if nothing does.
            latents, timesteps: of the images among the new tokens.
            num_logits: of how many tokens at the end logits are computed; None is all.
        """
        images = [] if latents is None else list(latents)
        condition, rows = self._embed_times(images, timesteps, layout)
        hidden_states = self.text_embed(layout.ids)
        if images:
            patches = self._embed_images(images, layout)
            flat = hidden_states.flatten(0, 1).index_copy(0, layout.places, patches.to(hidden_states.dtype))
            hidden_states = flat.view_as(hidden_states)
        hidden_states = self._run_blocks(hidden_states, condition, rows, layout, cache)
        begin = 0 if num_logits is None else hidden_states.shape[1] - num_logits
        logits = self.text_head(hidden_states[:, begin:]).float()
        if not images:
            return TransfusionFlowOutput(logits)
        sample = self._read_images(hidden_states.flatten(0, 1)[layout.places], images, layout)
        return TransfusionFlowOutput(logits, torch.stack(sample) if isinstance(latents, Tensor) else sample)

    def grid_of(self, latents: Tensor, modality: int) -> tuple[int, ...]:
        """The grid of the latents of one image.

        Raises:
            ValueError: another number of channels or axes than the modality has, or no such modality.
        """
        if not 0 <= modality < len(self.config.latent_channels):
            raise ValueError(f"There is no modality {modality}; there are {len(self.config.latent_channels)}.")
        channels, axes = self.config.latent_channels[modality], self.config.num_axes[modality]
        first = self.config.channel_first[modality]
        if latents.ndim != axes + 1 or latents.shape[0 if first else -1] != channels:
            expected = f"{axes} axes and {channels} channels, channels {'first' if first else 'last'}"
            raise ValueError(f"Latents of modality {modality} have shape {tuple(latents.shape)}, expected {expected}.")
        return tuple(latents.shape[1:] if first else latents.shape[:-1])

    def slots(self, modality: int, grid: tuple[int, ...]) -> list[int]:
        """What an image holds in a sequence of ids."""
        return [slot_id(modality)] * math.prod(grid)

    def _run_blocks(
        self,
        hidden_states: Tensor,
        condition: Tensor | None,
        rows: Tensor,
        layout: MixedLayout,
        cache: MixedCache | None,
    ) -> Tensor:
        kv = None if cache is None else cache.kv
        rotary = rotations(layout.positions, self.config.head_dim)
        states, skips = [hidden_states], []
        for layer, block in enumerate(self.blocks):
            if layer < len(self.blocks) // 2:
                skips.append(hidden_states)
            skip = skips.pop() if block.skip_proj is not None else None
            arguments = (hidden_states, skip, tuple(states), condition, rows, rotary, layout.mask, kv, layer)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states, output = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states, output = block(*arguments)
            states.append(output)
        return self.norm_out(hidden_states)

    def _embed_times(
        self, images: Sequence[Tensor], timesteps: Tensor | None, layout: MixedLayout
    ) -> tuple[Tensor | None, Tensor]:
        """The conditions (N or 1, 4 D), and for each token which of them it has, 0 for none."""
        if len(images) != len(layout.modalities):
            raise ValueError(f"The ids have slots for {len(layout.modalities)} images, but {len(images)} are given.")
        layout.check_grids([self.grid_of(*pair) for pair in zip(images, layout.modalities)])
        if not images:
            return None, layout.runs
        if timesteps is None or timesteps.shape not in ((len(images),), (1,)):
            given = "missing" if timesteps is None else f"of shape {tuple(timesteps.shape)}"
            raise ValueError(
                f"timesteps are {given}; expected one for each of the {len(images)} images, or one for all."
            )
        waves = self.time_proj(1 - timesteps.float() * _TIMESTEP_SCALE)
        condition = nn.functional.silu(self.time_embed(waves.to(self.time_embed.weight.dtype)))
        return condition, layout.runs.clamp(max=len(timesteps))

    def _embed_images(self, images: Sequence[Tensor], layout: MixedLayout) -> Tensor:
        """(P, D): the patches of all images in order of appearance."""
        embedded: list[Tensor] = [images[0]] * len(images)
        for (modality, _), members in self._alike(images, layout).items():
            latents = torch.stack([images[index] for index in members]).to(self.dtype)
            if self.config.channel_first[modality]:
                latents = latents.movedim(1, -1)
            patches = self.proj_in[modality](latents.flatten(1, -2).contiguous())
            if self.config.has_positions[modality]:
                patches = patches + self.position_embeds[modality](tuple(latents.shape[1:-1])).to(patches.dtype)
            for index, one in zip(members, patches):
                embedded[index] = one
        return torch.cat(embedded)

    def _read_images(self, patches: Tensor, images: Sequence[Tensor], layout: MixedLayout) -> list[Tensor]:
        """(P, D) -> noise minus data, like the images. The network itself predicts data minus noise."""
        pieces = patches.split(layout.lengths)
        sample: list[Tensor] = list(pieces)
        for (modality, shape), members in self._alike(images, layout).items():
            velocity = -self.proj_out[modality](torch.stack([pieces[index] for index in members]))
            if self.config.channel_first[modality]:
                velocity = velocity.movedim(-1, 1)
            for index, one in zip(members, velocity.reshape(-1, *shape)):
                sample[index] = one
        return sample

    def _alike(self, images: Sequence[Tensor], layout: MixedLayout) -> dict[tuple[int, tuple[int, ...]], list[int]]:
        """Indices of the images of each modality and shape, which go through one matrix product."""
        groups = defaultdict(list)
        for index, (image, modality) in enumerate(zip(images, layout.modalities)):
            groups[modality, tuple(image.shape)].append(index)
        return groups
