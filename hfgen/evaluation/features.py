"""Features of images for distances between sets of images."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from hfgen.counters import generator
from hfgen.data.transforms import to_pixels

_SIDE = 32
_CHANNELS = (3, 16, 32, 32)
_STRIDES = (1, 2, 2)


class FeatureExtractor(Protocol):
    """Images uint8 (B, 3, H, W) -> features (B, D)."""

    def __call__(self, images: Tensor) -> Tensor: ...


class RandomFeatures(nn.Module):
    """A small convolutional network with fixed random weights: features without any download.

    Three convolutions and ReLU on images that are resized to 32 x 32; the mean and the standard deviation of each
    channel over the image are 64 features. Random filters see colour, contrast, edges and texture, but know no
    objects. Most of their variance is that of the colours, so compare them with
    :func:`hfgen.evaluation.frechet.whitened_frechet_distance`, which gives small differences their weight. Distances
    rank sets of small images. They compare with each other, for the same seed and number of images, and with **no
    published number**.

    Args:
        seed: of the weights, which are equal on all machines.
    """

    def __init__(self, seed: int = 0):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, padding_mode="replicate")
            for before, after, stride in zip(_CHANNELS, _CHANNELS[1:], _STRIDES)
        )
        for layer, conv in enumerate(self.convs):
            draws = generator(seed, layer)
            scale = (2 / conv.weight[0].numel()) ** 0.5  # keeps the variance through ReLU (arXiv 1502.01852)
            conv.weight.data = scale * torch.randn(conv.weight.shape, generator=draws)
            conv.bias.data = scale * torch.randn(conv.bias.shape, generator=draws)
        self.requires_grad_(False).eval()

    @property
    def num_features(self) -> int:
        """D."""
        return 2 * _CHANNELS[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Images uint8 (B, 3, H, W) -> features (B, 64) float32.

        Raises:
            ValueError: images of another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}, expected uint8 (B, 3, H, W): convert "
                "pixels in [-1, 1] with hfgen.data.transforms.to_uint8."
            )
        hidden = to_pixels(images)
        if hidden.shape[-2:] != (_SIDE, _SIDE):
            hidden = F.interpolate(hidden, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        for conv in self.convs:
            hidden = F.relu(conv(hidden))
        return torch.cat([hidden.mean(dim=(2, 3)), hidden.std(dim=(2, 3))], dim=1)


@torch.no_grad()
def extract_features(
    extractor: FeatureExtractor, images: Tensor, *, batch_size: int = 256, progress: bool = False
) -> Tensor:
    """Features (N, D) of images uint8 (N, 3, H, W), in batches, on the CPU."""
    parts = tqdm(images.split(batch_size), desc="features", disable=not progress)
    return torch.cat([extractor(part).cpu() for part in parts])
