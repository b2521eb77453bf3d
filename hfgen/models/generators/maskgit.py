"""MaskGIT: class-conditional masked-token prediction (Chang et al., arXiv 2202.04200).

A BERT over [class, N tokens in raster order]. Legend: B batch, N tokens, C width, V vocabulary.

What the released weights rely on: post-norm layers, the tanh approximation of GELU, LayerNorm epsilon 1e-12, no token
types, an output layer that is the transposed embedding, and the vocabulary [codes, classes, mask token].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer, BertPredictionHeadTransform

from hfgen.models.generators.masked import MaskedTokenTransformer


class MaskGITTransformer(MaskedTokenTransformer):
    """The MaskGIT transformer.

    Args:
        num_codes: codebook size of the tokenizer.
        num_tokens: N, tokens of an image.
        num_classes: number of classes.
        unconditional_class: has a row for "no class", which guidance needs; the released weights have none.
        hidden_size, num_layers, num_attention_heads, intermediate_size: sizes.
        dropout: of embeddings, attention weights and both branches of a layer.
        class_dropout: probability with which training replaces a label by "no class".
        norm_eps: of every normalisation.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # the output layer reads the embedding outside of its forward
    _no_split_modules = ["BertLayer"]
    _repeated_blocks = ["BertLayer"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "LayerNorm"]

    original_system = "maskgit"
    original_part = "transformer"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "maskgit-256": {},
        "maskgit-512": {"num_tokens": 1024},
    }

    @register_to_config
    def __init__(
        self,
        num_codes: int = 1024,
        num_tokens: int = 256,
        num_classes: int = 1000,
        unconditional_class: bool = False,
        hidden_size: int = 768,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        intermediate_size: int = 3072,
        dropout: float = 0.1,
        class_dropout: float = 0.0,
        norm_eps: float = 1e-12,
    ):
        super().__init__()
        if class_dropout and not unconditional_class:
            raise ValueError(f"class_dropout={class_dropout} needs unconditional_class=True, the class it drops to.")
        vocabulary = num_codes + num_classes + unconditional_class + 1
        bert = BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            hidden_act="gelu_pytorch_tanh",
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            layer_norm_eps=norm_eps,
            attn_implementation="sdpa",
        )
        self.token_embed = nn.Embedding(vocabulary, hidden_size)
        self.position_embed = nn.Embedding(num_tokens + 1, hidden_size)
        self.embed_norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.embed_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BertLayer(bert) for _ in range(num_layers))
        self.head_transform = BertPredictionHeadTransform(bert)
        self.head_bias = nn.Parameter(torch.zeros(vocabulary))
        self.gradient_checkpointing = False
        self.init_weights()

    @property
    def default_scheduler(self) -> str:
        """Published are the weights of 256 tokens (images of 256 pixels) and of 1024 (512 pixels)."""
        return "maskgit" if self.config.num_tokens <= 256 else "maskgit-512"

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal of std 0.02 cut at two deviations; biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def unconditional_label(self) -> int | None:
        return self.config.num_classes if self.config.unconditional_class else None

    def encode_tokens(self, codes: Tensor, class_labels: Tensor) -> Tensor:
        """The last hidden states (B, 1 + N, C), class token first."""
        mask_row = self.token_embed.num_embeddings - 1
        codes = codes.masked_fill(codes == self.mask_token_id, mask_row)
        ids = torch.cat([class_labels[:, None] + self.config.num_codes, codes], dim=1)
        positions = torch.arange(ids.shape[1], device=ids.device)
        hidden_states = self.token_embed(ids) + self.position_embed(positions)
        hidden_states = self.embed_dropout(self.embed_norm(hidden_states))
        for block in self.blocks:  # a BertLayer does its own gradient checkpointing
            hidden_states = block(hidden_states)
        return hidden_states

    def logits_of(self, hidden_states: Tensor) -> Tensor:
        """(..., C) -> (..., num_codes) float32."""
        return self._project(hidden_states, self.config.num_codes)

    @apply_forward_hook
    def forward_vocabulary(self, codes: Tensor, class_labels: Tensor) -> Tensor:
        """(B, 1 + N, V) float32: the logits of the whole vocabulary and of the class position, as published.

        The published loss is over these, sampling and :meth:`forward` over the codes among them.
        """
        self.check_codes(codes)
        return self._project(self.encode_tokens(codes, class_labels), self.token_embed.num_embeddings)

    def _project(self, hidden_states: Tensor, num_rows: int) -> Tensor:
        weight, bias = self.token_embed.weight[:num_rows], self.head_bias[:num_rows]
        return F.linear(self.head_transform(hidden_states), weight, bias).float()
