"""An analytic judge of the captioned shapes: it reads shape, colour, size and cell from pixels, without a network.

The background is the median of the border. The pixels farthest from it give the object's colour, and with both the
share of every pixel that the object covers. A window around the centroid of that coverage is compared with rendered
objects of all shapes and of radii from below the smallest to above the largest: a generated object between the two
sizes keeps its shape and counts as the nearer size. An object is ``found`` if the best one, painted on the background,
explains more than half of the image's deviation from the background; noise and blank images have none.

The steps work on one dominant object. More objects would be read one after another, each erased before the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen.data.shapes import (
    CELLS,
    CHANNEL_LEVELS,
    COLOUR_CHANNELS,
    COLOURS,
    RADIUS_RANGES,
    SHAPES,
    SIZES,
    coverage,
)
from hfgen.data.transforms import to_pixels

RESOLUTION = 32  # images of other sizes are resized to this
WINDOW = 16  # pixels; a large object and its blurred rim fit in
RADII = (0.09, 0.165, 16)  # first, last and number of the radii that are tried, as fractions of the side
MIN_CONTRAST = 0.4  # distance of the object's colour from the background, in [-1, 1] units
MIN_COVERAGE = 0.3  # less is noise or blur
MIN_EXPLAINED = 0.5
BLOCK = 512  # images per step, which bounds the memory


@dataclass(frozen=True)
class ShapesReading:
    """What the judge sees in ``B`` images; every number is -1 where no object was found.

    ``shape``, ``colour``, ``size``, ``cell``: int64 ``(B,)``, indices into the names in ``hfgen.data.shapes``.
    ``explained``: float32 ``(B,)`` in [0, 1], how well the object explains the image.
    """

    shape: Tensor
    colour: Tensor
    size: Tensor
    cell: Tensor
    explained: Tensor

    @property
    def found(self) -> Tensor:
        """bool ``(B,)``."""
        return self.shape >= 0

    @property
    def label(self) -> Tensor:
        """Class labels ``shape * 6 + colour``, int64 ``(B,)``; -1 where no object was found."""
        return torch.where(self.found, self.shape * len(COLOURS) + self.colour, -1)


@torch.no_grad()
def judge_shapes(pixels: Tensor) -> ShapesReading:
    """Reads the object in each image of the split ``"single"``.

    Args:
        pixels: float ``(B, 3, H, W)`` in [-1, 1], or uint8.

    Raises:
        ValueError: for another shape.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels have shape {tuple(pixels.shape)}, expected (B, 3, H, W)")
    blocks = [_read(_prepare(block)) for block in pixels.split(BLOCK)]
    return ShapesReading(*(torch.cat(parts) for parts in zip(*blocks)))


