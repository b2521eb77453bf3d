"""TiTok and TA-TiTok (arXiv 2406.07550, 2501.07730): github.com/bytedance/1d-tokenizer.

Weights were published as bare state dicts (``*.bin`` in the Hub repositories fun-research/TiTok and TA-TiTok) and as
one repository per model with ``model.safetensors`` and the nested training configuration as ``config.json``. The
shapes tell a released model; ``original_config`` takes that nested configuration, or the entries of its
``model.vq_model`` with ``crop_size``, for models of other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, ReleasedCheckpoint, ReleasedFile, count, shape
from hfgen.conversion.maskgit_vqgan import decoder_rules
from hfgen.conversion.nested_config import lookup, section
from hfgen.conversion.rules import Drop, Rule, Rules, Split, Squeeze
from hfgen.conversion.titok_generators import GENERATORS
from hfgen.models.tokenizers.titok import SIZES, TiTok

_HEAD_DIM = 64  # of every published size
# What every nested configuration says; quantize_mode, is_legacy and finetune_decoder have official defaults.
_REQUIRED = (
    "token_size",
    "vit_enc_model_size",
    "vit_dec_model_size",
    "vit_enc_patch_size",
    "vit_dec_patch_size",
    "num_latent_tokens",
)
_REQUIRED_VQ = ("codebook_size", "use_l2_norm", "commitment_cost")  # the continuous models have none of these


def titok_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`TiTok`."""
    settings = _settings(original)
    two_stage = settings.read("is_legacy", "decoder.ffn.2.weight" in state)
    continuous = settings.read("quantize_mode", "vq" if "quantize.embedding.weight" in state else "vae") == "vae"
    clustering = settings.get("clustering_vq", "quantize.embed_prob" in state) and not continuous
    channels = shape(state, "decoder.decoder_embed.weight", 2)[1]
    encoder_grid = _grid(state, "encoder")
    encoder_patch = settings.read("vit_enc_patch_size", shape(state, "encoder.patch_embed.weight", 4)[-1])
    image_size = settings.read("crop_size", encoder_grid * encoder_patch)
    arguments = {
        "image_size": image_size,
        "encoder_patch_size": encoder_patch,
        "decoder_patch_size": settings.read("vit_dec_patch_size", image_size // _grid(state, "decoder")),
        "num_latent_tokens": settings.read("num_latent_tokens", shape(state, "latent_tokens", 2)[0]),
        "latent_channels": settings.read("token_size", channels),
        "bottleneck": "kl" if continuous else "vq",
        # Two-stage models compare unit vectors, the later ones do not.
        "normalize_codes": settings.get("use_l2_norm", two_stage),
        "codebook_update": "clustering" if clustering else "gradient",
        "commitment_weight": settings.get("commitment_cost", 0.25),
        "two_stage": two_stage,
        **_sizes(state, "encoder", "vit_enc_model_size", settings),
        **_sizes(state, "decoder", "vit_dec_model_size", settings),
        **_pixel_decoder(state, two_stage, settings),
        **_text(state, settings),
    }
    if continuous:
        settings.ignore("codebook_size")
    else:
        num_codes = shape(state, "quantize.embedding.weight", 2)[0]
        arguments["num_codes"] = settings.read("codebook_size", num_codes)
    settings.ignore("vit_sizes")
    settings.finish()
    return arguments


def _settings(original: OriginalConfig) -> OriginalConfig:
    """The entries of ``model.vq_model`` and ``crop_size``, from the nested or the flat form."""
    if original.get("model", None) is None:
        return original
    config = {name: original.get(name, {}) for name in ("model", "dataset")}
    vq_model = section(config, "model.vq_model", _REQUIRED)
    if vq_model.get("quantize_mode", "vq") == "vq":
        section(config, "model.vq_model", _REQUIRED_VQ)
    crop_size = lookup(config, "dataset.preprocessing.crop_size")
    # Training settings beside the model, and sizes that are not official.
    original.ignore("experiment", "losses", "optimizer", "lr_scheduler", "training")
    return OriginalConfig({**vq_model, "crop_size": crop_size, "vit_sizes": original.get("vit_sizes", {})})


def _grid(state: Mapping[str, Tensor], side: str) -> int:
    """Patches along each side of the image: one position is the class token's."""
    positions = shape(state, f"{side}.positional_embedding", 2)[0] - 1
    grid = math.isqrt(positions)
    if grid < 1 or grid * grid != positions:
        raise ValueError(f"{side}.positional_embedding has {positions} positions beside the class; expected a square.")
    return grid


def _sizes(state: Mapping[str, Tensor], side: str, name: str, settings: OriginalConfig) -> dict[str, int]:
    """Width, layers and heads; no tensor has a dimension for the heads."""
    width = shape(state, f"{side}.class_embedding", 2)[1]
    layers = count(state, rf"{side}\.transformer\.(\d+)\.")
    named = {key: {"width": w, "layers": n, "heads": h} for key, (w, n, h) in SIZES.items()}
    more = settings.get("vit_sizes", {})
    if not isinstance(more, Mapping):
        raise ValueError(f"original_config['vit_sizes'] is {more!r}; expected names with width, layers and heads.")
    named |= more
    given = settings.get(name, None)
    if given is None:
        if width % _HEAD_DIM:
            raise ValueError(f"The tensors do not tell the heads of the {side}, whose width is {width}: pass {name}.")
        heads = width // _HEAD_DIM
    elif not isinstance(given, str) or given not in named:
        raise ValueError(
            f"original_config has {name} = {given!r}; known are {', '.join(named)}. Pass others as "
            "original_config['vit_sizes'] = {name: {'width': ..., 'layers': ..., 'heads': ...}}."
        )
    else:
        size = {key: lookup({"vit_sizes": named}, f"vit_sizes.{given}.{key}") for key in ("width", "layers", "heads")}
        heads = size["heads"]
        if (size["width"], size["layers"]) != (width, layers):
            raise ValueError(
                f"original_config has {name} = {given!r} with width {size['width']} and {size['layers']} layers, but "
                f"the {side} has width {width} and {layers} layers."
            )
    return {f"{side}_width": width, f"{side}_layers": layers, f"{side}_heads": heads}


def _pixel_decoder(state: Mapping[str, Tensor], two_stage: bool, settings: OriginalConfig) -> dict[str, Any]:
    present = settings.read("finetune_decoder", "pixel_quantize.embedding.weight" in state)
    arguments = {"num_proxy_codes": shape(state, "decoder.ffn.2.weight", 4)[0]} if two_stage else {}
    if not present:
        return arguments
    levels = count(state, r"pixel_decoder\.up\.(\d+)\.")
    return arguments | {
        "proxy_channels": shape(state, "pixel_quantize.embedding.weight", 2)[1],
        "pixel_channels": tuple(
            shape(state, f"pixel_decoder.up.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)
        ),
        "pixel_layers_per_block": count(state, r"pixel_decoder\.mid\.(\d+)\."),
    }


def _text(state: Mapping[str, Tensor], settings: OriginalConfig) -> dict[str, int]:
    name = "decoder.text_guidance_positional_embedding"
    if name not in state:
        settings.ignore("text_context_length", "text_embed_dim")
        return {}
    return {
        "text_length": settings.read("text_context_length", shape(state, name, 2)[0]),
        "text_channels": settings.read("text_embed_dim", shape(state, "decoder.text_guidance_proj.weight", 2)[1]),
    }


def titok_rules(config: Mapping[str, Any]) -> Rules:
    """Official names."""
    conv = Squeeze((2, 3))  # 1x1 convolutions, which are linear layers of tokens
    rules: list[Rule | Drop] = [
        *_transformer_rules("encoder"),
        *_transformer_rules("decoder"),
        Rule("latent_tokens", "encoder.latent_tokens"),
        Rule("encoder.patch_embed.{p}", "encoder.patch_embed.{p}"),
        Rule("encoder.conv_out.weight", "encoder.proj_out.weight", conv),
        Rule("encoder.conv_out.bias", "encoder.proj_out.bias"),
        Rule("decoder.mask_token", "decoder.mask_token"),
        Rule("decoder.decoder_embed.{p}", "decoder.latent_proj.{p}"),
        Rule("decoder.text_guidance_proj.{p}", "decoder.text_proj.{p}"),
        Rule("decoder.text_guidance_positional_embedding", "decoder.text_position_embed"),
        Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
    ]
    if config["codebook_update"] == "clustering":
        rules.append(Rule("quantize.embed_prob", "quantizer.usage"))
    else:
        rules.append(Drop("quantize.embed_prob"))  # a statistic of training
    if config["two_stage"]:
        rules.append(Rule("decoder.ffn.{k}.weight", "code_head.{k}.weight", conv))
        rules.append(Rule("decoder.ffn.{k}.bias", "code_head.{k}.bias"))
    else:
        rules.append(Rule("decoder.ffn.0.weight", "patch_head.weight", conv))
        rules.append(Rule("decoder.ffn.0.bias", "patch_head.bias"))
        rules.append(Rule("decoder.conv_out.{p}", "conv_out.{p}"))
    if config["pixel_channels"] is not None:
        rules.append(Rule("pixel_quantize.embedding.weight", "pixel_codebook"))
        rules += decoder_rules(len(config["pixel_channels"]), "pixel_decoder", "pixel_decoder")
    return rules


def _transformer_rules(side: str) -> list[Rule]:
    official, ours = f"{side}.transformer.{{i}}", f"{side}.blocks.{{i}}"
    qkv = [f"{ours}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
    return [
        Rule(f"{side}.class_embedding", f"{side}.class_embed"),
        Rule(f"{side}.positional_embedding", f"{side}.position_embed"),
        Rule(f"{side}.latent_token_positional_embedding", f"{side}.latent_position_embed"),
        Rule(f"{side}.ln_pre.{{p}}", f"{side}.norm_pre.{{p}}"),
        Rule(f"{side}.ln_post.{{p}}", f"{side}.norm_post.{{p}}"),
        Rule(f"{official}.ln_1.{{p}}", f"{ours}.norm1.{{p}}"),
        Rule(f"{official}.attn.in_proj_weight", tuple(f"{name}.weight" for name in qkv), Split(3)),
        Rule(f"{official}.attn.in_proj_bias", tuple(f"{name}.bias" for name in qkv), Split(3)),
        Rule(f"{official}.attn.out_proj.{{p}}", f"{ours}.attn.to_out.0.{{p}}"),
        Rule(f"{official}.ln_2.{{p}}", f"{ours}.norm2.{{p}}"),
        Rule(f"{official}.mlp.c_fc.{{p}}", f"{ours}.ff.net.0.proj.{{p}}"),
        Rule(f"{official}.mlp.c_proj.{{p}}", f"{ours}.ff.net.2.{{p}}"),
    ]


_VQ_MODEL = Part(
    model=TiTok,
    config=titok_config,
    rules=titok_rules,
    signature=("latent_tokens", "encoder.latent_token_positional_embedding", "decoder.mask_token"),
    config_file="config.json",
)
CONVERTERS = {"titok": {"vq_model": _VQ_MODEL, **GENERATORS}}


def _released(name: str, repo: str, path: str, megabytes: int) -> ReleasedCheckpoint:
    return ReleasedCheckpoint(name, "titok", repo, (ReleasedFile("vq_model", path, megabytes),), "Apache-2.0")


def _titok(name: str, path: str, megabytes: int) -> ReleasedCheckpoint:
    return _released(name, "fun-research/TiTok", path, megabytes)


def _pipeline(
    name: str, part: str, generator: str, tokenizer: str, generator_mb: int, tokenizer_mb: int
) -> ReleasedCheckpoint:
    files = (ReleasedFile("vq_model", tokenizer, tokenizer_mb), ReleasedFile(part, generator, generator_mb))
    return ReleasedCheckpoint(name, "titok", "fun-research/TiTok", files, "Apache-2.0")


def _tatitok(name: str, version: str, megabytes: int) -> ReleasedCheckpoint:
    return _released(name, f"turkeyju/tokenizer_tatitok_{version}", "model.safetensors", megabytes)


RELEASED = (
    _titok("titok-l-32", "tokenizer_titok_l32.bin", 2564),
    _titok("titok-b-64", "tokenizer_titok_b64.bin", 819),
    _titok("titok-s-128", "tokenizer_titok_s128.bin", 335),
    _titok("titok-bl-64-vq", "tokenizer_titok_bl64_vq8k.bin", 1560),
    _titok("titok-bl-128-vq", "tokenizer_titok_bl128_vq8k.bin", 1561),
    _titok("titok-sl-256-vq", "tokenizer_titok_sl256_vq8k.bin", 1321),
    _titok("titok-ll-32-vae", "titok_ll32_vae_c16.bin", 2427),
    _titok("titok-bl-64-vae", "titok_bl64_vae_c16.bin", 1558),
    _titok("titok-bl-128-vae", "titok_bl128_vae_c16.bin", 1558),
    _pipeline("titok-l-32-imagenet", "image_bert", "generator_titok_l32.bin", "tokenizer_titok_l32.bin", 709, 2564),
    _pipeline("titok-b-64-imagenet", "image_bert", "generator_titok_b64.bin", "tokenizer_titok_b64.bin", 709, 819),
    _pipeline("titok-s-128-imagenet", "uvit", "generator_titok_s128.bin", "tokenizer_titok_s128.bin", 1180, 335),
    _tatitok("tatitok-bl-32-vq", "bl32_vq", 1563),
    _tatitok("tatitok-bl-64-vq", "bl64_vq", 1563),
    _tatitok("tatitok-bl-128-vq", "bl128_vq", 1564),
    _tatitok("tatitok-bl-32-vae", "bl32_vae", 1561),
    _tatitok("tatitok-bl-64-vae", "bl64_vae", 1561),
    _tatitok("tatitok-sl-128-vae", "sl128_vae", 1321),
)
