"""Captioned shapes: a data set with exact labels, captions and segmentations that needs no download.

An image holds one object (split ``"single"``) or two objects in different cells (split ``"double"``) on a plain grey
background. An object has four independent, uniform attributes:

======  ==========================================  =====================================================
shape   circle, square, triangle, cross             inscribed in a square of side ``2 * radius``
colour  red, green, blue, yellow, magenta, cyan     every channel is "on" (210..240) or "off" (15..45)
size    small, large                                radius 0.100..0.112 or 0.145..0.155 of the image's side
cell    3 x 3, row-major                            centre of the cell, moved by at most 0.02 of the side
======  ==========================================  =====================================================

An object never leaves its cell, so objects do not overlap and are never cut. Captions read ``"a small red circle at
the top left"``; the words for the cells are ``CELL_PHRASES``; two objects are joined by ``" and "``. The class label
of a single object is ``shape * 6 + colour``.

Item ``index`` of a data set is a function of ``(seed, split, index)`` alone: data sets of other seeds are fresh draws.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image

from hfgen.counters import numpy_generator

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SIZES = ("small", "large")
CELLS = (
    "top left", "top", "top right",
    "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
CELL_PHRASES = tuple("in the centre" if cell == "centre" else f"at the {cell}" for cell in CELLS)
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
SPLITS = {"single": 1, "double": 2}  # objects per image
MIXED = "mixed"  # of ShapesData: the splits in turn

COLOUR_CHANNELS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
CHANNEL_LEVELS = (30.0, 225.0)  # "off" and "on" of an object's channel, in 0..255
COLOUR_JITTER = 15.0
BACKGROUND_RANGE = (64.0, 192.0)  # the grey level; every channel may differ from it by the tint
BACKGROUND_TINT = 10.0
RADIUS_RANGES = np.array([[0.100, 0.112], [0.145, 0.155]])
POSITION_JITTER = 0.02

_STREAM = 0x5348  # keeps these draws apart from other users of the same seed and index
_DRAWS_PER_OBJECT = 10
_CACHE_BYTES = 2**28
_BLOCK_PIXELS = 2**20


@dataclass(frozen=True)
class Scenes:
    """``N`` images with ``K`` objects each, as numbers; lengths are fractions of the image's side.

    ``shape``, ``colour``, ``size``, ``cell``: int64 ``(N, K)``. ``centre``: float64 ``(N, K, 2)`` as (x, y).
    ``radius``: float64 ``(N, K)``. ``rgb``: float64 ``(N, K, 3)`` in 0..255. ``background``: float64 ``(N, 3)``.
    """

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    cell: np.ndarray
    centre: np.ndarray
    radius: np.ndarray
    rgb: np.ndarray
    background: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)

    def labels(self) -> np.ndarray:
        """Class labels, int64 ``(N,)``; -1 where an image holds two objects."""
        if self.shape.shape[1] != 1:
            return np.full(len(self), -1, dtype=np.int64)
        return self.shape[:, 0] * len(COLOURS) + self.colour[:, 0]

    def captions(self) -> list[str]:
        """One caption per image, the objects in the order in which they were drawn."""
        return [
            " and ".join(map(object_phrase, shapes, colours, sizes, cells))
            for shapes, colours, sizes, cells in zip(self.shape, self.colour, self.size, self.cell)
        ]


def object_phrase(shape: int, colour: int, size: int, cell: int) -> str:
    """The words for one object: ``"a small red circle at the top left"``."""
    return f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]} {CELL_PHRASES[cell]}"


def draw_scenes(indices: Sequence[int], *, seed: int = 0, split: str = "single") -> Scenes:
    """The scenes of the items ``indices`` of the data set ``(seed, split)``.

    Raises:
        ValueError: if ``split`` is neither ``"single"`` nor ``"double"``.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of the captioned shapes is unknown: use one of {sorted(SPLITS)}")
    num_objects = SPLITS[split]
    num_draws = 4 + num_objects * _DRAWS_PER_OBJECT
    draws = np.stack([numpy_generator(_STREAM, seed, num_objects, index).random(num_draws) for index in indices])
    low, high = BACKGROUND_RANGE
    background = low + (high - low) * draws[:, :1] + BACKGROUND_TINT * (2 * draws[:, 1:4] - 1)

    objects = draws[:, 4:].reshape(len(draws), num_objects, _DRAWS_PER_OBJECT)
    shape, colour, size = (
        (objects[..., k] * len(names)).astype(np.int64) for k, names in enumerate((SHAPES, COLOURS, SIZES))
    )
    cell = (objects[..., 3] * len(CELLS)).astype(np.int64)
    if num_objects == 2:  # the second cell is uniform over the eight others
        step = 1 + (objects[:, 1, 3] * (len(CELLS) - 1)).astype(np.int64)
        cell[:, 1] = (cell[:, 0] + step) % len(CELLS)

    smallest, largest = RADIUS_RANGES[size, 0], RADIUS_RANGES[size, 1]
    radius = smallest + (largest - smallest) * objects[..., 4]
    jitter = np.minimum(POSITION_JITTER, 1 / 6 - radius)[..., None] * (2 * objects[..., 5:7] - 1)
    centre = (2 * np.stack([cell % 3, cell // 3], axis=-1) + 1) / 6 + jitter
    rgb = np.asarray(CHANNEL_LEVELS)[COLOUR_CHANNELS[colour]] + COLOUR_JITTER * (2 * objects[..., 7:10] - 1)
    return Scenes(shape, colour, size, cell, centre, radius, rgb, background)


def coverage(shape: np.ndarray, centre: np.ndarray, radius: np.ndarray, resolution: int) -> np.ndarray:
    """The share of every pixel that an object covers: the signed distance to its outline, clipped to one pixel.

    Args:
        shape: int64 ``(N,)``; centre: ``(N, 2)`` and radius: ``(N,)`` as fractions of the side.

    Returns:
        float32 ``(N, resolution, resolution)`` in [0, 1].
    """
    grid = np.arange(resolution, dtype=np.float32) + 0.5
    centre = (centre * resolution).astype(np.float32)
    r = (radius * resolution).astype(np.float32)[:, None, None]
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    distance = np.empty((len(shape), resolution, resolution), dtype=np.float32)
    for index, outline in enumerate((_circle, _square, _triangle, _cross)):
        chosen = shape == index
        distance[chosen] = outline(x[chosen], y[chosen], r[chosen])
    return np.clip(0.5 - distance, 0, 1)


def _circle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - r


def _square(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - r


def _triangle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    # The apex is at (0, -r), the base runs from (-r, r) to (r, r): a side's outward normal is (2, -1) / sqrt(5).
    return np.maximum((2 * np.abs(x) - y - r) / np.float32(5**0.5), y - r)


def _cross(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    # Two bars of length 2 r and width 2 r / 3.
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - r, y - r / 3), np.maximum(x - r / 3, y - r))


def render(scenes: Scenes, resolution: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Draws scenes.

    Returns:
        The images, uint8 ``(N, resolution, resolution, 3)``, and their segmentations, uint8 ``(N, resolution,
        resolution)``: 0 is the background, ``1 + shape`` an object that covers more than half of the pixel.
    """
    if resolution < 8:
        raise ValueError(f"resolution {resolution} cannot show the captioned shapes: use at least 8 (32 is usual)")
    images = np.empty((len(scenes), resolution, resolution, 3), dtype=np.uint8)
    segmentations = np.zeros(images.shape[:3], dtype=np.uint8)
    block = max(1, _BLOCK_PIXELS // resolution**2)
    for start in range(0, len(scenes), block):
        part = slice(start, start + block)
        canvas = np.broadcast_to(scenes.background[part, None, None], images[part].shape).astype(np.float32)
        for k in range(scenes.shape.shape[1]):
            shape = scenes.shape[part, k]
            alpha = coverage(shape, scenes.centre[part, k], scenes.radius[part, k], resolution)
            rgb = scenes.rgb[part, k, None, None].astype(np.float32)
            canvas += alpha[..., None] * (rgb - canvas)
            segmentations[part] = np.where(alpha > 0.5, 1 + shape[:, None, None], segmentations[part])
        images[part] = np.rint(canvas)
    return images, segmentations


class ShapesData(torch.utils.data.Dataset):
    """Captioned shapes as map-style training data.

    ``dataset[(epoch, index)]``, or ``dataset[index]``, is a dict with ``pixels`` (uint8 ``(3, H, W)``), ``label``
    (int; -1 in the split ``"double"``), ``caption``, ``index`` and ``skipped`` (always empty). The same index gives
    the same image in every epoch. Data of at most 256 MiB is rendered once, larger data whenever it is asked for.

    The split ``"mixed"`` has item ``index`` of ``"single"`` where ``index`` is even and of ``"double"`` where it is
    odd, all with the label -1: captions of one and of two objects to learn from.

    Raises:
        ValueError: for an unknown split, fewer than one image or a resolution below 8.
    """

    has_captions = True

    def __init__(self, num_images: int, *, seed: int = 0, resolution: int = 32, split: str = "single"):
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}: a data set needs at least 1 image")
        self.num_images, self.seed, self.resolution, self.split = num_images, seed, resolution, split
        self._splits = tuple(SPLITS) if split == MIXED else (split,)
        self.class_names = list(CLASS_NAMES) if split == "single" else []
        self._cache = None
        if num_images * 3 * resolution**2 <= _CACHE_BYTES:
            self._cache = self._render(range(num_images))
        else:
            self._render([0])

    def _render(self, indices: Sequence[int]) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        indices = np.asarray(indices)
        pixels = torch.empty(len(indices), 3, self.resolution, self.resolution, dtype=torch.uint8)
        labels, captions = np.full(len(indices), -1), np.empty(len(indices), dtype=object)
        for turn, split in enumerate(self._splits):
            (rows,) = np.nonzero(indices % len(self._splits) == turn)
            if len(rows) == 0:
                continue
            scenes = draw_scenes(indices[rows].tolist(), seed=self.seed, split=split)
            images, _ = render(scenes, self.resolution)
            pixels[rows] = torch.from_numpy(images).permute(0, 3, 1, 2)
            captions[rows] = scenes.captions()
            if self.class_names:
                labels[rows] = scenes.labels()
        return pixels, labels, captions

    def __len__(self) -> int:
        return self.num_images

    @property
    def num_classes(self) -> int:
        """24; an error on splits with two objects, whose images have no single class."""
        if not self.class_names:
            raise ValueError(
                f'the split "{self.split}" of the captioned shapes has no classes: use the split "single"'
            )
        return len(self.class_names)

    def __getitem__(self, key: tuple[int, int] | int) -> dict:
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < self.num_images:
            raise IndexError(f"index {index} is outside of 0..{self.num_images - 1}")
        row, (pixels, labels, captions) = (0, self._render([index])) if self._cache is None else (index, self._cache)
        return {
            "pixels": pixels[row].clone(),  # a view would take the whole cache along between processes
            "label": int(labels[row]),
            "caption": captions[row],
            "index": index,
            "skipped": (),
        }


def captioned_shapes(
    num_images: int, *, seed: int = 0, resolution: int = 32, split: str = "single"
) -> datasets.Dataset:
    """Captioned shapes as a ``datasets.Dataset``.

    Columns: ``image`` (RGB), ``label`` (``ClassLabel`` with 24 names such as ``"red circle"``; -1 in the split
    ``"double"``), ``caption``, ``segmentation`` (8-bit grey, see :func:`render`) and the attributes ``shape``,
    ``colour``, ``size`` and ``cell``: one ``ClassLabel`` each, or a list of two in the split ``"double"``.

    Raises:
        ValueError: for an unknown split, fewer than one image or a resolution below 8.
    """
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: a data set needs at least 1 image")
    scenes = draw_scenes(range(num_images), seed=seed, split=split)
    images, segmentations = render(scenes, resolution)
    columns = {
        "image": [_png(image) for image in images],
        "label": scenes.labels(),
        "caption": scenes.captions(),
        "segmentation": [_png(segmentation) for segmentation in segmentations],
    }
    features = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(CLASS_NAMES)),
        "caption": datasets.Value("string"),
        "segmentation": datasets.Image(),
    }
    for name, names in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("cell", CELLS)):
        values, feature = getattr(scenes, name), datasets.ClassLabel(names=list(names))
        columns[name] = values[:, 0] if split == "single" else values.tolist()
        features[name] = feature if split == "single" else datasets.Sequence(feature)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _png(array: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
