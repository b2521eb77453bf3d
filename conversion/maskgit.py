"""MaskGIT (arXiv 2202.04200): github.com/google-research/maskgit.

Two parts: ``transformer`` (maskgit_imagenet{256,512}_checkpoint) and ``vq_model``, its tokenizer
(tokenizer_imagenet{256,512}_checkpoint), flax msgpack files from storage.googleapis.com/maskgit-public/checkpoints.
Their tensors are named by the way to them, joined with dots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, count, shape
from hfgen.conversion.maskgit_vqgan import CONVERTERS as VQGAN_CONVERTERS
from hfgen.conversion.rules import Rule, Rules
from hfgen.models.generators.maskgit import MaskGITTransformer

_NUM_CLASSES = 1000


@dataclass(frozen=True)
class Transpose:
    """A flax kernel (in, out) is the transposed weight of a linear layer."""

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (_matrix(tensor, 2).T,)

    inverse = forward


@dataclass(frozen=True)
class MergeHeads:
    """A flax tensor whose dimensions (heads, head_dim) at ``dim`` are one; kernels (in, out) are then transposed."""

    num_heads: int
    dim: int
    ndim: int

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        merged = _matrix(tensor, self.ndim).flatten(self.dim, self.dim + 1)
        return (merged.T if self.ndim == 3 else merged,)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        tensor = tensor.T if self.ndim == 3 else tensor
        return (tensor.unflatten(self.dim, (self.num_heads, -1)),)


def _matrix(tensor: Tensor, ndim: int) -> Tensor:
    if tensor.ndim != ndim:
        raise ValueError(f"shape {tuple(tensor.shape)} where {ndim} dimensions are needed")
    return tensor


def transformer_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`MaskGITTransformer`; argument names are those of the official configs."""
    vocabulary, width = shape(state, "params.Embed_0.word_embeddings.embedding", 2)
    positions, _ = shape(state, "params.Embed_0.position_embeddings.embedding", 2)
    layer = "params.TransformerLayer_0"
    heads = shape(state, f"{layer}.Attention_0.self_attention.query.kernel", 3)[1]
    num_classes = original.get("num_class", _NUM_CLASSES)
    num_codes = vocabulary - num_classes - 1
    if num_codes < 1:
        raise ValueError(
            f"A vocabulary of {vocabulary} has no room for {num_classes} classes; pass the number of classes as "
            "original_config={'num_class': ...}."
        )
    original.fixed("mask_token_id", -1)
    return {
        "num_codes": original.read("codebook_size", num_codes),
        "num_tokens": original.read("latent_size", round((positions - 1) ** 0.5)) ** 2,
        "num_classes": num_classes,
        "hidden_size": original.read("num_embeds", width),
        "num_layers": original.read("num_layers", count(state, r"params\.TransformerLayer_(\d+)\.")),
        "num_attention_heads": original.read("num_heads", heads),
        "intermediate_size": original.read(
            "intermediate_size", shape(state, f"{layer}.Mlp_0.intermediate_output.kernel", 2)[1]
        ),
        "dropout": original.get("dropout_rate", 0.1),
    }


def transformer_rules(config: Mapping[str, Any]) -> Rules:
    """Flax names of MaskGIT."""
    heads = config["num_attention_heads"]
    flax, block = "params.TransformerLayer_{i}", "blocks.{i}"
    attention = f"{flax}.Attention_0.self_attention"
    projection = "{name:query|key|value}"
    norms = {
        "params.Embed_0.embeddings_ln": "embed_norm",
        f"{flax}.Attention_0.attention_output_ln": f"{block}.attention.output.LayerNorm",
        f"{flax}.Mlp_0.layer_output_ln": f"{block}.output.LayerNorm",
        "params.MlmLayer_0.mlm_ln": "head_transform.LayerNorm",
    }
    linears = {
        f"{flax}.Mlp_0.intermediate_output": f"{block}.intermediate.dense",
        f"{flax}.Mlp_0.layer_output": f"{block}.output.dense",
        "params.MlmLayer_0.mlm_dense": "head_transform.dense",
    }
    output = f"{block}.attention.output.dense"
    query = f"{block}.attention.self.{projection}"
    return [
        Rule("params.Embed_0.word_embeddings.embedding", "token_embed.weight"),
        Rule("params.Embed_0.position_embeddings.embedding", "position_embed.weight"),
        Rule("params.MlmLayer_0.mlm_bias.bias", "head_bias"),
        Rule(f"{attention}.{projection}.kernel", f"{query}.weight", MergeHeads(heads, dim=1, ndim=3)),
        Rule(f"{attention}.{projection}.bias", f"{query}.bias", MergeHeads(heads, dim=0, ndim=2)),
        Rule(f"{attention}.out.kernel", f"{output}.weight", MergeHeads(heads, dim=0, ndim=3)),
        Rule(f"{attention}.out.bias", f"{output}.bias"),
        *(Rule(f"{ours}.scale", f"{theirs}.weight") for ours, theirs in norms.items()),
        *(Rule(f"{ours}.kernel", f"{theirs}.weight", Transpose()) for ours, theirs in linears.items()),
        *(Rule(f"{ours}.bias", f"{theirs}.bias") for ours, theirs in (norms | linears).items()),
    ]


TRANSFORMER = Part(
    model=MaskGITTransformer,
    config=transformer_config,
    rules=transformer_rules,
    signature=("params.Embed_0.word_embeddings.embedding", "params.MlmLayer_0.mlm_bias.bias"),
)
VQ_MODEL = VQGAN_CONVERTERS["maskgit_vqgan"]["vq_model"]
CONVERTERS = {"maskgit": {"transformer": TRANSFORMER, "vq_model": VQ_MODEL}}

# The weights are not on the Hub: see the links of the official README.
RELEASED = ()
