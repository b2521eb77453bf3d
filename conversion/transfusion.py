"""The open implementation of Transfusion (arXiv 2408.11039): github.com/lucidrains/transfusion-pytorch, version 0.19.

The authors of the paper released nothing, and no weights of this implementation were published: these are the files
that its users train. ``original_config`` has the arguments of its ``Transfusion``, in which ``transformer`` is a
mapping; of them only the head size and the number of axes are not told by the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, count, shape
from hfgen.conversion.rules import Derived, Rule, Rules, Split
from hfgen.models.generators.transfusion_flow import TransfusionFlowTransformer
from hfgen.models.layers.softcap_attention import rotary_frequencies

_SPECIAL_IDS = 3 + 129  # begin, end and null; meta and the characters
_BLOCK = "transformer.layers.{i}"


def transfusion_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`TransfusionFlowTransformer`."""
    ids, width = shape(state, "text_embed.weight", 2)
    channel_first = _channel_first(state)
    num_modalities = len(channel_first)
    channels = [
        shape(state, f"model_to_latent_projs.{index}{'.0' if first else ''}.weight", 2)[0]
        for index, first in enumerate(channel_first)
    ]
    num_text_tokens = ids - _SPECIAL_IDS - 2 * num_modalities
    original.read("num_text_tokens", num_text_tokens)
    _check_each(original, "dim_latent", channels)
    _check_each(original, "channel_first_latent", channel_first)
    axes = [count(state, rf"pos_emb_mlp\.{index}\.mlps\.(\d+)\.") for index in range(num_modalities)]
    _check_each(original, "add_pos_emb", [bool(number) for number in axes])
    original.fixed("model_output_clean", False)
    original.fixed("pre_post_transformer_enc_dec", None)
    # Of training, of its own sampling, and networks before and behind this one.
    original.ignore(
        "modality_processing", "modality_encoder", "modality_decoder", "modality_encoder_decoder_requires_batch_dim"
    )
    original.ignore("ignore_index", "flow_loss_weight", "text_loss_weight", "velocity_consistency_loss_weight")
    original.ignore("reconstruction_loss_weight", "odeint_kwargs", "eps", "prob_uncond")
    original.ignore("fallback_to_default_shape_if_invalid", "to_modality_shape_fn")
    return {
        "num_text_tokens": num_text_tokens,
        "latent_channels": channels,
        "num_axes": _num_axes(axes, original),
        "channel_first": channel_first,
        "has_positions": [bool(number) for number in axes],
        "width": width,
        **_trunk_config(state, width, original),
    }


def _trunk_config(state: Mapping[str, Tensor], width: int, original: OriginalConfig) -> dict[str, Any]:
    """Sizes of the blocks; ``transformer`` of the official configuration is a mapping of its own."""
    given = original.get("transformer", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"original_config['transformer'] is {given!r}; expected a mapping of its arguments.")
    trunk = OriginalConfig(given)
    attention = "transformer.layers.0.1.fn"
    (head_dim,) = shape(state, f"{attention}.q_norm.gamma", 1)
    inner, _ = shape(state, f"{attention}.to_v.0.weight", 2)
    heads, _ = shape(state, f"{attention}.to_gates.0.weight", 2)
    _, ff_dim = shape(state, "transformer.layers.0.2.fn.net.3.weight", 2)
    if heads * head_dim != inner:
        raise ValueError(f"{attention} has {heads} gates and heads of {head_dim} channels, but values of {inner}.")
    factor = trunk.get("ff_expansion_factor", None)
    if factor is not None and int(width * factor * 2 / 3) != ff_dim:
        raise ValueError(
            f"ff_expansion_factor={factor!r} means {int(width * factor * 2 / 3)} channels in the feed-forward, "
            f"but the tensors have {ff_dim}."
        )
    for name, supported in (
        ("attn_laser", False),
        ("unet_skips", True),
        ("qk_rmsnorm", True),
        ("use_value_residual", False),
        ("attn_kwargs", {}),
    ):
        trunk.fixed(name, supported)
    trunk.ignore("dropout", "ff_kwargs", "use_flex_attn")
    sizes = {
        "num_layers": trunk.read("depth", count(state, r"transformer\.layers\.(\d+)\.")),
        "num_heads": trunk.read("heads", heads),
        "head_dim": trunk.read("dim_head", head_dim),
        "ff_dim": ff_dim,
    }
    trunk.read("dim", width)
    trunk.finish()
    frequencies = state.get("rotary_emb.freqs")
    if frequencies is not None and not torch.allclose(frequencies.float(), rotary_frequencies(head_dim), rtol=1e-2):
        raise ValueError("rotary_emb.freqs are not 10000^(-2 i / head_dim); other frequencies are not supported.")
    return sizes


