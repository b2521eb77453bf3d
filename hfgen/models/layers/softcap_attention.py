"""Self-attention whose scores are bounded by a hyperbolic tangent, with rotary positions and a gate for every head.

Legend: B batch, N new tokens, M attended tokens, H heads, D head dimension, C width.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from hfgen.models.layers.kv_cache import KVCache
from hfgen.models.layers.unit_norm import UnitRMSNorm

_ROTARY_BASE = 10000.0


def rotary_frequencies(head_dim: int) -> Tensor:
    """(D / 2,) float32: ``10000^(-2 i / D)`` (RoFormer, arXiv 2104.09864)."""
    return 1.0 / _ROTARY_BASE ** (torch.arange(0, head_dim, 2).float() / head_dim)


def rotations(positions: Tensor, head_dim: int) -> Tensor:
    """(B, N) int64 positions -> (B, N, D / 2) complex64, by which the pairs of adjacent channels are multiplied."""
    angles = positions[..., None].float() * rotary_frequencies(head_dim).to(positions.device)
    return torch.polar(torch.ones_like(angles), angles)


class SoftcapAttention(nn.Module):
    """Self-attention with ``cap * tanh(score / cap)`` before the softmax (Gemma 2, arXiv 2408.00118, section 2).

    Queries and keys are normalised per head, and what a head reads is multiplied by a sigmoid of its token. No kernel
    behind ``scaled_dot_product_attention`` knows a cap, so the scores are computed here and attention backends do not
    apply.

    Args:
        width: C.
        num_heads: H.
        head_dim: D, even.
        softcap: largest score.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, softcap: float = 50.0):
        super().__init__()
        self.heads = num_heads
        self.softcap = softcap
        inner = num_heads * head_dim
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.norm_q = UnitRMSNorm(head_dim)
        self.norm_k = UnitRMSNorm(head_dim)
        self.to_gates = nn.Linear(width, num_heads, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width, bias=False)])

    def forward(
        self,
        hidden_states: Tensor,
        rotary: Tensor,
        attention_mask: Tensor,
        kv_cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C).

        Args:
            rotary: (B, N, D / 2) as :func:`rotations` gives them.
            attention_mask: boolean, broadcastable to (B, H, N, M); True may be attended.
            kv_cache: the sampler's cache; the new tokens are appended at ``layer`` and all of them are attended.
            layer: index of this layer in the cache.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.heads, -1))
            for projection in (self.to_q, self.to_k, self.to_v)
        )  # (B, N, H, D)
        query = apply_rotary_emb(self.norm_q(query), rotary, use_real=False)
        key = apply_rotary_emb(self.norm_k(key), rotary, use_real=False)
        if kv_cache is not None:
            key, value = kv_cache.append(layer, key, value)
        query = query.transpose(1, 2) * (query.shape[-1] ** -0.5 / self.softcap)
        scores = torch.matmul(query, key.permute(0, 2, 3, 1)).tanh() * self.softcap  # (B, H, N, M)
        weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(dim=-1)
        attended = torch.matmul(weights, value.transpose(1, 2)).transpose(1, 2)  # (B, N, H, D)
        attended = attended * self.to_gates(hidden_states).sigmoid()[..., None]
        return self.to_out[0](attended.flatten(2))
