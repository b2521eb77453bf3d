"""The generators of TiTok (arXiv 2406.07550): github.com/bytedance/1d-tokenizer.

Two parts, ``image_bert`` (generator_titok_l32.bin, generator_titok_b64.bin) and ``uvit`` (generator_titok_s128.bin),
of the Hub repository fun-research/TiTok; also one repository per model with ``model.safetensors`` and the nested
configuration as ``config.json``. The names of the tensors tell which part a file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, count, shape
from hfgen.conversion.nested_config import lookup, section
from hfgen.conversion.rules import Drop, Rule, Rules, Split
from hfgen.models.generators.image_bert import ImageBert
from hfgen.models.generators.uvit import UViTBert

# What every nested configuration says about the network; the dropouts have official defaults.
_REQUIRED = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_seq_len",
    "condition_num_classes",
)
_NUM_HEADS = {768: 16, 1024: 16}  # of the released generators, by width


def _settings(original: OriginalConfig) -> OriginalConfig:
    """The entries of ``model.generator`` with ``codebook_size``, from the nested or the flat form."""
    if original.get("model", None) is None:
        return original
    config = {"model": original.get("model", None)}
    generator = section(config, "model.generator", _REQUIRED)
    # What the same file says about training and, with "vit_sizes", about the tokenizer.
    original.ignore("experiment", "dataset", "losses", "optimizer", "lr_scheduler", "training", "vit_sizes")
    return OriginalConfig({**generator, "codebook_size": lookup(config, "model.vq_model.codebook_size")})


def _generator_config(
    original: OriginalConfig, vocabulary: int, num_codes: int, positions: int, width: int, hidden: int, layers: int
) -> dict[str, Any]:
    """What both generators of TiTok have in common; names are those of ``model.generator`` in the official config."""
    heads = original.get("num_attention_heads", _NUM_HEADS.get(width))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"The tensors do not tell the number of heads of width {width} (given: {heads}): pass a divisor as "
            "original_config={'num_attention_heads': ...}."
        )
    # Settings of the sampler, which MaskedTokenScheduler has as presets, and of the memory in training.
    original.ignore("num_steps", "guidance_scale", "guidance_decay", "guidance_scale_pow", "randomize_temperature")
    original.ignore("softmax_temperature_annealing", "use_checkpoint")
    return {
        "num_codes": original.read("codebook_size", num_codes),
        "num_tokens": original.read("image_seq_len", positions - 1),
        "num_classes": original.read("condition_num_classes", vocabulary - num_codes - 2),
        "hidden_size": original.read("hidden_size", width),
        "num_layers": original.read("num_hidden_layers", layers),
        "num_attention_heads": heads,
        "intermediate_size": original.read("intermediate_size", hidden),
        "class_dropout": original.get("class_label_dropout", 0.1),
    }


def image_bert_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`ImageBert`."""
    settings = _settings(original)
    settings.fixed("model_type", "ViT")
    vocabulary, width = shape(state, "model.embeddings.word_embeddings.weight", 2)
    config = _generator_config(
        settings,
        vocabulary,
        shape(state, "model.lm_head.weight", 2)[0],
        shape(state, "model.embeddings.position_embeddings.weight", 2)[0],
        width,
        shape(state, "model.encoder.layer.0.intermediate.dense.weight", 2)[0],
        count(state, r"model\.encoder\.layer\.(\d+)\."),
    )
    dropouts = {"dropout": settings.get("dropout", 0.1), "attention_dropout": settings.get("attn_drop", 0.1)}
    settings.finish()
    return config | dropouts


def image_bert_rules(config: Mapping[str, Any]) -> Rules:
    """Official names of ImageBert."""
    return [
        Drop("model.embeddings.position_ids"),  # 0, 1, 2, ...: written by old versions of transformers
        Rule("model.lm_head.{p}", "lm_head.{p}"),
        Rule("model.{name:.+}", "bert.{name}"),
    ]


def uvit_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`UViTBert`."""
    settings = _settings(original)
    settings.fixed("model_type", "UViT")
    settings.ignore("dropout", "attn_drop")  # the official class does not use them
    vocabulary, width = shape(state, "embeddings.weight", 2)
    config = _generator_config(
        settings,
        vocabulary,
        shape(state, "lm_head.weight", 2)[0],
        shape(state, "pos_embed", 3)[1],
        width,
        shape(state, "mid_block.mlp.fc1.weight", 2)[0],
        2 * count(state, r"in_blocks\.(\d+)\."),
    )
    settings.finish()
    return config


def uvit_rules(config: Mapping[str, Any]) -> Rules:
    """Official names of UViTBert."""
    block = r"{block:mid_block|in_blocks\.\d+|out_blocks\.\d+}"
    query = tuple(f"{block}.attn.{name}.weight" for name in ("to_q", "to_k", "to_v"))
    return [
        Rule("embeddings.weight", "token_embed.weight"),
        Rule("pos_embed", "position_embed"),
        Rule(f"{block}.attn.qkv.weight", query, Split(3)),
        Rule(f"{block}.attn.proj.{{p}}", f"{block}.attn.to_out.0.{{p}}"),
        Rule(f"{block}.mlp.fc1.{{p}}", f"{block}.ff.net.0.proj.{{p}}"),
        Rule(f"{block}.mlp.fc2.{{p}}", f"{block}.ff.net.2.{{p}}"),
        Rule(f"{block}.{{layer:norm1|norm2|skip_linear}}.{{p}}", f"{block}.{{layer}}.{{p}}"),
        Rule("norm.{p}", "norm_out.{p}"),
        Rule("lm_head.{p}", "proj_out.{p}"),
    ]


IMAGE_BERT = Part(
    model=ImageBert,
    config=image_bert_config,
    rules=image_bert_rules,
    signature=("model.embeddings.word_embeddings.weight", "model.lm_head.weight"),
    config_file="config.json",
)
UVIT = Part(
    model=UViTBert,
    config=uvit_config,
    rules=uvit_rules,
    signature=("pos_embed", "mid_block.attn.qkv.weight", "lm_head.weight"),
    config_file="config.json",
)
GENERATORS = {"image_bert": IMAGE_BERT, "uvit": UVIT}
