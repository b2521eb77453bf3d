"""Rules for the convolutional encoder and decoder that VQGAN introduced and many official tokenizers repeat.

The hfgen side is diffusers' ``Encoder`` and ``Decoder``.
"""

from __future__ import annotations

from hfgen.conversion.rules import Chain, Rule, Split, Squeeze

_FUSED_1X1 = Chain((Squeeze((2, 3)), Split(3)))


def encoder_rules(num_levels: int) -> list[Rule]:
    """Official ``encoder.*`` to diffusers' ``Encoder`` with ``num_levels`` resolutions."""
    rules = []
    for level in range(num_levels):
        official, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        rules += _level_rules(official, ours)
        rules.append(Rule(f"{official}.downsample.conv.{{p}}", f"{ours}.downsamplers.0.conv.{{p}}"))
    return rules + _ends_rules("encoder")


def decoder_rules(num_levels: int) -> list[Rule]:
    """Official ``decoder.*`` to diffusers' ``Decoder``; official level 0 is the finest, diffusers' the coarsest."""
    rules = []
    for level in range(num_levels):
        official, ours = f"decoder.up.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"
        rules += _level_rules(official, ours)
        rules.append(Rule(f"{official}.upsample.conv.{{p}}", f"{ours}.upsamplers.0.conv.{{p}}"))
    return rules + _ends_rules("decoder")


def _level_rules(official: str, ours: str) -> list[Rule]:
    return _resnet_rules(f"{official}.block.{{j}}", f"{ours}.resnets.{{j}}") + _attention_rules(
        f"{official}.attn.{{j}}", f"{ours}.attentions.{{j}}"
    )


def _ends_rules(side: str) -> list[Rule]:
    """The middle and the convolutions at both ends."""
    return [
        *_resnet_rules(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"),
        *_attention_rules(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"),
        *_resnet_rules(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"),
        Rule(f"{side}.norm_out.{{p}}", f"{side}.conv_norm_out.{{p}}"),
        Rule(f"{side}.{{conv:conv_in|conv_out}}.{{p}}", f"{side}.{{conv}}.{{p}}"),
    ]


def _resnet_rules(official: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{official}.nin_shortcut.{{p}}", f"{ours}.conv_shortcut.{{p}}"),
        Rule(f"{official}.{{layer:norm1|conv1|norm2|conv2}}.{{p}}", f"{ours}.{{layer}}.{{p}}"),
    ]


def _attention_rules(official: str, ours: str) -> list[Rule]:
    """Self-attention with one 1x1 convolution for query, key and value."""
    qkv = ("to_q", "to_k", "to_v")
    return [
        Rule(f"{official}.norm.{{p}}", f"{ours}.group_norm.{{p}}"),
        Rule(f"{official}.qkv.weight", tuple(f"{ours}.{name}.weight" for name in qkv), _FUSED_1X1),
        Rule(f"{official}.qkv.bias", tuple(f"{ours}.{name}.bias" for name in qkv), Split(3)),
        Rule(f"{official}.proj_out.weight", f"{ours}.to_out.0.weight", Squeeze((2, 3))),
        Rule(f"{official}.proj_out.bias", f"{ours}.to_out.0.bias"),
    ]
