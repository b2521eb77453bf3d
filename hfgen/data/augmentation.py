"""From a decoded image to a square training image: resize, crop and flip as a function of counters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image

from hfgen.counters import numpy_generator
from hfgen.data import transforms

CROPS = ("center", "random", "adm")


@dataclass(frozen=True)
class Augmentation:
    """Makes training images; equal counters give equal crops and flips.

    Args:
        resolution: side of the result in pixels.
        crop: ``"center"`` or ``"random"``, after resizing the shorter side to ``round(resize_ratio * resolution)``
            with ``resample``; or ``"adm"``, the centre crop of ADM, which has its own filters.
        flip: mirror half of the images.
        resize_ratio: at least 1; VAR uses 1.125.
        resample: a name of :data:`hfgen.data.transforms.RESAMPLING`.
        seed: of all draws.

    Raises:
        ValueError: for an unknown crop or filter and for a ratio that the crop cannot have.
    """

    resolution: int
    crop: str = "center"
    flip: bool = False
    resize_ratio: float = 1.0
    resample: str = "lanczos"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ValueError(f"crop {self.crop!r} is unknown: use one of {list(CROPS)}")
        if self.resample not in transforms.RESAMPLING:
            raise ValueError(f"resample {self.resample!r} is unknown: use one of {sorted(transforms.RESAMPLING)}")
        if self.resize_ratio < 1 or (self.crop == "adm" and self.resize_ratio != 1):
            raise ValueError(
                f'resize_ratio is {self.resize_ratio}: it must be at least 1, and exactly 1 with crop="adm"'
            )

    def __call__(self, image: Image.Image, *counters: int) -> torch.Tensor:
        """uint8 ``(3, resolution, resolution)``; the draws are a function of ``(seed, *counters)``."""
        # All draws are made whatever the options are: switching flips on does not move the crops.
        horizontal, vertical, mirror = numpy_generator(self.seed, *counters).random(3)
        if self.crop == "adm":
            image = transforms.adm_center_crop(image, self.resolution)
        else:
            image = transforms.resize_shorter_side(image, round(self.resize_ratio * self.resolution), self.resample)
            if self.crop == "random":
                image = transforms.random_crop(image, self.resolution, (horizontal, vertical))
            else:
                image = transforms.center_crop(image, self.resolution)
        return transforms.to_tensor(transforms.horizontal_flip(image) if self.flip and mirror < 0.5 else image)