def _channel_first(state: Mapping[str, Tensor]) -> list[bool]:
    """With the channels first, the last projection stands before a rearrangement."""
    number = count(state, r"model_to_latent_projs\.(\d+)\.")
    return [f"model_to_latent_projs.{index}.0.weight" in state for index in range(number)]


def _check_each(original: OriginalConfig, name: str, values: Sequence[Any]) -> None:
    """An official argument that has one value, for all modalities, or one for each."""
    given = original.get(name, None)
    each = tuple(given) if isinstance(given, (list, tuple)) else (given,) * len(values)
    if given is not None and each != tuple(values):
        raise ValueError(f"original_config[{name!r}] is {given!r}, but the tensors say {list(values)!r}.")


def _num_axes(axes: Sequence[int], original: OriginalConfig) -> list[int]:
    """Of every modality: learned positions tell them, else the official arguments, else they are images."""
    shapes, given = original.get("modality_default_shape", None), original.get("modality_num_dim", None)
    if given is None and shapes is not None:
        each = shapes if isinstance(shapes[0], (list, tuple)) else [shapes] * len(axes)
        given = [None if one is None else len(one) for one in each]
    each = list(given) if isinstance(given, (list, tuple)) else [given] * len(axes)
    if len(each) != len(axes) or any(told and one and told != one for told, one in zip(axes, each)):
        raise ValueError(f"original_config tells {each} axes for the modalities, but the tensors {list(axes)}.")
    return [told or one or 2 for told, one in zip(axes, each)]


def transfusion_rules(config: Mapping[str, Any]) -> Rules:
    """Official names."""
    attention = f"{_BLOCK}.1.fn"
    rules: list[Rule | Derived] = [
        Rule("text_embed.weight", "text_embed.weight"),
        Rule("to_text_logits.weight", "text_head.weight"),
        Rule("transformer.norm.gamma", "norm_out.gamma"),
        Rule("transformer.to_time_cond.0.weights", "time_proj.frequencies"),
        Rule("transformer.to_time_cond.1.{p}", "time_embed.{p}"),
        Rule(f"{_BLOCK}.0.weight", "blocks.{i}.skip_proj.weight"),
        Rule(f"{attention}.to_qk.0.weight", ("blocks.{i}.attn.to_q.weight", "blocks.{i}.attn.to_k.weight"), Split(2)),
        Rule(f"{attention}.to_v.0.weight", "blocks.{i}.attn.to_v.weight"),
        Rule(f"{attention}.to_gates.0.weight", "blocks.{i}.attn.to_gates.weight"),
        Rule(f"{attention}.to_out.1.weight", "blocks.{i}.attn.to_out.0.weight"),
        Rule(f"{attention}.{{n:[qk]}}_norm.gamma", "blocks.{i}.attn.norm_{n}.gamma"),
        Rule(f"{_BLOCK}.2.fn.net.0.{{p}}", "blocks.{i}.ff.net.0.proj.{p}"),
        Rule(f"{_BLOCK}.2.fn.net.3.{{p}}", "blocks.{i}.ff.net.2.{p}"),
        Rule(f"{_BLOCK}.3.pseudo_queries", "blocks.{i}.depth_attn.query"),
        Rule(f"{_BLOCK}.3.norm_keys.gamma", "blocks.{i}.depth_attn.norm.gamma"),
        Rule("pos_emb_mlp.{m}.mlps.{axis}.{layer}.{p}", "position_embeds.{m}.axes.{axis}.{layer}.{p}"),
        Derived("rotary_emb.freqs", lambda: rotary_frequencies(config["head_dim"]), check=False),
    ]
    for index, branch in ((1, "attn"), (2, "ff")):
        official, ours = f"{_BLOCK}.{index}", f"blocks.{{i}}.{branch}_modulation"
        rules += [
            Rule(f"{official}.layernorm_gamma", f"{ours}.text_scale"),
            Rule(f"{official}.layerscale", f"{ours}.text_gate"),
            Rule(f"{official}.to_film.{{p}}", f"{ours}.image_film.{{p}}"),
            Rule(f"{official}.to_ada_ln_zero.{{p}}", f"{ours}.image_gate.{{p}}"),
        ]
    for index, first in enumerate(config["channel_first"]):
        into, out = (".1", ".0") if first else ("", "")  # beside a rearrangement
        rules += [
            Rule(f"latent_to_model_projs.{index}{into}.{{p}}", f"proj_in.{index}.{{p}}"),
            Rule(f"model_to_latent_projs.{index}{out}.{{p}}", f"proj_out.{index}.{{p}}"),
        ]
    return rules


CONVERTERS = {
    "transfusion_pytorch": {
        "transformer": Part(
            model=TransfusionFlowTransformer,
            config=transfusion_config,
            rules=transfusion_rules,
            signature=("text_embed.weight", "to_text_logits.weight", "transformer.to_time_cond.0.weights"),
            wrappers=(("model",), ("ema_model",)),
        )
    }
}

# No weights were released.
RELEASED = ()
