"""The VQGAN of MaskGIT (arXiv 2202.04200), in both forms in which its weights were published.

- The PyTorch port of github.com/huggingface/open-muse, which github.com/bytedance/1d-tokenizer also uses:
  maskgit-vqgan-imagenet-f16-256.bin in the Hub repository fun-research/TiTok.
- The original of github.com/google-research/maskgit: flax msgpack files tokenizer_imagenet{256,512}_checkpoint from
  storage.googleapis.com/maskgit-public/checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, ReleasedCheckpoint, ReleasedFile, count, shape
from hfgen.conversion.rules import Rule, Rules, convert
from hfgen.models.tokenizers.maskgit_vqgan import MaskGITVQGAN

_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
_FLAX_BLOCK = {
    "GroupNorm_0": "norm1",
    "GroupNorm_1": "norm2",
    "Conv_0": "conv1",
    "Conv_1": "conv2",
    "Conv_2": "nin_shortcut",
}


def vqgan_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`MaskGITVQGAN` from the state dict of the port."""
    num_codes, latent_channels = shape(state, "quantize.embedding.weight", 2)
    return {
        "num_codes": original.read("num_embeddings", num_codes),
        "latent_channels": original.read("z_channels", latent_channels),
        "in_channels": original.read("num_channels", shape(state, "encoder.conv_in.weight", 4)[1]),
        **_stack_config(state, original),
        "image_size": original.get("resolution", 256),
        "commitment_weight": original.get("commitment_cost", 0.25),
        "entropy_weight": original.get("entropy_loss_ratio", 0.1),
        "entropy_temperature": original.get("entropy_temperature", 0.01),
        "entropy_assignment": original.get("entropy_loss_type", "softmax"),
        "dropout": original.get("dropout", 0.0),
    }


