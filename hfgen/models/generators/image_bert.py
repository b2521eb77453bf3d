"""ImageBert: the masked-token generator of TiTok-L-32 and TiTok-B-64 (Yu et al., arXiv 2406.07550).

The BERT of transformers over [class, N tokens]. Legend: B batch, N tokens, C width, K codes.

What the released weights rely on: the vocabulary [K codes, mask token, classes, "no class"], the first of two token
types at every position, the exact GELU, LayerNorm epsilon 1e-12, and a linear output layer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from hfgen.models.generators.masked import MaskedTokenTransformer


class ImageBert(MaskedTokenTransformer):
    """The ImageBert transformer.

    Args:
        num_codes: codebook size K of the tokenizer.
        num_tokens: N, tokens of an image.
        num_classes: classes; index ``num_classes`` is the unconditional class.
        hidden_size, num_layers, num_attention_heads, intermediate_size: sizes.
        dropout: of embeddings and both branches of a layer.
        attention_dropout: of the attention weights.
        class_dropout: probability with which training replaces a label by the unconditional class.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BertLayer"]
    _repeated_blocks = ["BertLayer"]
    _skip_layerwise_casting_patterns = ["embed", "LayerNorm"]

    original_system = "titok"
    original_part = "image_bert"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "titok-l32": {},
        "titok-b64": {"num_tokens": 64},
    }

    @register_to_config
    def __init__(
        self,
        num_codes: int = 4096,
        num_tokens: int = 32,
        num_classes: int = 1000,
        hidden_size: int = 768,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 3072,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        class_dropout: float = 0.1,
    ):
        super().__init__()
        bert = BertConfig(
            vocab_size=num_codes + num_classes + 2,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            hidden_act="gelu",
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=attention_dropout,
            max_position_embeddings=num_tokens + 1,
            pad_token_id=0,  # as published, although 0 is a code: its embedding has no gradient
            attn_implementation="sdpa",
        )
        self.bert = BertModel(bert, add_pooling_layer=False)
        self.lm_head = nn.Linear(hidden_size, num_codes)
        self.gradient_checkpointing = False
        nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.zeros_(self.lm_head.bias)

    @property
    def default_scheduler(self) -> str:
        """Published are the weights of 32 and of 64 tokens."""
        return "titok-l32" if self.config.num_tokens <= 32 else "titok-b64"

    def encode_tokens(self, codes: Tensor, class_labels: Tensor) -> Tensor:
        """The last hidden states (B, 1 + N, C), class token first."""
        ids = torch.cat([class_labels[:, None] + self.config.num_codes + 1, codes], dim=1)
        return self.bert(ids).last_hidden_state

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., num_codes) float32."""
        return self.lm_head(hidden_states).float()
