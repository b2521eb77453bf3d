"""Parts of images painted anew: which tokens a mask means, and the result over the given pixels."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


def check_edit(pixels: Tensor, paint: Tensor, side: int, batch_size: int) -> None:
    """Raise a ``ValueError`` unless image and mask, (B, channels, H, W), fit a model of images of one size."""
    for name, value in (("image", pixels), ("mask_image", paint)):
        if value.shape[-2:] != (side, side):
            raise ValueError(
                f"{name} is {value.shape[-1]}x{value.shape[-2]} pixels, but the model makes {side}x{side}; resize "
                f"or crop it, for example with {name}.resize(({side}, {side}))."
            )
        if value.shape[0] not in (1, batch_size):
            raise ValueError(
                f"{name} has a batch of {value.shape[0]}, but there are {batch_size} images; give one or all."
            )


def painted_tokens(paint: Tensor, factor: int, margin: int) -> Tensor:
    """The tokens in which any pixel is to be painted.

    Args:
        paint: (B, 1, H, W) float in [0, 1], from 0.5 on a pixel is painted.
        factor: pixels of a token in a row.
        margin: tokens by which the painted area grows on each side.

    Returns:
        (B, H / factor * W / factor) boolean in raster order.
    """
    grid = F.max_pool2d((paint >= 0.5).float(), factor)
    if margin:
        grid = F.max_pool2d(grid, 2 * margin + 1, stride=1, padding=margin)
    return grid.bool().flatten(1)


def blend_edit(edited: Tensor, given: Tensor, painted: Tensor, blur: float) -> Tensor:
    """The edited images where tokens were painted anew, the given pixels elsewhere, and a soft edge in between.

    As the editor of MaskGIT (arXiv 2202.04200) does it, to the pixel: the map of the painted tokens is resized to the
    image and blurred.

    Args:
        edited: (B, 3, H, W) float.
        given: (1 or B, 3, H, W) float.
        painted: (B, h, w) boolean, the tokens that were painted.
        blur: standard deviation in pixels of the Gaussian blur; with 0 the edges run between tokens and nothing
            changes beyond them.

    Returns:
        (B, 3, H, W) of the dtype of ``edited``.
    """
    size = edited.shape[:1:-1]  # width, height
    resample = PIL.Image.Resampling.BICUBIC if blur else PIL.Image.Resampling.NEAREST
    maps = [PIL.Image.fromarray(one).resize(size, resample) for one in painted.cpu().numpy().astype(np.uint8) * 255]
    if blur:
        maps = [VaeImageProcessor.blur(one, blur) for one in maps]
    weight = torch.from_numpy(np.stack(maps, dtype=np.float32) / 255)[:, None].to(edited)
    return weight * edited + (1 - weight) * given.to(edited)