def _stack_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    base_channels = shape(state, "encoder.conv_in.weight", 4)[0]
    num_levels = count(state, r"encoder\.down\.(\d+)\.")
    widths = [shape(state, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(num_levels)]
    multipliers = [width // base_channels for width in widths]
    given = original.get("channel_mult", multipliers)
    if list(given) != multipliers:
        raise ValueError(f"original_config['channel_mult'] is {given!r}, but the tensors say {multipliers!r}.")
    original.read("num_resolutions", num_levels)
    return {
        "base_channels": original.read("hidden_channels", base_channels),
        "channel_multipliers": tuple(multipliers),
        "layers_per_block": original.read("num_res_blocks", count(state, r"encoder\.down\.0\.block\.(\d+)\.")),
    }


def vqgan_rules(config: Mapping[str, Any]) -> Rules:
    """Names of the port."""
    return [
        *encoder_rules(),
        *decoder_rules(len(config["channel_multipliers"])),
        Rule("quantize.embedding.weight", "quantizer.embedding.weight"),
    ]


def encoder_rules() -> list[Rule]:
    """``encoder.*`` of the port to :class:`~hfgen.models.layers.maskgit_conv.MaskGITEncoder`."""
    return [
        *_block_rules("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.{j}"),
        *_block_rules("encoder.mid.{j}", "encoder.mid_block.{j}"),
        Rule("encoder.{layer:conv_in|norm_out|conv_out}.{p}", "encoder.{layer}.{p}"),
    ]


def decoder_rules(num_levels: int, official: str = "decoder", ours: str = "decoder") -> list[Rule]:
    """``decoder.*`` of the port to :class:`~hfgen.models.layers.maskgit_conv.MaskGITDecoder`.

    The port counts levels from the finest, hfgen in the order in which they run.
    """
    rules = _block_rules(f"{official}.mid.{{j}}", f"{ours}.mid_block.{{j}}")
    for step in range(num_levels):
        level = num_levels - 1 - step
        rules += _block_rules(f"{official}.up.{level}.block.{{j}}", f"{ours}.up_blocks.{step}.{{j}}")
        if level > 0:
            rules.append(Rule(f"{official}.up.{level}.upsample_conv.{{p}}", f"{ours}.upsamplers.{step}.{{p}}"))
    rules.append(Rule(f"{official}.{{layer:conv_in|norm_out|conv_out}}.{{p}}", f"{ours}.{{layer}}.{{p}}"))
    return rules


def _block_rules(official: str, ours: str) -> list[Rule]:
    return [Rule(f"{official}.{name}.{{p}}", f"{ours}.{target}.{{p}}") for name, target in _BLOCK.items()]


@dataclass(frozen=True)
class Kernel:
    """A flax kernel (height, width, in, out) is a PyTorch weight (out, in, height, width)."""

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.ndim != 4:
            raise ValueError(f"{tuple(tensor.shape)} has not the 4 dimensions of a kernel")
        return (tensor.permute(3, 2, 0, 1),)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.permute(2, 3, 1, 0),)


def flax_rules(num_levels: int, layers_per_block: int) -> Rules:
    """Names of the original to those of the port; flax numbers the layers of each side in the order of their use."""
    rules = [Rule("params.quantizer.codebook", "quantize.embedding.weight")]
    last = num_levels * layers_per_block
    for number in range(last + layers_per_block):
        level, block = divmod(number, layers_per_block)
        down = f"down.{level}.block.{block}" if number < last else f"mid.{number - last}"
        up = f"up.{num_levels - level}.block.{block}" if level > 0 else f"mid.{number}"
        for side, name in (("encoder", down), ("decoder", up)):
            for layer, target in _FLAX_BLOCK.items():
                rules += _flax_layer(f"{side}.ResBlock_{number}.{layer}", f"{side}.{name}.{target}")
    convs = {"encoder.Conv_0": "encoder.conv_in", "encoder.Conv_1": "encoder.conv_out"}
    convs |= {"decoder.Conv_0": "decoder.conv_in", f"decoder.Conv_{num_levels}": "decoder.conv_out"}
    convs |= {f"decoder.Conv_{n}": f"decoder.up.{num_levels - n}.upsample_conv" for n in range(1, num_levels)}
    norms = {f"{side}.GroupNorm_0": f"{side}.norm_out" for side in ("encoder", "decoder")}
    for name, target in (convs | norms).items():
        rules += _flax_layer(name, target)
    return rules


def _flax_layer(name: str, target: str) -> list[Rule]:
    if "GroupNorm" in name:
        weight = Rule(f"params.{name}.scale", f"{target}.weight")
    else:
        weight = Rule(f"params.{name}.kernel", f"{target}.weight", Kernel())
    return [weight, Rule(f"params.{name}.bias", f"{target}.bias")]


class _VQGAN(Part):
    """Also finds the original's parameters, and returns them under the names of the port."""

    def find(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        if "params.quantizer.codebook" not in checkpoint:
            return super().find(checkpoint)
        # The decoder has one convolution at each end and one between two levels.
        num_levels = count(checkpoint, r"params\.decoder\.Conv_(\d+)\.") - 1
        num_blocks = count(checkpoint, r"params\.decoder\.ResBlock_(\d+)\.")
        if num_levels < 1 or num_blocks % (num_levels + 1) or not 0 < num_blocks <= len(checkpoint):
            raise ValueError(
                f"{num_levels + 1} convolutions and {num_blocks} residual blocks in params.decoder make no MaskGIT "
                "VQGAN, which has as many blocks in the middle as in each level."
            )
        return convert(checkpoint, flax_rules(num_levels, num_blocks // (num_levels + 1)))


_VQ_MODEL = _VQGAN(
    model=MaskGITVQGAN,
    config=vqgan_config,
    rules=vqgan_rules,
    signature=("quantize.embedding.weight", "encoder.conv_in.weight", "encoder.mid.0.conv1.weight"),
)
CONVERTERS = {"maskgit_vqgan": {"vq_model": _VQ_MODEL}}

RELEASED = (
    ReleasedCheckpoint(
        "maskgit-vqgan-256",
        "maskgit_vqgan",
        "fun-research/TiTok",
        (ReleasedFile("vq_model", "maskgit-vqgan-imagenet-f16-256.bin", 218),),
        "Apache-2.0",
    ),
)
