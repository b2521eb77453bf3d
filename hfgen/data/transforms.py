"""Image transforms on PIL images: they run without torchvision and never draw from a global generator."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps

RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
}
ROUNDING = ("round", "truncate", "adm")


def resize_shorter_side(image: Image.Image, size: int, resample: str = "lanczos") -> Image.Image:
    """Resizes so that the shorter side has ``size`` pixels; the longer one keeps the aspect, rounded down."""
    if resample not in RESAMPLING:
        raise ValueError(f"resample {resample!r} is unknown: use one of {sorted(RESAMPLING)}")
    width, height = image.size
    shorter = min(width, height)
    return image.resize((size * width // shorter, size * height // shorter), RESAMPLING[resample])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central ``size`` x ``size`` pixels; half a pixel is rounded to even, as torchvision does."""
    _check_crop(image, size)
    return _crop(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes and crops as in ADM (arXiv 2105.05233): box halvings, then bicubic to ``size``, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(image: Image.Image, size: int, draws: tuple[float, float]) -> Image.Image:
    """``size`` x ``size`` pixels at the place that two uniform draws in [0, 1) choose (horizontal, vertical)."""
    _check_crop(image, size)
    left = int(draws[0] * (image.width - size + 1))
    top = int(draws[1] * (image.height - size + 1))
    return _crop(image, left, top, size)


def horizontal_flip(image: Image.Image) -> Image.Image:
    """The image mirrored left to right."""
    return ImageOps.mirror(image)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A uint8 tensor ``(C, H, W)`` with its own memory."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1)))


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images of any shape to float32 pixels in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images have dtype {images.dtype}, expected torch.uint8 (0..255)")
    return images.float() / 127.5 - 1


def to_uint8(pixels: torch.Tensor, rounding: str = "round") -> torch.Tensor:
    """Float pixels in [-1, 1], clamped, to uint8.

    Reported scores depend on the rule. ``"round"``: nearest of ``(x + 1) * 127.5``, the inverse of ``to_pixels``;
    ``"truncate"``: the same rounded down; ``"adm"``: ``x * 127.5 + 128`` rounded down, as ADM writes its samples.
    """
    if rounding not in ROUNDING:
        raise ValueError(f"rounding {rounding!r} is unknown: use one of {list(ROUNDING)}")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels have dtype {pixels.dtype}, expected a floating dtype with values in [-1, 1]")
    pixels = pixels.float()
    scaled = pixels * 127.5 + 128 if rounding == "adm" else (pixels + 1) * 127.5
    scaled = scaled.round() if rounding == "round" else scaled.floor()
    return scaled.clamp(0, 255).to(torch.uint8)


def _check_crop(image: Image.Image, size: int) -> None:
    if min(image.size) < size:
        raise ValueError(
            f"an image of {image.width} x {image.height} has no crop of {size} x {size}: resize its shorter side first"
        )


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))
