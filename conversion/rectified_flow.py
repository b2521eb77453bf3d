"""Rectified flow (arXiv 2209.03003): github.com/gnobitab/RectifiedFlow.

One part: ``transformer``, the DDPM++ of CIFAR-10 and the NCSN++ of the 256-pixel sets, from checkpoint_N.pth files
that hold {optimizer, model, ema, step}. The average is read; give the inner ``model`` instead of the file for the raw
weights. Those of LSUN need original_config={"data": {"centered": False}}: their images lie in [0, 1], which no tensor
tells. The network is a list of layers in the order in which they run, so their numbers follow from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hfgen.conversion.converter import OriginalConfig, Part, shape
from hfgen.conversion.rules import Drop, Rule, Rules
from hfgen.models.generators.ncsnpp import NCSNpp

_LAYERS = "module.all_modules"
_FREQUENCIES = f"{_LAYERS}.0.W"

# The parts of an official layer -> ours, by kind of layer.
_TENSORS: dict[str, dict[str, str]] = {
    "plain": {"": ""},
    "combine": {".Conv_0": ""},
    "residual": {
        ".GroupNorm_0": ".norm1",
        ".Conv_0": ".conv1",
        ".Dense_0": ".time_emb_proj",
        ".GroupNorm_1": ".norm2",
        ".Conv_1": ".conv2",
        ".Conv_2": ".conv_shortcut",
    },
    "attention": {".GroupNorm_0": ".norm"},
}
_PROJECTIONS = {"NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}

# Official arguments with one value in all configurations of rectified flow.
_FIXED = {
    "name": "ncsnpp",
    "normalization": "GroupNorm",
    "nonlinearity": "swish",
    "resamp_with_conv": True,
    "conditional": True,
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive_combine": "sum",
    "attention_type": "ddpm",
    "conv_size": 3,
}


@dataclass(frozen=True)
class Transpose:
    """A matrix (in, out) is the transposed weight of a linear layer."""

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.ndim != 2:
            raise ValueError(f"shape {tuple(tensor.shape)} where a matrix is needed")
        return (tensor.T,)

    inverse = forward


def layers(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The official list of layers for a configuration of :class:`NCSNpp`, as (kind, our name)."""
    depth, blocks = len(config["channel_multipliers"]), config["layers_per_block"]
    if config["time_embedding"] == "fourier":
        yield "fourier", "time_proj"
    yield "plain", "time_embed.linear_1"
    yield "plain", "time_embed.linear_2"
    yield "plain", "conv_in"
    for level in range(depth):
        name = f"down_levels.{level}"
        for block in range(blocks):
            yield "residual", f"{name}.resnets.{block}"
            if level in config["attention_levels"]:
                yield "attention", f"{name}.attentions.{block}"
        if level < depth - 1:
            yield "residual", f"{name}.downsampler"
            if config["pyramid"]:
                yield "combine", f"{name}.combiner"
    yield "residual", "mid_resnet_1"
    yield "attention", "mid_attention"
    yield "residual", "mid_resnet_2"
    for position, level in enumerate(reversed(range(depth))):
        name = f"up_levels.{position}"
        for block in range(blocks + 1):
            yield "residual", f"{name}.resnets.{block}"
        if level in config["attention_levels"]:
            yield "attention", f"{name}.attention"
        if config["pyramid"]:
            yield "plain", f"{name}.norm_out"
            yield "plain", f"{name}.conv_out"
        if level:
            yield "residual", f"{name}.upsampler"
    if not config["pyramid"]:
        yield "plain", "norm_out"
        yield "plain", "conv_out"


def unet_rules(config: Mapping[str, Any]) -> Rules:
    """Names of the official list of layers."""
    # The noise levels of score SDE, which rectified flow does not use; the official code loads without them, too.
    rules: list[Rule | Drop] = [Drop("module.sigmas")]
    for index, (kind, ours) in enumerate(layers(config)):
        official = f"{_LAYERS}.{index}"
        if kind == "fourier":
            rules.append(Rule(_FREQUENCIES, f"{ours}.frequencies"))
            continue
        rules += [
            Rule(f"{official}{theirs}.{{tensor:weight|bias}}", f"{ours}{mine}.{{tensor:weight|bias}}")
            for theirs, mine in _TENSORS[kind].items()
        ]
        if kind == "attention":
            for theirs, mine in _PROJECTIONS.items():
                rules.append(Rule(f"{official}.{theirs}.W", f"{ours}.attn.{mine}.weight", Transpose()))
                rules.append(Rule(f"{official}.{theirs}.b", f"{ours}.attn.{mine}.bias"))
    return rules


