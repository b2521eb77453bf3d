"""DiT in the layout of diffusers' ``DiTTransformer2DModel``, as in the Hub repository facebook/DiT-XL-2-256.

Diffusers keeps a copy of the time and class embedding in every block; here they are one, so copies that differ, as
after training with it, are refused. Its network is not quite the official one: it divides the exponents of the time
frequencies by 127 instead of 128 and has 1e-5 as epsilon. The weights are the official ones, and so is what
:class:`DiT` computes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, count, shape
from hfgen.conversion.rules import Rule, Rules
from hfgen.models.generators.dit import DiT

_EMBEDDING = "transformer_blocks.{i}.norm1.emb."


@dataclass(frozen=True)
class Copies:
    """One tensor that the official state dict holds ``number`` times."""

    number: int

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise ValueError("the copies in the blocks differ, but the model has one for all")
        return tensors[:1]

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for _ in range(self.number))


def diffusers_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`DiT`; those of diffusers are read from its ``config.json``."""
    width, in_channels, patch_size, _ = shape(state, "pos_embed.proj.weight", 4)
    hidden, _ = shape(state, "transformer_blocks.0.ff.net.0.proj.weight", 2)
    rows, _ = shape(state, f"{_EMBEDDING.format(i=0)}class_embedder.embedding_table.weight", 2)
    channels = shape(state, "proj_out_2.weight", 2)[0] // patch_size**2
    head_dim = original.get("attention_head_dim", 72)
    if not isinstance(head_dim, int) or head_dim < 1 or width % head_dim:
        raise ValueError(
            f"The tensors do not tell the heads of width {width} (heads of {head_dim}): pass a divisor as "
            "original_config={'attention_head_dim': ...}."
        )
    for name, value in (
        ("activation_fn", "gelu-approximate"),
        ("attention_bias", True),
        ("norm_elementwise_affine", False),
        ("norm_type", "ada_norm_zero"),
    ):
        original.fixed(name, value)
    original.ignore("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
    original.ignore("dropout", "norm_eps", "norm_num_groups", "upcast_attention")
    if original.get("out_channels", channels) is not None:
        original.read("out_channels", channels)
    return {
        "sample_size": original.get("sample_size", 32),
        "patch_size": original.read("patch_size", patch_size),
        "in_channels": original.read("in_channels", in_channels),
        "out_channels": channels,
        "num_classes": original.read("num_embeds_ada_norm", rows - 1),
        "num_layers": original.read("num_layers", count(state, r"transformer_blocks\.(\d+)\.")),
        "width": width,
        "num_heads": original.read("num_attention_heads", width // head_dim),
        "mlp_ratio": hidden / width,
    }


def diffusers_rules(config: Mapping[str, Any]) -> Rules:
    """Names in ``DiTTransformer2DModel``."""
    number = config["num_layers"]
    names = {
        "timestep_embedder.linear_1.weight": "time_embed.linear_1.weight",
        "timestep_embedder.linear_1.bias": "time_embed.linear_1.bias",
        "timestep_embedder.linear_2.weight": "time_embed.linear_2.weight",
        "timestep_embedder.linear_2.bias": "time_embed.linear_2.bias",
        "class_embedder.embedding_table.weight": "class_embed.weight",
    }
    block, ours = "transformer_blocks.{i}", "blocks.{i}"
    return [
        *(
            Rule(tuple(_EMBEDDING.format(i=i) + official for i in range(number)), name, Copies(number))
            for official, name in names.items()
        ),
        Rule("pos_embed.proj.{p}", "patch_embed.proj.{p}"),
        Rule(f"{block}.norm1.linear.{{p}}", f"{ours}.modulation.linear.{{p}}"),
        Rule(
            f"{block}.attn1.{{part:to_q|to_k|to_v|to_out.0}}.{{p}}",
            f"{ours}.attn.{{part:to_q|to_k|to_v|to_out.0}}.{{p}}",
        ),
        Rule(f"{block}.ff.net.{{part:0.proj|2}}.{{p}}", f"{ours}.ff.net.{{part:0.proj|2}}.{{p}}"),
        Rule("proj_out_1.{p}", "norm_out.linear.{p}"),
        Rule("proj_out_2.{p}", "proj_out.{p}"),
    ]


DIFFUSERS = Part(
    model=DiT,
    config=diffusers_config,
    rules=diffusers_rules,
    signature=("pos_embed.proj.weight", "transformer_blocks.0.norm1.linear.weight", "proj_out_2.weight"),
    config_file="config.json",
)
