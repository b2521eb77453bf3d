"""VAR (arXiv 2404.02905): github.com/FoundationVision/VAR, weights in the Hub repository FoundationVision/var.

Two parts: ``transformer`` (var_d*.pth) and ``vae``, the multi-scale tokenizer (vae_ch160v4096z32.pth). Checkpoints of
the official trainer hold both, under ``trainer.var_wo_ddp`` and ``trainer.vae_local``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hfgen.conversion.conv_autoencoder import decoder_rules, encoder_rules
from hfgen.conversion.converter import OriginalConfig, Part, ReleasedCheckpoint, ReleasedFile, count, shape
from hfgen.conversion.rules import Derived, Rule, Rules, Split, Squeeze
from hfgen.models.generators.var import PATCH_NUMS_256, PATCH_NUMS_512, VARTransformer
from hfgen.models.tokenizers.multiscale_vqvae import MultiScaleVQVAE

PATCH_NUMS_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
_PUBLISHED_PATCH_NUMS = (PATCH_NUMS_256, PATCH_NUMS_512, PATCH_NUMS_1024)
_HEAD_DIM = 64


def transformer_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`VARTransformer`."""
    num_embeddings, width = shape(state, "class_emb.weight", 2)
    depth = count(state, r"blocks\.(\d+)\.")
    hidden, _ = shape(state, "blocks.0.ffn.fc1.weight", 2)
    l2_norm = any(name.endswith(".scale_mul_1H11") for name in state)
    shared = any(name.startswith("shared_ada_lin.") or name.endswith(".ada_gss") for name in state)
    num_heads = _num_heads(state, width, l2_norm, original)
    for name in ("drop_rate", "attn_drop_rate"):
        original.fixed(name, 0.0)
    original.ignore("flash_if_available", "fused_if_available")
    return {
        "num_codes": shape(state, "head.weight", 2)[0],
        "code_dim": shape(state, "word_embed.weight", 2)[1],
        "num_classes": original.read("num_classes", num_embeddings - 1),
        "num_layers": original.read("depth", depth),
        "num_attention_heads": num_heads,
        "attention_head_dim": original.read("embed_dim", width) // num_heads,
        "mlp_ratio": original.read("mlp_ratio", hidden / width),
        "patch_nums": _patch_nums(state, original),
        "shared_modulation": original.read("shared_aln", shared),
        "l2_norm_attention": original.read("attn_l2_norm", l2_norm),
        "class_dropout": original.get("cond_drop_rate", 0.1),
        # The official builder derives the rate from the depth.
        "drop_path": original.get("drop_path_rate", 0.1 * depth / 24),
        "norm_eps": original.get("norm_eps", 1e-6),
    }


