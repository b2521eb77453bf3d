"""The layers of transformers' Llama, run with the masks and caches of sequences that mix texts and images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hfgen.models.layers.sequence_mask import causal_mask


class TrunkCache(Protocol):
    """What :func:`run_trunk` asks of a cache; those of transformers have it."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]: ...

    def get_seq_length(self) -> int: ...


class ExactLlamaRotary(LlamaRotaryEmbedding):
    """The rotary embedding of transformers' Llama, whose frequencies stay float32 when the model is cast.

    In bfloat16 a frequency is off by up to 0.4 %, which is a whole radian after some hundred positions.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        tables = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, table in tables.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self


def make_trunk(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None,
    context_length: int,
    rms_norm_eps: float,
    rope_theta: float,
    rope_scaling: dict[str, Any] | None,
) -> LlamaModel:
    """A freshly initialised Llama with attention by ``scaled_dot_product_attention`` and exact positions."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=context_length,
        rms_norm_eps=rms_norm_eps,
        rope_parameters={"rope_type": "default", **(rope_scaling or {}), "rope_theta": rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    trunk = LlamaModel(config)
    trunk.rotary_emb = ExactLlamaRotary(config)
    return trunk


def run_trunk(
    trunk: LlamaModel,
    inputs_embeds: Tensor,
    position_ids: Tensor,
    cache: TrunkCache | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """The layers on T new tokens, after those in the cache.

    ``LlamaModel.forward`` would make a mask of its own where none is needed: for the tokens of an image, which attend
    everything.

    Args:
        trunk: the model.
        inputs_embeds: (B, T, D).
        position_ids: (B, T) or (1, T) int64.
        cache: the sampler's; the keys and values of the new tokens go through its ``update``.
        mask: (B, 1, T, M) boolean over all M tokens, True may be attended.
        causal: what the new tokens attend without a mask: all in the cache, and of the new ones those before them, or
            all.

    Returns:
        (B, T, D), after the final norm.
    """
    num_new, num_past = inputs_embeds.shape[1], 0 if cache is None else cache.get_seq_length()
    causal = causal and mask is None and num_new > 1
    if causal and num_past:
        mask, causal = causal_mask(num_new, num_past, inputs_embeds.device)[None, None], False
    hidden_states = inputs_embeds
    positions = trunk.rotary_emb(hidden_states, position_ids=position_ids)
    for layer in trunk.layers:
        hidden_states = layer(
            hidden_states,
            attention_mask=mask,
            past_key_values=cache,
            position_embeddings=positions,
            is_causal=causal,
        )
    return trunk.norm(hidden_states)
