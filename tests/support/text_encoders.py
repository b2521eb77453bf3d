"""Tiny text encoders and a tokenizer of shape captions, with weights that do not depend on anything else."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from hfgen.data.text import make_tokenizer, train_sentencepiece

CAPTIONS = ["a small red circle at the top left", "a large green square in the middle", "a blue cross at the bottom"]


@cache
def _vocabulary() -> bytes:
    return train_sentencepiece(CAPTIONS, vocab_size=34, model_type="unigram")


def tokenizer(max_length: int = 40) -> PreTrainedTokenizerFast:
    return make_tokenizer(_vocabulary(), model_type="unigram", max_length=max_length)


def t5(width: int = 16, seed: int = 0) -> T5EncoderModel:
    config = T5Config(vocab_size=40, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return _built(T5EncoderModel, config, seed)


def clip(width: int = 8, projection: int | None = 12, seed: int = 0) -> CLIPTextModel | CLIPTextModelWithProjection:
    """With a projection as in SD3, without as in Flux."""
    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=projection or width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    return _built(CLIPTextModelWithProjection if projection else CLIPTextModel, config, seed)


def _built(model_class, config, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()
