"""MeanFlow (arXiv 2505.13447): two published layouts of the same network.

- ``jax``: github.com/Gsunshine/meanflow. The flax parameters are named by the way to them; a checkpoint has them under
  ``ema_params``, which are taken, and ``params``. Positions are no parameters.
- ``torch``: github.com/zhuyu-cs/MeanFlow, the names of SiT and a second time, ``r_embedder``, which gets the length of
  the interval. ``ema`` is taken before ``model``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, count, shape
from hfgen.conversion.dit import DIT_WRAPPERS, network_config, network_rules, num_heads
from hfgen.conversion.maskgit import Transpose
from hfgen.conversion.maskgit_vqgan import Kernel
from hfgen.conversion.rules import Chain, Rule, Rules, Split
from hfgen.models.generators.dit import DiT

_TREES = ("ema_params/", "params/", "")
_MAX_DEPTH = 16  # of nested maps; the official tree has 8


class FlaxPart(Part):
    """A part whose tensors are the leaves of a flax tree: nested, or with names joined by slashes or dots."""

    def find(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        """The state dict of this part with names joined by slashes, of the averaged weights if there are any."""
        leaves = dict(_leaves(checkpoint))
        for tree in _TREES:
            state = {name.removeprefix(tree): value for name, value in leaves.items() if name.startswith(tree)}
            if all(name in state for name in self.signature):
                return state
        return None


def _leaves(tree: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree by the way to them."""
    pending, seen = [("", tree)], set()
    while pending:
        prefix, node = pending.pop()
        if id(node) in seen or prefix.count("/") > _MAX_DEPTH:  # a pickle can hold a map inside itself
            continue
        seen.add(id(node))
        for name, value in node.items():
            path = prefix + str(name).replace(".", "/")
            if isinstance(value, Mapping):
                pending.append((f"{path}/", value))
            elif isinstance(value, Tensor):
                yield path, value


def jax_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`DiT` from the official parameters."""
    patch_size, _, in_channels, width = shape(state, "net/x_embedder/proj/kernel", 4)
    _, hidden = shape(state, "net/blocks/layers_0/mlp/fc1/_flax_linear/kernel", 2)
    num_rows, _ = shape(state, "net/y_embedder/embedding_table/_flax_embedding/embedding", 2)
    return {
        "sample_size": original.get("input_size", 32),
        "patch_size": original.read("patch_size", patch_size),
        "in_channels": original.read("in_channels", in_channels),
        "num_classes": original.read("num_classes", num_rows - 1),
        "num_layers": original.read("depth", count(state, r"net/blocks/layers_(\d+)/")),
        "width": original.read("hidden_size", width),
        "num_heads": num_heads(width, original),
        "mlp_ratio": original.read("mlp_ratio", hidden / width),
        "has_duration": True,
    }


def jax_rules(config: Mapping[str, Any]) -> Rules:
    """Names in the official flax tree."""
    flax, block = "net/blocks/layers_{i:[0-9]+}", "blocks.{i:[0-9]+}"
    linears = {
        "net/t_embedder/mlp/layers_0": "time_embed.linear_1",
        "net/t_embedder/mlp/layers_2": "time_embed.linear_2",
        "net/h_embedder/mlp/layers_0": "duration_embed.linear_1",
        "net/h_embedder/mlp/layers_2": "duration_embed.linear_2",
        f"{flax}/attn/proj": f"{block}.attn.to_out.0",
        f"{flax}/mlp/fc1": f"{block}.ff.net.0.proj",
        f"{flax}/mlp/fc2": f"{block}.ff.net.2",
        f"{flax}/adaLN_modulation/layers_1": f"{block}.modulation.linear",
        "net/final_layer/adaLN_modulation/layers_1": "norm_out.linear",
        "net/final_layer/linear": "proj_out",
    }
    qkv, parts = f"{flax}/attn/qkv/_flax_linear", ("to_q", "to_k", "to_v")
    return [
        Rule("net/x_embedder/proj/kernel", "patch_embed.proj.weight", Kernel()),
        Rule("net/x_embedder/proj/bias", "patch_embed.proj.bias"),
        Rule("net/y_embedder/embedding_table/_flax_embedding/embedding", "class_embed.weight"),
        Rule(f"{qkv}/kernel", tuple(f"{block}.attn.{p}.weight" for p in parts), Chain((Transpose(), Split(3)))),
        Rule(f"{qkv}/bias", tuple(f"{block}.attn.{p}.bias" for p in parts), Split(3)),
        *(Rule(f"{ours}/_flax_linear/kernel", f"{theirs}.weight", Transpose()) for ours, theirs in linears.items()),
        *(Rule(f"{ours}/_flax_linear/bias", f"{theirs}.bias") for ours, theirs in linears.items()),
    ]


def torch_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`DiT` from the state dict of the PyTorch form."""
    arguments = network_config(state, original)
    original.read("decoder_hidden_size", arguments["width"])
    original.fixed("qk_norm", False)
    original.ignore("fused_attn", "use_cfg")
    return arguments | {"has_duration": True}


def torch_rules(config: Mapping[str, Any]) -> Rules:
    """Names of the PyTorch form."""
    return [
        *network_rules(config),
        Rule("r_embedder.mlp.0.{p}", "duration_embed.linear_1.{p}"),
        Rule("r_embedder.mlp.2.{p}", "duration_embed.linear_2.{p}"),
    ]


_JAX = FlaxPart(
    model=DiT,
    config=jax_config,
    rules=jax_rules,
    signature=("net/x_embedder/proj/kernel", "net/h_embedder/mlp/layers_0/_flax_linear/kernel"),
)
_TORCH = Part(
    model=DiT,
    config=torch_config,
    rules=torch_rules,
    signature=("x_embedder.proj.weight", "pos_embed", "r_embedder.mlp.0.weight"),
    wrappers=DIT_WRAPPERS,
)
CONVERTERS = {"mean_flow": {"jax": _JAX, "torch": _TORCH}}

# The weights are not on the Hub: see the links of the official README.
RELEASED = ()
