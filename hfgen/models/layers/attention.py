"""Multi-head self-attention on diffusers' dispatch, so that backends, LoRA, fusing and quantisation work.

Legend: B batch, N new tokens, M attended tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from hfgen.models.layers.kv_cache import KVCache


class SelfAttentionProcessor:
    """Runs a :class:`SelfAttention` through ``dispatch_attention_fn``."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: SelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        query, key, value = attn.project(hidden_states)  # each (B, N, H, D)
        query, key = attn.normalize(query, key)
        if kv_cache is not None:
            key, value = kv_cache.append(layer, key, value)  # (B, M, H, D)
        attended = dispatch_attention_fn(
            query,
            key.to(query.dtype),
            value.to(query.dtype),
            attn_mask=attention_mask,
            scale=attn.scale,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Self-attention with separate query, key and value projections.

    Args:
        hidden_size: width of the tokens.
        num_heads, head_dim: ``num_heads * head_dim`` is the inner width.
        key_bias: whether the key projection has a bias; query, value and output always have one.
        scale: softmax scale, 1/sqrt(head_dim) by default.
        dropout: after the output projection.
    """

    _default_processor_cls = SelfAttentionProcessor
    _available_processors = [SelfAttentionProcessor]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        key_bias: bool = True,
        scale: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.use_bias = True
        inner = num_heads * head_dim
        self.to_q = nn.Linear(hidden_size, inner)
        self.to_k = nn.Linear(hidden_size, inner, bias=key_bias)
        self.to_v = nn.Linear(hidden_size, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, hidden_size), nn.Dropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> query, key, value, each (B, N, H, D)."""
        if self.fused_projections:
            qkv = self.to_qkv(hidden_states).unflatten(-1, (3, self.heads, self.head_dim))
            return qkv.unbind(dim=2)
        query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
        return tuple(part.unflatten(-1, (self.heads, self.head_dim)) for part in (query, key, value))

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """What happens to query and key before the product; subclasses override it."""
        return query, key

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """One linear layer for query, key and value; a key projection without bias gets zeros."""
        if self.fused_projections:
            return
        parts = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([part.weight for part in parts])
        bias = [part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
        self.to_qkv = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        self.to_qkv.weight.copy_(weight)
        self.to_qkv.bias.copy_(torch.cat(bias))
        self.fused_projections = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        kv_cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C).

        Args:
            attention_mask: boolean, broadcastable to (B, H, N, M) and 4-D; True may be attended.
            kv_cache: the sampler's cache; the new tokens are appended at ``layer`` and all of them are attended.
            layer: index of this layer in the cache.
        """
        return self.processor(self, hidden_states, attention_mask, kv_cache, layer)


class CosineSelfAttention(SelfAttention):
    """Self-attention on unit-length queries and keys with a learned temperature per head (VAR, Swin v2).

    The logits are ``exp(min(log_scale, log 100)) * cos(q, k)``; ``log_scale`` (H,) starts at log 4. The arguments are
    those of :class:`SelfAttention` without ``scale``.
    """

    max_log_scale = math.log(100.0)

    def __init__(
        self, hidden_size: int, num_heads: int, head_dim: int, *, key_bias: bool = True, dropout: float = 0.0
    ):
        super().__init__(hidden_size, num_heads, head_dim, key_bias=key_bias, scale=1.0, dropout=dropout)
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(4.0)))

    def normalize(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.log_scale.float().clamp(max=self.max_log_scale).exp()  # (H,)
        query_norm = query.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        # One pass over the queries instead of two: temperature and length are combined per head first.
        return query * (scale[:, None] / query_norm).to(query.dtype), F.normalize(key, dim=-1)