def unet_config(state: Mapping[str, Tensor], original: OriginalConfig) -> dict[str, Any]:
    """Constructor arguments of :class:`NCSNpp`.

    ``original`` takes the sections of the official configuration file, of which ``model`` and ``data`` count. Without
    them the tensors tell all but the image size, the resampling filter, the division by the time, the image range and
    the dropout: these are then those of the released CIFAR-10 and CelebA-HQ models.
    """
    model, data = (OriginalConfig(original.get(section, {})) for section in ("model", "data"))
    original.ignore("training", "sampling", "eval", "optim", "reflow", "seed", "device")
    fourier = _FREQUENCIES in state
    width, channels = shape(state, f"{_LAYERS}.{2 + fourier}.weight", 4)[:2]
    residuals = list(_residual_layers(state))
    downs = sum(layer.resamples for layer in residuals) // 2
    depth = downs + 1
    blocks = (len(residuals) - 2 - 2 * downs - depth) // (2 * depth)
    if blocks < 1:
        raise ValueError(f"The official checkpoint does not fit the model: only {len(residuals)} residual layers.")
    firsts = residuals[: depth * (blocks + 1) : blocks + 1]  # of each level on the way down
    levels = tuple(level for level, first in enumerate(firsts) if first.attention)
    pyramid = any(_is_combiner(state, name) for name in state)

    size = data.get("image_size", 256 if fourier else 32)
    data.read("num_channels", channels)
    data.ignore("dataset", "category", "random_flip", "uniform_dequantization", "root_path", "tfrecords_path")
    model.read("nf", width)
    model.read("num_res_blocks", blocks)
    multipliers = _equal(model, "ch_mult", [first.width // width for first in firsts])
    _equal(model, "attn_resolutions", [size // 2**level for level in levels])
    model.read("embedding_type", "fourier" if fourier else "positional")
    model.read("progressive", "output_skip" if pyramid else "none")
    model.read("progressive_input", "input_skip" if pyramid else "none")
    for name, value in _FIXED.items():
        model.fixed(name, value)
    fir = model.get("fir", fourier)
    if fir:
        _equal(model, "fir_kernel", [1, 3, 3, 1])
    divide = model.get("scale_by_sigma", fourier)
    if divide and not fourier:
        raise ValueError("original_config['model']['scale_by_sigma'] is True, which hfgen supports with Fourier only.")
    dropout = model.get("dropout", 0.0 if fourier else 0.15)
    centered = data.get("centered", True)
    model.ignore("fir_kernel", "init_scale", "fourier_scale", "ema_rate", "beta_min", "beta_max")
    model.ignore("sigma_min", "sigma_max", "num_scales")
    model.finish()
    data.finish()
    return {
        "sample_size": size,
        "in_channels": channels,
        "base_channels": width,
        "channel_multipliers": multipliers,
        "layers_per_block": blocks,
        "attention_levels": levels,
        "time_embedding": "fourier" if fourier else "positional",
        "resampling": "fir" if fir else "box",
        "pyramid": pyramid,
        "divide_by_time": divide,
        "unit_range": not centered,
        "dropout": dropout,
    }


@dataclass(frozen=True)
class _Residual:
    """A residual layer of the official list: width of its output, and what distinguishes it."""

    width: int
    resamples: bool
    attention: bool  # the next layer is one


def _residual_layers(state: Mapping[str, Tensor]) -> Iterator[_Residual]:
    """The residual layers in their order; only those that change the side map equal widths by a shortcut."""
    found = (re.match(rf"{_LAYERS}\.(\d+)\.Dense_0\.weight$", name) for name in state)
    for index in sorted(int(match[1]) for match in found if match):
        width, inputs = shape(state, f"{_LAYERS}.{index}.Conv_0.weight", 4)[:2]
        shortcut = f"{_LAYERS}.{index}.Conv_2.weight" in state
        yield _Residual(width, shortcut and inputs == width, f"{_LAYERS}.{index + 1}.NIN_0.W" in state)


def _is_combiner(state: Mapping[str, Tensor], name: str) -> bool:
    """Whether a tensor belongs to the layer that adds the input image to a level: a convolution without a norm."""
    layer, _, part = name.rpartition(".Conv_0.")
    return part == "weight" and f"{layer}.GroupNorm_0.weight" not in state


def _equal(original: OriginalConfig, name: str, value: Sequence[int]) -> tuple[int, ...]:
    """``original.read`` for a list or tuple."""
    original.read(name, value if isinstance(original.get(name, value), list) else tuple(value))
    return tuple(value)


@dataclass(frozen=True)
class AveragedPart(Part):
    """A part whose trainer saves the average of its weights as a list, in the order of the trained parameters."""

    def find(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        """The state dict with the averaged weights of a trainer's checkpoint, or a state dict as it is."""
        state, average = super().find(checkpoint), checkpoint.get("ema")
        if state is None or state is checkpoint or average is None:
            return state
        shadows = average.get("shadow_params") if isinstance(average, Mapping) else None
        trained = [name for name in state if name not in ("module.sigmas", _FREQUENCIES)]
        if not isinstance(shadows, Sequence) or [getattr(shadow, "shape", None) for shadow in shadows] != [
            state[name].shape for name in trained
        ]:
            raise ValueError(
                f"The average in the checkpoint ('ema') does not fit the {len(trained)} trained tensors of its "
                "'model' in number and shapes. Pass checkpoint['model'] to read the weights without average."
            )
        return {**state, **dict(zip(trained, shadows))}


UNET = AveragedPart(
    model=NCSNpp,
    config=unet_config,
    rules=unet_rules,
    signature=(f"{_LAYERS}.2.weight", f"{_LAYERS}.4.Conv_0.weight"),
    wrappers=(("model",),),
)
CONVERTERS = {"rectified_flow": {"transformer": UNET}}

# The weights are on Google Drive: see the links of the official README.
RELEASED = ()
