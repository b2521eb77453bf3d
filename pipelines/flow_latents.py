"""Images and masks as latents of a flow network."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen.pipelines.flow_networks import FlowNetwork
from hfgen.pipelines.inputs import check_generators, to_mask
from hfgen.pipelines.latents import LatentDecoder, downsample_factor


def flow_latent_shape(
    network: FlowNetwork, vae: LatentDecoder | None, height: int | None = None, width: int | None = None
) -> tuple[int, int, int]:
    """Channels, height and width of the latents of an image in pixels; by default of the size of training.

    Raises:
        ValueError: a size that vae and patches do not divide, or larger than the network allows.
    """
    factor, largest = downsample_factor(vae), network.max_size
    unit = factor * network.multiple
    sides = []
    for name, pixels in (("height", height), ("width", width)):
        pixels = network.sample_size * factor if pixels is None else pixels
        if pixels < unit or pixels % unit:
            raise ValueError(
                f"{name} must be a multiple of {unit} pixels (a vae factor of {factor} times {network.multiple} for "
                f"the network), got {pixels}."
            )
        if largest is not None and pixels > largest * factor:
            raise ValueError(f"{name} can be at most {largest * factor} pixels with this network, got {pixels}.")
        sides.append(pixels // factor)
    return (network.channels, *sides)


def image_to_latents(vae: LatentDecoder | None, pixels: Tensor, batch_size: int) -> Tensor:
    """Pixels (1 or B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) float32, the means where there is a posterior.

    The inverse of :func:`hfgen.pipelines.latents.decode_latents`.

    Raises:
        ValueError: another number of images.
    """
    if len(pixels) not in (1, batch_size):
        raise ValueError(f"image has a batch of {len(pixels)}, but there are {batch_size} images; give one or all.")
    latents = pixels.float()
    if vae is not None:
        encoded = vae.encode(pixels.to(vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        latents = (latents.float() - shift) * getattr(vae.config, "scaling_factor", 1.0)
    return latents.expand(batch_size, -1, -1, -1)


def mask_to_latents(mask_image: PIL.Image.Image | Tensor, vae: LatentDecoder | None, latents: Tensor) -> Tensor:
    """(1 or B, 1, h, w) boolean: the latents with any pixel to paint anew.

    Args:
        mask_image: PIL or a tensor ending in (height, width), in [0, 1]: 1 (white) is painted anew, 0 is kept.
        vae: tells how many pixels a latent has.
        latents: (B, C, h, w) of the images that the mask is for.

    Raises:
        ValueError: the mask has not the size of the images, is not one or one for each, or masks nothing.
    """
    mask, factor = to_mask(mask_image), downsample_factor(vae)
    height, width = (side * factor for side in latents.shape[-2:])
    if mask.shape[-2:] != (height, width) or mask.shape[0] not in (1, len(latents)):
        raise ValueError(
            f"mask_image holds {mask.shape[0]} masks of {mask.shape[-1]}x{mask.shape[-2]} pixels, but there are "
            f"{len(latents)} images of {width}x{height}; give one mask or one for each, of their size."
        )
    paint = F.max_pool2d((mask >= 0.5).float(), factor).bool()
    if not paint.flatten(1).any(dim=1).all():
        raise ValueError("mask_image masks nothing, so there is nothing to paint; white is painted anew.")
    return paint.to(latents.device)


def check_noise(
    shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None, latents: Tensor | None
) -> None:
    """Raise a ``ValueError`` unless there is a generator per image, or one, and given noise has the shape."""
    check_generators(generator, shape[0])
    if latents is not None and tuple(latents.shape) != tuple(shape):
        raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {tuple(shape)}.")
