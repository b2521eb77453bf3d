"""UViTBert: the masked-token generator of TiTok-S-128 (Yu et al., arXiv 2406.07550; U-ViT: Bao et al., 2209.12152).

A pre-norm transformer over [class, N tokens] whose first half is joined to the second by long skip connections.
Legend: B batch, N tokens, C width, K codes.

What the released weights rely on: the vocabulary [K codes, mask token, classes, "no class"], query, key and value
without bias, the exact GELU, LayerNorm epsilon 1e-5, and no normalisation of the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, FeedForward
from torch import Tensor, nn

from hfgen.models.generators.masked import MaskedTokenTransformer
from hfgen.models.layers.attention import SelfAttention


class UnbiasedSelfAttention(SelfAttention):
    """:class:`SelfAttention` whose query, key and value projections have no bias."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int):
        super().__init__(hidden_size, num_heads, head_dim, key_bias=False)
        self.use_bias = False
        self.to_q = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.to_v = nn.Linear(hidden_size, num_heads * head_dim, bias=False)


class UViTBlock(nn.Module):
    """A pre-norm transformer block; with ``skip`` it first mixes in the output of an earlier block.

    Args:
        hidden_size, num_heads, intermediate_size: sizes.
        skip: whether the block takes a skip connection.
    """

    def __init__(self, hidden_size: int, num_heads: int, intermediate_size: int, skip: bool):
        super().__init__()
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = UnbiasedSelfAttention(hidden_size, num_heads, hidden_size // num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.ff = FeedForward(hidden_size, inner_dim=intermediate_size, activation_fn="gelu")

    def forward(self, hidden_states: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, L, C) -> (B, L, C); ``skip`` (B, L, C) is needed by blocks with a skip connection."""
        if self.skip_linear is not None:
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class UViTBert(MaskedTokenTransformer, AttentionMixin):
    """The UViT transformer.

    Args:
        num_codes: codebook size K of the tokenizer.
        num_tokens: N, tokens of an image.
        num_classes: classes; index ``num_classes`` is the unconditional class.
        hidden_size, num_attention_heads, intermediate_size: sizes.
        num_layers: blocks besides the middle one, half before and half after it.
        class_dropout: probability with which training replaces a label by the unconditional class.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # the position table is read outside of any submodule's forward
    _no_split_modules = ["UViTBlock"]
    _repeated_blocks = ["UViTBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm"]

    default_scheduler = "titok-s128"
    original_system = "titok"
    original_part = "uvit"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"titok-s128": {}}

    @register_to_config
    def __init__(
        self,
        num_codes: int = 4096,
        num_tokens: int = 128,
        num_classes: int = 1000,
        hidden_size: int = 1024,
        num_layers: int = 20,
        num_attention_heads: int = 16,
        intermediate_size: int = 4096,
        class_dropout: float = 0.1,
    ):
        super().__init__()
        if num_layers % 2:
            raise ValueError(f"num_layers={num_layers} must be even: half of the blocks before the middle one.")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size={hidden_size} must be a multiple of num_attention_heads.")
        sizes = (hidden_size, num_attention_heads, intermediate_size)
        self.token_embed = nn.Embedding(num_codes + num_classes + 2, hidden_size)
        self.position_embed = nn.Parameter(torch.zeros(1, num_tokens + 1, hidden_size))
        self.in_blocks = nn.ModuleList(UViTBlock(*sizes, skip=False) for _ in range(num_layers // 2))
        self.mid_block = UViTBlock(*sizes, skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(*sizes, skip=True) for _ in range(num_layers // 2))
        self.norm_out = nn.LayerNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, num_codes)
        self.gradient_checkpointing = False
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal of std 0.02, truncated; biases 0."""
        nn.init.trunc_normal_(self.position_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def encode_tokens(self, codes: Tensor, class_labels: Tensor) -> Tensor:
        """The last hidden states (B, 1 + N, C), class token first."""
        ids = torch.cat([class_labels[:, None] + self.config.num_codes + 1, codes], dim=1)
        hidden_states = self.token_embed(ids) + self.position_embed
        skips = []
        for block in self.in_blocks:
            hidden_states = self._run(block, hidden_states)
            skips.append(hidden_states)
        hidden_states = self._run(self.mid_block, hidden_states)
        for block in self.out_blocks:
            hidden_states = self._run(block, hidden_states, skips.pop())
        return hidden_states

    def _run(self, block: UViTBlock, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., num_codes) float32."""
        return self.proj_out(self.norm_out(hidden_states)).float()
