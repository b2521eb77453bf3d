"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): github.com/Stability-AI/sd3.5, single files of stabilityai.

One part, ``transformer``, the MMDiT, as ``diffusers.SD3Transformer2DModel``. Released files keep it under the prefix
``model.diffusion_model.``; the autoencoder and the text encoders that some of them hold beside it load with diffusers
and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import SD3Transformer2DModel
from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, ReleasedCheckpoint, ReleasedFile, count, shape
from hfgen.conversion.rules import Rule, Rules, Split

_PREFIX = "model.diffusion_model."
_HEAD_DIM = 64  # of every published size; the official code has as many heads as layers
_SAMPLE_SIZE = 128  # latents of an image of 1024 pixels


@dataclass(frozen=True)
class SwapHalves:
    """The two halves of the first dimension change places: officially shift, scale; in diffusers scale, shift."""

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.shape[0] % 2:
            raise ValueError(f"the first dimension of {tuple(tensor.shape)} has no two halves")
        return (torch.cat(tensor.chunk(2)[::-1]),)

    inverse = forward


@dataclass(frozen=True)
class PrefixedPart(Part):
    """A part whose names all begin with the prefix, in a file that may hold other models too, or with none."""

    prefix: str = ""

    def find(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        """The state dict of this part, without the prefix; None if there is none."""
        below = {
            name.removeprefix(self.prefix): value
            for name, value in checkpoint.items()
            if isinstance(name, str) and name.startswith(self.prefix)
        }
        return super().find(below or checkpoint)


def mmdit_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of ``SD3Transformer2DModel``."""
    width, channels, patch_size, _ = shape(state, "x_embedder.proj.weight", 4)
    if width % _HEAD_DIM:
        raise ValueError(f"x_embedder.proj.weight gives width {width}; expected heads of {_HEAD_DIM}.")
    depth = original.read("depth", count(state, r"joint_blocks\.(\d+)\."))
    positions = shape(state, "pos_embed", 3)[1]
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(f"pos_embed has {positions} positions; expected a square.")
    norm = any(name.endswith(".attn.ln_q.weight") for name in state)
    dual = [i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in state]
    original.read("num_patches", positions)
    original.read("adm_in_channels", shape(state, "y_embedder.mlp.0.weight", 2)[1])
    original.read("qk_norm", "rms" if norm else None)
    original.read("x_block_self_attn_layers", dual)
    original.read("mlp_ratio", shape(state, "joint_blocks.0.x_block.mlp.fc1.weight", 2)[0] / width)
    for name, value in {"register_length": 0, "rmsnorm": False, "scale_mod_only": False, "swiglu": False}.items():
        original.fixed(name, value)
    original.ignore("input_size", "context_embedder_config", "pos_embed_scaling_factor", "pos_embed_offset")
    patch_size = original.read("patch_size", patch_size)
    return {
        # The size of images when none is asked for; the positions are those of the file.
        "sample_size": min(_SAMPLE_SIZE, side * patch_size),
        "patch_size": patch_size,
        "in_channels": original.read("in_channels", channels),
        "num_layers": depth,
        "attention_head_dim": _HEAD_DIM,
        "num_attention_heads": width // _HEAD_DIM,
        "joint_attention_dim": shape(state, "context_embedder.weight", 2)[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": shape(state, "y_embedder.mlp.0.weight", 2)[1],
        "out_channels": shape(state, "final_layer.linear.weight", 2)[0] // patch_size**2,
        "pos_embed_max_size": original.read("pos_embed_max_size", side),
        "dual_attention_layers": tuple(dual),
        "qk_norm": "rms_norm" if norm else None,
    }


def mmdit_rules(config: Mapping[str, Any]) -> Rules:
    """Official names; the last block of the text stream has no output, so that its modulation has two chunks."""
    last = config["num_layers"] - 1
    ours, image, text = "transformer_blocks.{i}", "joint_blocks.{i}.x_block", "joint_blocks.{i}.context_block"
    joint = ("add_q_proj", "add_k_proj", "add_v_proj")
    last_norm = f"transformer_blocks.{last}.norm1_context.linear.{{p}}"
    return [
        Rule("pos_embed", "pos_embed.pos_embed"),
        Rule("x_embedder.proj.{p}", "pos_embed.proj.{p}"),
        Rule("t_embedder.mlp.0.{p}", "time_text_embed.timestep_embedder.linear_1.{p}"),
        Rule("t_embedder.mlp.2.{p}", "time_text_embed.timestep_embedder.linear_2.{p}"),
        Rule("y_embedder.mlp.0.{p}", "time_text_embed.text_embedder.linear_1.{p}"),
        Rule("y_embedder.mlp.2.{p}", "time_text_embed.text_embedder.linear_2.{p}"),
        Rule("context_embedder.{p}", "context_embedder.{p}"),
        Rule(f"joint_blocks.{last}.context_block.adaLN_modulation.1.{{p}}", last_norm, SwapHalves()),
        Rule(f"{image}.adaLN_modulation.1.{{p}}", f"{ours}.norm1.linear.{{p}}"),
        Rule(f"{text}.adaLN_modulation.1.{{p}}", f"{ours}.norm1_context.linear.{{p}}"),
        Rule(f"{image}.{{a:attn2?}}.qkv.{{p}}", tuple(f"{ours}.{{a}}.to_{each}.{{p}}" for each in "qkv"), Split(3)),
        Rule(f"{text}.attn.qkv.{{p}}", tuple(f"{ours}.attn.{name}.{{p}}" for name in joint), Split(3)),
        Rule(f"{image}.{{a:attn2?}}.ln_{{n}}.{{p}}", f"{ours}.{{a}}.norm_{{n:[qk]}}.{{p}}"),
        Rule(f"{text}.attn.ln_{{n}}.{{p}}", f"{ours}.attn.norm_added_{{n}}.{{p}}"),
        Rule(f"{image}.{{a:attn2?}}.proj.{{p}}", f"{ours}.{{a}}.to_out.0.{{p}}"),
        Rule(f"{text}.attn.proj.{{p}}", f"{ours}.attn.to_add_out.{{p}}"),
        Rule(f"{image}.mlp.fc1.{{p}}", f"{ours}.ff.net.0.proj.{{p}}"),
        Rule(f"{image}.mlp.fc2.{{p}}", f"{ours}.ff.net.2.{{p}}"),
        Rule(f"{text}.mlp.fc1.{{p}}", f"{ours}.ff_context.net.0.proj.{{p}}"),
        Rule(f"{text}.mlp.fc2.{{p}}", f"{ours}.ff_context.net.2.{{p}}"),
        Rule("final_layer.linear.{p}", "proj_out.{p}"),
        Rule("final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}", SwapHalves()),
    ]


CONVERTERS = {
    "sd3": {
        "transformer": PrefixedPart(
            SD3Transformer2DModel,
            mmdit_config,
            mmdit_rules,
            signature=("joint_blocks.0.x_block.attn.qkv.weight", "pos_embed"),
            prefix=_PREFIX,
        )
    }
}

_LICENCE = "Stability AI Community License"
RELEASED = tuple(
    ReleasedCheckpoint(name, "sd3", repo, (ReleasedFile("transformer", path, megabytes),), _LICENCE)
    for name, repo, path, megabytes in (
        ("sd3-medium", "stabilityai/stable-diffusion-3-medium", "sd3_medium.safetensors", 4340),
        ("sd3.5-medium", "stabilityai/stable-diffusion-3.5-medium", "sd3.5_medium.safetensors", 5110),
        ("sd3.5-large", "stabilityai/stable-diffusion-3.5-large", "sd3.5_large.safetensors", 16500),
    )
)