def judge_labels(pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """How well images show the classes that they were made for.

    Args:
        pixels: float ``(B, 3, H, W)`` in [-1, 1], or uint8.
        labels: int64 ``(B,)`` in [0, 24).

    Returns:
        The share of images with the right ``label``, ``shape`` and ``colour``, and of those with an object, ``found``.
    """
    if labels.shape != pixels.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected ({len(pixels)},): one label per image")
    reading = judge_shapes(pixels)
    labels = labels.to(reading.label.device)
    return {
        "label": _share(reading.label == labels),
        "shape": _share(reading.shape == labels // len(COLOURS)),
        "colour": _share(reading.colour == labels % len(COLOURS)),
        "found": _share(reading.found),
    }


def diversity(reading: ShapesReading) -> dict[str, float | dict[str, float]]:
    """How evenly the found objects spread over attributes.

    Returns:
        ``cells``, ``sizes``: the share of each by name. ``cell_entropy``, ``size_entropy``, ``label_entropy``: the
        entropy divided by that of the uniform distribution, so 1 is even and 0 means that all are the same. All are 0
        if no object was found.
    """
    cells = _shares(reading.cell[reading.found], len(CELLS))
    sizes = _shares(reading.size[reading.found], len(SIZES))
    labels = _shares(reading.label[reading.found], len(SHAPES) * len(COLOURS))
    return {
        "cells": dict(zip(CELLS, cells.tolist())),
        "sizes": dict(zip(SIZES, sizes.tolist())),
        "cell_entropy": _evenness(cells),
        "size_entropy": _evenness(sizes),
        "label_entropy": _evenness(labels),
    }


def _prepare(pixels: Tensor) -> Tensor:
    pixels = to_pixels(pixels) if pixels.dtype == torch.uint8 else pixels.float()
    if pixels.shape[-2:] != (RESOLUTION, RESOLUTION):
        pixels = F.interpolate(pixels, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
    return pixels


def _read(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    difference = pixels - border_median(pixels)[:, :, None, None]
    paint = object_colour(difference)  # (B, 3), relative to the background
    contrast = paint.norm(dim=1)
    alpha = torch.einsum("bchw,bc->bhw", difference, paint) / contrast.square().clamp_min(1e-6)[:, None, None]
    centre = centroid(alpha)

    templates, shape_of, size_of, offset_of = _templates()
    templates = templates.to(pixels.device)
    view = window(alpha, centre)
    # |view - template|^2 without |view|^2, which is the same for all templates.
    mismatch = templates.square().sum(dim=1) - 2 * view @ templates.T
    best_mismatch, best = mismatch.min(dim=1)
    energy = difference.square().sum(dim=(1, 2, 3))
    explained = (-best_mismatch * contrast.square() / energy.clamp_min(1e-6)).clamp(0, 1)

    best = best.cpu()
    middle = centre - offset_of[best].to(centre)
    column, row = (middle * 3 / RESOLUTION).floor().clamp(0, 2).long().unbind(dim=1)
    chroma = torch.from_numpy(np.asarray(CHANNEL_LEVELS, dtype=np.float32)[COLOUR_CHANNELS]).to(pixels.device)
    colour = (_chroma(paint) @ _chroma(chroma).T).argmax(dim=1)

    found = (contrast > MIN_CONTRAST) & (explained > MIN_EXPLAINED)
    readings = (shape_of[best].to(pixels.device), colour, size_of[best].to(pixels.device), 3 * row + column)
    return (*(torch.where(found, reading, -1) for reading in readings), explained)


def border_median(pixels: Tensor) -> Tensor:
    """The median of the outermost pixels per channel, ``(B, C, H, W)`` to ``(B, C)``: the background's colour."""
    top, bottom = pixels[:, :, 0], pixels[:, :, -1]
    left, right = pixels[:, :, 1:-1, 0], pixels[:, :, 1:-1, -1]
    return torch.cat([top, bottom, left, right], dim=2).median(dim=2).values


def object_colour(difference: Tensor) -> Tensor:
    """The mean of the pixels that differ most from the background: ``(B, 3, H, W)`` to ``(B, 3)``."""
    distance = difference.norm(dim=1)
    # Means of 2 x 2 pixels set the scale, so that a lone outlier does not.
    farthest = F.avg_pool2d(distance[:, None], 2, stride=1).amax(dim=(1, 2, 3))
    weight = (distance - 0.7 * farthest[:, None, None]).clamp_min(0) + 1e-9
    return (difference * weight[:, None]).sum(dim=(2, 3)) / weight.sum(dim=(1, 2))[:, None]


def centroid(alpha: Tensor) -> Tensor:
    """The centre of mass of coverage ``(B, H, W)`` as (x, y) in pixels, ``(B, 2)``; coverage below 0.3 is left out."""
    mass = torch.where(alpha > MIN_COVERAGE, alpha.clamp(0, 1), 0) + 1e-9
    grid = torch.arange(alpha.shape[-1], device=alpha.device) + 0.5
    total = mass.sum(dim=(1, 2))
    return torch.stack([mass.sum(dim=1) @ grid / total, mass.sum(dim=2) @ grid / total], dim=1)


def window(alpha: Tensor, centre: Tensor) -> Tensor:
    """``WINDOW`` x ``WINDOW`` bilinear samples of coverage around ``centre``, ``(B, WINDOW ** 2)``; 0 outside."""
    offsets = torch.arange(WINDOW, device=alpha.device) - (WINDOW - 1) / 2
    x = (centre[:, 0, None] + offsets)[:, None, :].expand(-1, WINDOW, -1)
    y = (centre[:, 1, None] + offsets)[:, :, None].expand(-1, -1, WINDOW)
    places = torch.stack([x, y], dim=-1) * (2 / alpha.shape[-1]) - 1
    return F.grid_sample(alpha[:, None], places, mode="bilinear", align_corners=False).flatten(1)


@lru_cache(maxsize=1)
def _templates() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows of rendered objects, averaged over places within a pixel, with their shapes, sizes and offsets.

    The offset is that from the middle of the object to its centroid, (x, y) in pixels; only triangles have one.
    """
    radii = np.linspace(*RADII)
    shape, step = (axis.reshape(-1) for axis in np.indices((len(SHAPES), len(radii))))
    size = np.abs(radii[step, None] - RADIUS_RANGES.mean(axis=1)).argmin(axis=1)
    places = 0.5 + (np.stack(np.indices((4, 4)), axis=-1).reshape(-1, 2) - 1.5) / 4 / RESOLUTION
    windows, offsets = [], []
    for place in places:
        middle = np.broadcast_to(place, (len(shape), 2))
        alpha = torch.from_numpy(coverage(shape, middle, radii[step], RESOLUTION))
        centre = centroid(alpha)
        windows.append(window(alpha, centre))
        offsets.append(centre - torch.from_numpy(middle * RESOLUTION).float())
    mean = [torch.stack(parts).mean(dim=0) for parts in (windows, offsets)]
    return mean[0], torch.from_numpy(shape), torch.from_numpy(size), mean[1]


def _chroma(colour: Tensor) -> Tensor:
    """The direction of colours ``(N, 3)`` without their brightness: hue."""
    return F.normalize(colour - colour.mean(dim=1, keepdim=True), dim=1)


def _share(matches: Tensor) -> float:
    return matches.float().mean().item()


def _shares(values: Tensor, num_values: int) -> Tensor:
    counts = values.bincount(minlength=num_values).double()
    return counts / counts.sum().clamp_min(1)


def _evenness(shares: Tensor) -> float:
    return (torch.special.entr(shares).sum() / np.log(len(shares))).item()
