"""LPIPS: the distance of two images in the features of VGG16.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924, equation 1,
variant ``vgg`` version 0.1. The weights are not part of hfgen: two files of the user are read, and nothing ever runs
with random ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn

# torchvision's vgg16().features up to relu5_3: a number is a 3x3 convolution followed by ReLU, M is a max pool.
VGG16_LAYOUT = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
FEATURE_LAYERS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
FEATURE_CHANNELS = (64, 128, 256, 512, 512)

VGG_FILES = ("vgg16.safetensors", "vgg16-397923af.pth")
LINEAR_FILES = ("vgg.safetensors", "vgg.pth")
HOW_TO_GET = (
    f"LPIPS needs two files in one folder or Hub repository: the VGG16 weights ({' or '.join(VGG_FILES)}; from "
    f"torchvision, https://download.pytorch.org/models/vgg16-397923af.pth) and the linear layers "
    f"({' or '.join(LINEAR_FILES)}; from https://github.com/richzhang/PerceptualSimilarity, "
    "lpips/weights/v0.1/vgg.pth). To train without LPIPS set --perceptual_weight 0."
)


class LPIPS(nn.Module):
    """Frozen LPIPS network; build it with :meth:`from_pretrained`.

    Parameters ``features.{n}`` are named as in torchvision's VGG16, ``lins.{k}`` are the (1, C, 1, 1) channel weights
    of the five feature layers.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16_LAYOUT:
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.lins = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in FEATURE_CHANNELS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, source: str | PathLike) -> LPIPS:
        """Load the weights from a folder or a Hub repository.

        Raises:
            ValueError: if a file is missing or does not hold the expected tensors; the message says where to get it.
        """
        model = cls()
        vgg = read_weights(find_weights(source, VGG_FILES, HOW_TO_GET))
        linear = read_weights(find_weights(source, LINEAR_FILES, HOW_TO_GET))
        weights = {name: vgg[name] for name in model.state_dict() if name in vgg}
        weights |= {
            f"lins.{k}": linear[f"lin{k}.model.1.weight"] for k in range(5) if f"lin{k}.model.1.weight" in linear
        }
        missing = sorted(set(model.state_dict()) - set(weights))
        if missing:
            raise ValueError(f"The LPIPS files in {source} lack {', '.join(missing)}. {HOW_TO_GET}")
        model.load_state_dict(weights)
        return model

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances (B,), at least 0, of ``images`` and ``references`` (B, 3, H, W) in [-1, 1]."""
        distance = images.new_zeros(images.shape[0])
        pairs = zip(self._features(images), self._features(references), self.lins, strict=True)
        for image_features, reference_features, weight in pairs:
            difference = (_unit_channels(image_features) - _unit_channels(reference_features)).square()
            distance = distance + (difference * weight).sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        hidden, selected = (images - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            hidden = layer(hidden)
            if number in FEATURE_LAYERS:
                selected.append(hidden)
        return selected


def _unit_channels(features: Tensor) -> Tensor:
    # The sum of squares is 0 where no channel fires; the clamp keeps the gradient of its root finite there.
    return features / (features.square().sum(dim=1, keepdim=True).clamp_min(1e-20).sqrt() + 1e-10)


def find_weights(source: str | PathLike, names: tuple[str, ...], how_to_get: str) -> Path:
    """The local path of the first of ``names`` that the folder or Hub repository ``source`` has.

    Raises:
        ValueError: there is none, or the repository cannot be read; the message ends with ``how_to_get``.
    """
    folder = Path(source)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"{folder} has no {' or '.join(names)}. {how_to_get}")
    for name in names:
        try:
            return Path(hf_hub_download(str(source), name))
        except LocalEntryNotFoundError as error:
            raise ValueError(
                f"{source} is no local folder and could not be reached on the Hub. {how_to_get}"
            ) from error
        except EntryNotFoundError:
            continue
        except (HFValidationError, HfHubHTTPError) as error:
            raise ValueError(
                f"{source} is neither a local folder nor a readable Hub repository. {how_to_get}"
            ) from error
    raise ValueError(f"The Hub repository {source} has no {' or '.join(names)}. {how_to_get}")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a safetensors or PyTorch file; nothing in it is run."""
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
