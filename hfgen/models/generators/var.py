"""VAR: class-conditional next-scale prediction (Tian et al., arXiv 2404.02905).

An image is K token maps of growing size p_1 < ... < p_K, the codes of a multi-scale residual VQ-VAE. The transformer
predicts all tokens of a scale at once, given the earlier scales: p(r_1..r_K) = prod_k p(r_k | r_<k, class), eq. 7. Its
input for scale k is not a code embedding but the reconstruction of the latents so far, resized to p_k x p_k.

Legend: B batch, L = sum p_k^2 tokens, C width, V codes, S tokens of one scale.

What the released weights rely on: queries and keys of unit length with a learned temperature per head clamped at 100
(or, without it, a softmax scale of 0.25/sqrt(head_dim)); a key projection without bias; tanh-approximated GELU;
modulation chunks ordered gate, gate, scale, scale, shift, shift (attention first); the head takes scale, shift.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from hfgen.models.layers.activations import TanhGELU
from hfgen.models.layers.attention import CosineSelfAttention, SelfAttention
from hfgen.models.layers.drop_path import drop_path
from hfgen.models.layers.kv_cache import KVCache
from hfgen.models.layers.modulation import AdaLNModulation, modulated_norm
from hfgen.models.modeling import GeneratorOutput, HFGenModel

PATCH_NUMS_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _preset(depth: int, **changes: Any) -> dict[str, Any]:
    """The published rule: width 64 * depth, heads = depth."""
    return {"num_layers": depth, "num_attention_heads": depth, "drop_path": 0.1 * depth / 24} | changes


class VARCache:
    """What the sampler keeps between the scales of one call: keys, values, and the modulations of blocks and head.

    The condition of an image is the same at every scale, so its modulation is computed once, and only once for all
    images of a class.

    Args:
        kv: the keys and values.
        rows: (B,) int64, the row of the condition (distinct classes, C) that each sequence of the batch uses.
        num_layers: number of blocks.
    """

    def __init__(self, kv: KVCache, rows: Tensor, num_layers: int):
        self.kv = kv
        self.rows = rows
        self.modulations: list[Tensor | None] = [None] * num_layers
        self.head_modulation: Tensor | None = None


class VARBlock(nn.Module):
    """A transformer block whose two branches are modulated and gated by the class.

    Args:
        hidden_size, num_heads, head_dim, mlp_ratio: sizes.
        shared_modulation: the block adds a learned table to a modulation computed once for the whole model, instead
            of computing its own.
        l2_norm: cosine attention.
        drop_path: probability of dropping a residual branch in training.
        norm_eps: of both normalisations.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        mlp_ratio: float,
        shared_modulation: bool,
        l2_norm: bool,
        drop_path: float,
        norm_eps: float,
    ):
        super().__init__()
        self.norm_eps = norm_eps
        self.drop_path = drop_path
        if l2_norm:
            self.attn = CosineSelfAttention(hidden_size, num_heads, head_dim, key_bias=False)
        else:
            self.attn = SelfAttention(
                hidden_size, num_heads, head_dim, key_bias=False, scale=0.25 / math.sqrt(head_dim)
            )
        inner_dim = round(hidden_size * mlp_ratio)
        self.ff = FeedForward(hidden_size, inner_dim=inner_dim, activation_fn="gelu-approximate")
        self.ff.net[0] = TanhGELU(hidden_size, inner_dim)
        if shared_modulation:
            self.modulation_table = nn.Parameter(torch.randn(1, 6, hidden_size) / math.sqrt(hidden_size))
        else:
            self.modulation = AdaLNModulation(hidden_size, hidden_size, 6)
        self.shared_modulation = shared_modulation

    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor,
        attention_mask: Tensor | None = None,
        cache: VARCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C).

        Args:
            condition: (B, C) class embeddings, or (B, 6, C) when the modulation is shared; with a cache one row per
                distinct class, read only while the cache has no modulation.
            attention_mask: boolean (1, 1, N, N), None attends everything.
            cache: the sampler's cache; ``layer`` is this block's index in it.
        """
        modulation = None if cache is None else cache.modulations[layer]
        if modulation is None:
            modulation = condition + self.modulation_table if self.shared_modulation else self.modulation(condition)
            modulation = modulation.to(hidden_states.dtype)
            if cache is not None:
                modulation = cache.modulations[layer] = modulation[cache.rows]
        gate_attn, gate_ff, scale_attn, scale_ff, shift_attn, shift_ff = modulation.unsqueeze(2).unbind(1)  # (B, 1, C)

        normed = modulated_norm(hidden_states, scale_attn, shift_attn, self.norm_eps)
        attended = self.attn(normed, attention_mask, None if cache is None else cache.kv, layer)
        hidden_states = torch.addcmul(hidden_states, gate_attn, drop_path(attended, self.drop_path, self.training))
        normed = modulated_norm(hidden_states, scale_ff, shift_ff, self.norm_eps)
        return torch.addcmul(hidden_states, gate_ff, drop_path(self.ff(normed), self.drop_path, self.training))


class VARTransformer(HFGenModel, AttentionMixin):
    """The VAR transformer.

    Args:
        num_codes: codebook size V of the tokenizer.
        code_dim: channels of the tokenizer's latents.
        num_classes: classes; index ``num_classes`` is the unconditional class.
        num_layers, num_attention_heads, attention_head_dim, mlp_ratio: sizes; the width is heads * head_dim.
        patch_nums: sides p_1..p_K of the token maps; the tokenizer must have the same.
        shared_modulation: one modulation layer for all blocks (the published 512-pixel model).
        l2_norm_attention: cosine attention with a learned temperature per head (all released weights).
        class_dropout: probability with which training replaces a label by the unconditional class.
        drop_path: stochastic depth of the last block, growing linearly from 0.
        norm_eps: of every normalisation.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # the tables are read outside of any submodule's forward
    _no_split_modules = ["VARBlock"]
    _repeated_blocks = ["VARBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "modulation"]
    _skip_keys = ["cache"]

    original_system = "var"
    original_part = "transformer"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "var-d12": _preset(12),
        "var-d16": _preset(16),
        "var-d20": _preset(20),
        "var-d24": _preset(24),
        "var-d30": _preset(30),
        "var-d36": _preset(36, patch_nums=PATCH_NUMS_512, shared_modulation=True),
    }

    @register_to_config
    def __init__(
        self,
        num_codes: int = 4096,
        code_dim: int = 32,
        num_classes: int = 1000,
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        patch_nums: Sequence[int] = PATCH_NUMS_256,
        shared_modulation: bool = False,
        l2_norm_attention: bool = True,
        class_dropout: float = 0.1,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        patch_nums = tuple(patch_nums)
        if not patch_nums or any(a >= b for a, b in zip(patch_nums, patch_nums[1:])) or patch_nums[0] < 1:
            raise ValueError(f"patch_nums must be increasing positive integers, got {patch_nums}.")
        hidden_size = num_attention_heads * attention_head_dim
        self.scale_lengths = tuple(side**2 for side in patch_nums)
        num_tokens = sum(self.scale_lengths)

        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.input_proj = nn.Linear(code_dim, hidden_size)
        self.start_embed = nn.Parameter(torch.empty(1, self.scale_lengths[0], hidden_size))
        self.position_embed = nn.Parameter(torch.empty(1, num_tokens, hidden_size))
        self.scale_embed = nn.Embedding(len(patch_nums), hidden_size)
        if shared_modulation:
            self.modulation = AdaLNModulation(hidden_size, hidden_size, 6)
        last = max(num_layers - 1, 1)
        self.blocks = nn.ModuleList(
            VARBlock(
                hidden_size,
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                shared_modulation,
                l2_norm_attention,
                drop_path * index / last,
                norm_eps,
            )
            for index in range(num_layers)
        )
        self.norm_out = AdaLNModulation(hidden_size, hidden_size, 2)
        self.proj_out = nn.Linear(hidden_size, num_codes)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, gate_gain: float = 1e-3) -> None:
        """The published initialisation; ``gate_gain`` is 1e-3 up to d20, 1e-4 for d24, 1e-5 for d30, 5e-6 for d36."""
        width = self.class_embed.embedding_dim
        std = math.sqrt(1 / (3 * width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.start_embed, self.position_embed):
            nn.init.trunc_normal_(table, std=std)
        self.proj_out.weight.mul_(0.02)
        self.norm_out.linear.weight.mul_(0.5)
        for block in self.blocks:
            block.attn.to_out[0].weight.div_(math.sqrt(2 * len(self.blocks)))
            block.ff.net[2].weight.div_(math.sqrt(2 * len(self.blocks)))
            if block.shared_modulation:
                nn.init.normal_(block.modulation_table, std=1 / math.sqrt(width))
                gates, others = block.modulation_table[:, :2], block.modulation_table[:, 2:]
            else:
                weight = block.modulation.linear.weight
                gates, others = weight[: 2 * width], weight[2 * width :]
            gates.mul_(gate_gain)
            others.mul_(0.5)

    @property
    def patch_nums(self) -> tuple[int, ...]:
        return tuple(self.config.patch_nums)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image over all scales."""
        return sum(self.scale_lengths)

    def attention_mask(self, num_scales: int, device: torch.device | str | None = None) -> Tensor:
        """(1, 1, N, N) boolean for the first ``num_scales`` scales: a token sees its own scale and earlier ones."""
        scale_of = self._scale_of(num_scales, device or self.position_embed.device)
        return (scale_of[:, None] >= scale_of[None, :])[None, None]

    def _scale_of(self, num_scales: int, device: torch.device | str) -> Tensor:
        lengths = self.scale_lengths[:num_scales]
        repeats = torch.tensor(lengths, device=device)
        return torch.arange(num_scales, device=device).repeat_interleave(repeats, output_size=sum(lengths))

    @apply_forward_hook
    def new_cache(self, class_labels: Tensor) -> tuple[VARCache, Tensor]:
        """What :meth:`forward_scale` needs for a batch of sequences with these labels.

        Args:
            class_labels: (B,) int64 in [0, num_classes].

        Returns:
            An empty cache, and the class embeddings (distinct classes, C) that its rows point to.
        """
        classes, rows = torch.unique(class_labels, return_inverse=True)
        condition = self.class_embed(classes)
        attention = self.blocks[0].attn
        kv = KVCache(
            len(self.blocks),
            len(class_labels),
            self.num_tokens,
            attention.heads,
            attention.head_dim,
            dtype=condition.dtype,
            device=condition.device,
        )
        return VARCache(kv, rows, len(self.blocks)), condition

    @apply_forward_hook
    def forward_scale(
        self,
        latents: Tensor | None,
        condition: Tensor,
        cache: VARCache,
        scale: int,
        num_logit_rows: int,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The logits of one scale, given the earlier ones in the cache.

        Args:
            latents: (n, code_dim, p_k, p_k), the latents of n images so far resized to this scale; None at the first.
                The batch of the cache is a multiple of n: with guidance the same images come twice.
            condition, cache: from :meth:`new_cache`.
            scale: index of the scale, in order from 0.
            num_logit_rows: logits are computed for this many leading sequences of the batch only (the others, such as
                the unconditional half while guidance is off, still fill the cache).
            guidance_scale: w; if it is not 1, as many rows follow, with the unconditional class, to guide away from.

        Returns:
            (num_logit_rows, S, num_codes) float32, guided.
        """
        start = sum(self.scale_lengths[:scale])
        tables = self.position_embed[:, start : start + self.scale_lengths[scale]] + self.scale_embed.weight[scale]
        if scale == 0:
            hidden_states = condition[cache.rows, None] + (self.start_embed + tables)
        else:
            inputs = latents.flatten(2).transpose(1, 2).to(tables.dtype)  # (n, S, code_dim)
            hidden_states = (self.input_proj(inputs) + tables).repeat(len(cache.rows) // len(latents), 1, 1)
        block_condition = condition
        if self.config.shared_modulation and cache.modulations[0] is None:
            block_condition = self.modulation(condition)
        for layer, block in enumerate(self.blocks):
            hidden_states = block(hidden_states, block_condition, None, cache=cache, layer=layer)
        cache.kv.advance(self.scale_lengths[scale])
        if cache.head_modulation is None:
            cache.head_modulation = self.norm_out(condition)[cache.rows]
        if guidance_scale == 1:
            return self.proj_out(self._normed(hidden_states[:num_logit_rows], cache.head_modulation)).float()
        # The head is affine and the weights of both halves sum to 1, so guide what it reads: half the products.
        normed = self._normed(hidden_states[: 2 * num_logit_rows], cache.head_modulation)
        conditional, unconditional = normed.float().chunk(2)
        return self.proj_out(unconditional.lerp(conditional, guidance_scale).to(normed.dtype)).float()

    def _normed(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        """What the head reads, of the leading sequences that ``modulation`` (B, 2, D) is for."""
        scale, shift = modulation[: len(hidden_states)].unsqueeze(2).unbind(1)
        return modulated_norm(hidden_states, scale, shift, self.config.norm_eps)

    def forward(
        self, latents: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> GeneratorOutput | tuple[Tensor]:
        """Logits of all scales at once under teacher forcing.

        Args:
            latents: (B, N - p_1^2, code_dim), the tokenizer's ``quantizer.generator_inputs`` of the true codes: for
                each scale after the first, the reconstruction from the earlier scales resized to it. N covers all
                scales, or the first few.
            class_labels: (B,) int64 in [0, num_classes]; ``num_classes`` is the unconditional class.

        Returns:
            ``logits`` (B, N, num_codes) float32: position i predicts code i.
        """
        num_tokens = latents.shape[1] + self.scale_lengths[0]
        ends = [sum(self.scale_lengths[: k + 1]) for k in range(len(self.scale_lengths))]
        if num_tokens not in ends:
            raise ValueError(
                f"latents have {latents.shape[1]} tokens; with patch_nums {self.patch_nums} expected one of "
                f"{[end - self.scale_lengths[0] for end in ends]}, the tokens of whole scales without the first."
            )
        num_scales = ends.index(num_tokens) + 1
        condition = self.class_embed(class_labels)  # (B, C)
        start = condition[:, None] + self.start_embed
        tables = self.position_embed[:, :num_tokens] + self.scale_embed(self._scale_of(num_scales, latents.device))
        inputs = self.input_proj(latents.to(self.dtype))
        hidden_states = torch.cat([start, inputs.to(start.dtype)], dim=1) + tables  # (B, N, C)

        block_condition = self.modulation(condition) if self.config.shared_modulation else condition
        mask = self.attention_mask(num_scales, latents.device)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, block_condition, mask)
            else:
                hidden_states = block(hidden_states, block_condition, mask)
        logits = self.proj_out(self._normed(hidden_states, self.norm_out(condition))).float()
        if not return_dict:
            return (logits,)
        return GeneratorOutput(logits=logits)
