"""The distance of two images in the ImageNet logits of ConvNeXt-S, TiTok's perceptual loss (arXiv 2406.07550).

The network is transformers' ``ConvNextForImageClassification`` (Liu et al., arXiv 2201.03545) with torchvision's
weights, which are not part of hfgen: a file of the user is read, and nothing ever runs with random ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from hfgen.losses.perceptual import find_weights, read_weights

FILES = ("convnext_small.safetensors", "convnext_small-0c510722.pth")
HOW_TO_GET = (
    f"The ConvNeXt distance needs torchvision's weights ({' or '.join(FILES)}; from "
    "https://download.pytorch.org/models/convnext_small-0c510722.pth) in a folder or Hub repository. To train without "
    "it set its weight to 0."
)
_IMAGE_SIZE = 224
_STEM = {"features.0.0": "convnext.embeddings.patch_embeddings", "features.0.1": "convnext.embeddings.layernorm"}
_HEAD = {"classifier.0": "convnext.layernorm", "classifier.2": "classifier"}
_BLOCK = {"block.0": "dwconv", "block.2": "layernorm", "block.3": "pwconv1", "block.5": "pwconv2"}


class ConvNeXtDistance(nn.Module):
    """Frozen; build it with :meth:`from_pretrained`.

    Args:
        dims, depths: width and number of blocks of each stage; those of ConvNeXt-S by default.
        num_classes: number of logits.
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (3, 3, 27, 3),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        config = ConvNextConfig(
            hidden_sizes=list(dims), depths=list(depths), num_labels=num_classes, layer_norm_eps=1e-6
        )
        self.network = ConvNextForImageClassification(config)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, source: str | PathLike) -> ConvNeXtDistance:
        """Load torchvision's weights from a folder or a Hub repository.

        Raises:
            ValueError: if the file is missing or does not hold the expected tensors; the message says where to get it.
        """
        return cls.from_state_dict(read_weights(find_weights(source, FILES, HOW_TO_GET)))

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor]) -> ConvNeXtDistance:
        """From tensors with torchvision's names, whose shapes tell the size.

        Raises:
            ValueError: tensors are missing, unknown or of another shape.
        """
        renamed = {_transformers_name(name): value for name, value in weights.items()}
        renamed |= {name: value.flatten() for name, value in renamed.items() if name.endswith("layer_scale_parameter")}
        dims, depths = [], []
        while (name := f"convnext.encoder.stages.{len(dims)}.layers.0.dwconv.weight") in renamed:
            prefix = name.removesuffix("0.dwconv.weight")
            dims.append(len(renamed[name]))
            depths.append(1 + max(int(key[len(prefix) :].split(".")[0]) for key in renamed if key.startswith(prefix)))
        if not dims or "classifier.weight" not in renamed:
            raise ValueError(f"These are no ConvNeXt weights with the names of torchvision. {HOW_TO_GET}")
        model = cls(dims, depths, len(renamed["classifier.weight"]))
        try:
            model.network.load_state_dict(renamed)
        except RuntimeError as error:
            raise ValueError(f"The ConvNeXt weights do not fit. {error} {HOW_TO_GET}") from error
        return model

    def train(self, mode: bool = True) -> ConvNeXtDistance:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Mean squared difference (B,) of the logits of ``images`` and ``references`` (B, 3, H, W) in [-1, 1]."""
        return (self.logits(images) - self.logits(references)).square().mean(dim=1)

    def logits(self, images: Tensor) -> Tensor:
        """(B, num_classes) of images (B, 3, H, W) in [-1, 1], which are resized to 224 pixels."""
        resized = F.interpolate(
            images * 0.5 + 0.5, size=_IMAGE_SIZE, mode="bilinear", align_corners=False, antialias=True
        )
        return self.network((resized - self.mean) / self.std).logits


class MeanDistance(nn.Module):
    """The weighted mean sum w_k d_k / sum w_k of several distances, as TiTok's "lpips-convnext_s-1.0-0.1".

    Args:
        distances: modules of (images, references), both (B, 3, H, W) in [-1, 1], that return (B,).
        weights: w_k.
    """

    def __init__(self, distances: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if len(distances) != len(weights) or not distances or sum(weights) <= 0 or min(weights) < 0:
            raise ValueError(f"{len(distances)} distances need as many weights of at least 0, got {tuple(weights)}.")
        self.distances = nn.ModuleList(distances)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """(B,)."""
        return sum(
            weight * distance(images, references)
            for weight, distance in zip(self.weights, self.distances, strict=True)
        )


def _transformers_name(name: str) -> str:
    """torchvision's name of a tensor to that of transformers; an unknown one stays."""
    stem, _, parameter = name.rpartition(".")
    if stem in _STEM | _HEAD:
        return f"{(_STEM | _HEAD)[stem]}.{parameter}"
    if found := re.fullmatch(r"features\.(\d+)\.(\d+)\.layer_scale", name):
        return f"convnext.encoder.stages.{int(found[1]) // 2}.layers.{found[2]}.layer_scale_parameter"
    if found := re.fullmatch(r"features\.(\d+)\.(\d+)\.(block\.\d+)", stem):
        layer = _BLOCK.get(found[3], found[3])
        return f"convnext.encoder.stages.{int(found[1]) // 2}.layers.{found[2]}.{layer}.{parameter}"
    if found := re.fullmatch(r"features\.(\d+)\.([01])", stem):
        return f"convnext.encoder.stages.{int(found[1]) // 2}.downsampling_layer.{found[2]}.{parameter}"
    return name
