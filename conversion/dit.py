"""DiT (arXiv 2212.09748): github.com/facebookresearch/DiT, and SiT (arXiv 2401.08740): github.com/willisma/SiT.

Both have the same network and the same names. Released files are plain state dicts of averaged weights; the official
trainers write several, under ``model`` and ``ema``, of which the averaged one is taken. SiT computes twice the
channels and drops the second half when it was trained with ``learn_sigma``: these rows are left out here, and the way
back gives the layout of ``learn_sigma=False``, whose output is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, count, shape
from hfgen.conversion.dit_diffusers import DIFFUSERS
from hfgen.conversion.rules import Derived, Keep, Operation, Rule, Rules, Split
from hfgen.models.generators.dit import DiT
from hfgen.models.layers.embeddings import sincos_positions

_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


@dataclass(frozen=True)
class FirstChannels:
    """The rows of the first ``channels`` of every pixel of a patch, of (P P channels, ...); they may be all."""

    patch_pixels: int
    channels: int

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        rows = self.patch_pixels * self.channels
        if tensor.shape[0] not in (rows, 2 * rows):
            raise ValueError(f"{tensor.shape[0]} rows where {rows} or {2 * rows} are needed")
        return (tensor.unflatten(0, (self.patch_pixels, -1))[:, : self.channels].flatten(0, 1),)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)


def network_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """The constructor arguments of :class:`DiT` that all files with these names tell in the same way."""
    width, in_channels, patch_size, _ = shape(state, "x_embedder.proj.weight", 4)
    hidden, _ = shape(state, "blocks.0.mlp.fc1.weight", 2)
    original.get("class_dropout_prob", 0.1)  # of training, which replaces the labels itself
    return {
        "sample_size": original.read("input_size", _check_positions(state, width) * patch_size),
        "patch_size": original.read("patch_size", patch_size),
        "in_channels": original.read("in_channels", in_channels),
        "num_classes": original.read("num_classes", shape(state, "y_embedder.embedding_table.weight", 2)[0] - 1),
        "num_layers": original.read("depth", count(state, r"blocks\.(\d+)\.")),
        "width": original.read("hidden_size", width),
        "num_heads": num_heads(width, original),
        "mlp_ratio": original.read("mlp_ratio", hidden / width),
    }


def num_heads(width: int, original: OriginalConfig) -> int:
    """No tensor has a dimension for the heads; the published sizes are known by their width."""
    heads = original.get("num_heads", _PUBLISHED_HEADS.get(width))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"The tensors do not tell the number of heads of width {width} (given: {heads}): pass a divisor as "
            "original_config={'num_heads': ...}."
        )
    return heads


def _check_positions(state: Mapping[str, Tensor], width: int) -> int:
    """The side of the grid; the positions must be the fixed ones, up to rounding, since the model has no others."""
    _, num_patches, channels = shape(state, "pos_embed", 3)
    positions = state["pos_embed"]
    side = round(num_patches**0.5)
    if side**2 != num_patches or channels != width:
        raise ValueError(f"pos_embed has the shape {tuple(positions.shape)}; expected (1, side^2, {width}).")
    tolerance = 1e-6 if positions.element_size() >= 4 else 1e-2
    if not torch.allclose(positions[0].float(), sincos_positions((side, side), width, side), rtol=0, atol=tolerance):
        raise ValueError("pos_embed does not hold the fixed sine-cosine positions; learned ones are not supported.")
    return side


def dit_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments for DiT."""
    arguments = network_config(state, original)
    return arguments | {"out_channels": _out_channels(state, arguments, original)}


def sit_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments for SiT."""
    arguments = network_config(state, original)
    _out_channels(state, arguments, original)
    return arguments | {"timestep_scale": 1e-3, "reverse_time": True}


def _out_channels(state: Mapping[str, Tensor], arguments: Mapping[str, Any], original: OriginalConfig) -> int:
    channels = shape(state, "final_layer.linear.weight", 2)[0] // arguments["patch_size"] ** 2
    original.read("learn_sigma", channels == 2 * arguments["in_channels"])
    return channels


def network_rules(config: Mapping[str, Any]) -> Rules:
    """Official names of DiT and SiT, and of what others built on them."""
    attn, block = "blocks.{i}.attn", "blocks.{i}"
    qkv = tuple(f"{attn}.{name}.{{p}}" for name in ("to_q", "to_k", "to_v"))
    width, side = config["width"], config["sample_size"] // config["patch_size"]
    output: Operation = FirstChannels(config["patch_size"] ** 2, config["in_channels"])
    return [
        Rule("x_embedder.proj.{p}", "patch_embed.proj.{p}"),
        Rule("t_embedder.mlp.0.{p}", "time_embed.linear_1.{p}"),
        Rule("t_embedder.mlp.2.{p}", "time_embed.linear_2.{p}"),
        Rule("y_embedder.embedding_table.weight", "class_embed.weight"),
        Rule(f"{attn}.qkv.{{p}}", qkv, Split(3)),
        Rule(f"{attn}.proj.{{p}}", f"{attn}.to_out.0.{{p}}"),
        Rule(f"{block}.mlp.fc1.{{p}}", f"{block}.ff.net.0.proj.{{p}}"),
        Rule(f"{block}.mlp.fc2.{{p}}", f"{block}.ff.net.2.{{p}}"),
        Rule(f"{block}.adaLN_modulation.1.{{p}}", f"{block}.modulation.linear.{{p}}"),
        Rule("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}"),
        Rule("final_layer.linear.{p}", "proj_out.{p}", output if config["reverse_time"] else Keep()),
        # Compared with the file's up to rounding when the configuration is read.
        Derived("pos_embed", lambda: sincos_positions((side, side), width, side)[None], check=False),
    ]


_SIGNATURE = ("x_embedder.proj.weight", "pos_embed", "t_embedder.mlp.0.weight", "final_layer.linear.weight")
DIT_WRAPPERS = (("ema",), ("model",))


def _part(config: Callable[[Mapping[str, Tensor], OriginalConfig], dict[str, Any]]) -> Part:
    return Part(model=DiT, config=config, rules=network_rules, signature=_SIGNATURE, wrappers=DIT_WRAPPERS)


CONVERTERS = {
    "dit": {"transformer": _part(dit_config), "diffusers": DIFFUSERS},
    "sit": {"transformer": _part(sit_config)},
}

# The files are not on the Hub: see the links of the official README files.
RELEASED = ()