def _num_heads(state: Mapping[str, Tensor], width: int, l2_norm: bool, original: OriginalConfig) -> int:
    if l2_norm:
        return original.read("num_heads", shape(state, "blocks.0.attn.scale_mul_1H11", 4)[1])
    # Without cosine attention no tensor has a dimension for the heads; every official size has heads of 64.
    num_heads = original.get("num_heads", None if width % _HEAD_DIM else width // _HEAD_DIM)
    if num_heads is None or width % num_heads:
        raise ValueError(
            f"The tensors do not tell the number of heads of width {width} (given: {num_heads}): pass a divisor as "
            "original_config={'num_heads': ...}."
        )
    return num_heads


def _patch_nums(state: Mapping[str, Tensor], original: OriginalConfig) -> tuple[int, ...]:
    num_tokens, num_scales = shape(state, "pos_1LC", 3)[1], shape(state, "lvl_embed.weight", 2)[0]
    start = shape(state, "pos_start", 3)[1]
    given = original.get("patch_nums", None)
    if given is not None:
        found = _sides("patch_nums", given)
    elif "lvl_1L" in state:  # the scale of each token
        found = tuple(math.isqrt(length) for length in state["lvl_1L"].unique(return_counts=True)[1].tolist())
    else:
        fits = (p for p in _PUBLISHED_PATCH_NUMS if (len(p), sum(n**2 for n in p)) == (num_scales, num_tokens))
        found = next(fits, None)
    if found is None:
        raise ValueError(
            f"The tensors do not tell the sides of the {num_scales} token maps with {num_tokens} tokens: pass them as "
            "original_config={'patch_nums': [...]}."
        )
    if (len(found), sum(side**2 for side in found), found[0] ** 2) != (num_scales, num_tokens, start):
        raise ValueError(
            f"patch_nums {found} do not fit the checkpoint, which has {num_scales} scales, {start} tokens in the "
            f"first and {num_tokens} in all."
        )
    return found


def _sides(name: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or not all(isinstance(side, int) and side > 0 for side in given) or not given:
        raise ValueError(f"original_config[{name!r}] is {given!r}; expected a list of positive integers.")
    return tuple(given)


def transformer_rules(config: Mapping[str, Any]) -> Rules:
    """Official names of the transformer; the three tables at the end are made from the configuration."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    scale_of = _scale_of_token(config["patch_nums"])
    attn = "blocks.{i}.attn"
    return [
        Rule("pos_start", "start_embed"),
        Rule("pos_1LC", "position_embed"),
        Rule("class_emb.weight", "class_embed.weight"),
        Rule("lvl_embed.weight", "scale_embed.weight"),
        Rule("word_embed.{p}", "input_proj.{p}"),
        Rule(
            f"{attn}.mat_qkv.weight", (f"{attn}.to_q.weight", f"{attn}.to_k.weight", f"{attn}.to_v.weight"), Split(3)
        ),
        Rule(f"{attn}.q_bias", f"{attn}.to_q.bias"),
        Rule(f"{attn}.v_bias", f"{attn}.to_v.bias"),
        Rule(f"{attn}.scale_mul_1H11", f"{attn}.log_scale", Squeeze((0, 2, 3))),
        Rule(f"{attn}.proj.{{p}}", f"{attn}.to_out.0.{{p}}"),
        Rule("blocks.{i}.ffn.fc1.{p}", "blocks.{i}.ff.net.0.proj.{p}"),
        Rule("blocks.{i}.ffn.fc2.{p}", "blocks.{i}.ff.net.2.{p}"),
        Rule("blocks.{i}.ada_lin.1.{p}", "blocks.{i}.modulation.linear.{p}"),
        Rule("blocks.{i}.ada_gss", "blocks.{i}.modulation_table", Squeeze((0,))),
        Rule("shared_ada_lin.1.{p}", "modulation.linear.{p}"),
        Rule("head_nm.ada_lin.1.{p}", "norm_out.linear.{p}"),
        Rule("head.{p}", "proj_out.{p}"),
        Derived("lvl_1L", lambda: scale_of[None]),
        Derived("attn_bias_for_masking", lambda: _mask_bias(scale_of)),
        *(Derived(f"blocks.{i}.attn.zero_k_bias", lambda: torch.zeros(width)) for i in range(config["num_layers"])),
    ]


def _scale_of_token(patch_nums: Sequence[int]) -> Tensor:
    return torch.arange(len(patch_nums)).repeat_interleave(torch.tensor([side**2 for side in patch_nums]))


def _mask_bias(scale_of: Tensor) -> Tensor:
    """(1, 1, L, L): 0 where a token may attend, its own scale and earlier ones, else -inf."""
    hidden = scale_of[:, None] < scale_of[None, :]
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[None, None]


def vae_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`MultiScaleVQVAE`."""
    num_codes, latent_channels = shape(state, "quantize.embedding.weight", 2)
    base_channels, in_channels = shape(state, "encoder.conv_in.weight", 4)[:2]
    num_levels = count(state, r"encoder\.down\.(\d+)\.")
    widths = [shape(state, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(num_levels)]
    patch_nums = _vae_patch_nums((num_codes, latent_channels, base_channels), original)
    num_residual_convs, ratio = _residual_convs(state, len(patch_nums), original)
    original.ignore("test_mode")
    return {
        "num_codes": original.read("vocab_size", num_codes),
        "latent_channels": original.read("z_channels", latent_channels),
        "base_channels": original.read("ch", base_channels),
        "channel_multipliers": tuple(width // base_channels for width in widths),
        "layers_per_block": count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "in_channels": in_channels,
        "quant_conv_kernel_size": original.read("quant_conv_ks", shape(state, "quant_conv.weight", 4)[-1]),
        "patch_nums": patch_nums,
        "residual_conv_ratio": ratio,
        "num_residual_convs": num_residual_convs,
        "cosine_codes": original.get("using_znorm", False),
        "commitment_weight": original.get("beta", 0.25),
        "dropout": original.get("dropout", 0.0),
    }


def _vae_patch_nums(sizes: tuple[int, int, int], original: OriginalConfig) -> tuple[int, ...]:
    """No tensor depends on the sides of the token maps; only the released tokenizer's are known."""
    given = original.get("v_patch_nums", PATCH_NUMS_256 if sizes == (4096, 32, 160) else None)
    if given is None:
        raise ValueError(
            "The tensors do not tell the sides of the token maps: pass them as "
            "original_config={'v_patch_nums': [...]}."
        )
    return _sides("v_patch_nums", given)


def _residual_convs(state: Mapping[str, Tensor], num_scales: int, original: OriginalConfig) -> tuple[int, float]:
    """``num_residual_convs`` and ``residual_conv_ratio``; the names of the convolutions tell how scales share them."""
    name = "quantize.quant_resi."
    partially = count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.")
    separate = count(state, r"quantize\.quant_resi\.(\d+)\.")
    fully = any(key.startswith(name + "qresi.") for key in state)
    if not (partially or separate or fully):  # the official quantizer leaves them out for a ratio of 0
        original.read("quant_resi", 0.0)
        original.ignore("default_qresi_counts")
        return original.get("share_quant_resi", 4), 0.0
    original.read("share_quant_resi", partially or (1 if fully else 0))
    if separate and (separate != num_scales or original.get("default_qresi_counts", 0) not in (0, num_scales)):
        raise ValueError(
            f"The checkpoint has {separate} residual convolutions, one for each scale, but v_patch_nums has "
            f"{num_scales} scales."
        )
    original.ignore("default_qresi_counts")
    return partially or (1 if fully else 0), abs(original.get("quant_resi", 0.5))


def vae_rules(config: Mapping[str, Any]) -> Rules:
    """Official names of the tokenizer."""
    num_levels, num_convs = len(config["channel_multipliers"]), config["num_residual_convs"]
    usage_shape = (len(config["patch_nums"]), config["num_codes"])
    forms = {
        0: Rule("quantize.quant_resi.{k:[0-9]+}.{p}", "quantizer.residual_convs.{k}.{p}"),
        1: Rule("quantize.quant_resi.qresi.{p}", "quantizer.residual_convs.0.{p}"),
    }
    partial = Rule("quantize.quant_resi.qresi_ls.{k}.{p}", "quantizer.residual_convs.{k}.{p}")
    return [
        *encoder_rules(num_levels),
        *decoder_rules(num_levels),
        Rule("{conv:quant_conv|post_quant_conv}.{p}", "{conv}.{p}"),
        Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
        forms.get(num_convs, partial),
        # Running counts of code use, a training statistic.
        Derived("quantize.ema_vocab_hit_SV", lambda: torch.zeros(usage_shape), check=False),
    ]


def _trainer_patch_nums(name: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The sides of the token maps, which the official trainer writes beside its state dicts."""
    trainer = checkpoint.get("trainer")
    config = trainer.get("config") if isinstance(trainer, Mapping) else None
    return {name: config["patch_nums"]} if isinstance(config, Mapping) and "patch_nums" in config else {}


_VAE = Part(
    model=MultiScaleVQVAE,
    config=vae_config,
    rules=vae_rules,
    signature=("quantize.embedding.weight", "encoder.conv_in.weight"),
    wrappers=(("trainer", "vae_local"),),
    hints=lambda checkpoint: _trainer_patch_nums("v_patch_nums", checkpoint),
)
_TRANSFORMER = Part(
    model=VARTransformer,
    config=transformer_config,
    rules=transformer_rules,
    signature=("word_embed.weight", "pos_1LC", "lvl_embed.weight"),
    wrappers=(("trainer", "var_wo_ddp"),),
    hints=lambda checkpoint: _trainer_patch_nums("patch_nums", checkpoint),
)
CONVERTERS = {"var": {"transformer": _TRANSFORMER, "vae": _VAE}, "var_vqvae": {"vae": _VAE}}


_VAE_FILE = ReleasedFile("vae", "vae_ch160v4096z32.pth", 436)


def _released(name: str, file: str, megabytes: int, vae: ReleasedFile = _VAE_FILE) -> ReleasedCheckpoint:
    files = (ReleasedFile("transformer", file, megabytes), vae)
    return ReleasedCheckpoint(name, "var", "FoundationVision/var", files, "MIT")


RELEASED = (
    ReleasedCheckpoint("var-vae", "var", "FoundationVision/var", (_VAE_FILE,), "MIT"),
    _released("var-d12", "var_d12.pth", 535),
    _released("var-d16", "var_d16.pth", 1245),
    _released("var-d20", "var_d20.pth", 2410),
    _released("var-d24", "var_d24.pth", 4140),
    _released("var-d30", "var_d30.pth", 8050),
    # The same tokenizer with the token maps of 512 pixels, which its file does not tell.
    _released("var-d36", "var_d36.pth", 9440, replace(_VAE_FILE, original_config={"v_patch_nums": PATCH_NUMS_512})),
)
