"""Training images by name: the built-in shapes, a local folder, a data set of the Hub, or tar files.

The first three become map-style data sets whose items are a function of ``(seed, epoch, index)``, the last a stream
whose items are a function of ``(seed, lane, position)``, so that a run can be continued exactly and data loading
workers need no random state.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from hfgen.counters import counter_seed
from hfgen.data.augmentation import Augmentation
from hfgen.data.rows import BrokenImageError, FolderRows, HubRows, decode_image, open_folder, open_hub
from hfgen.data.shapes import MIXED, SPLITS, ShapesData
from hfgen.data.shards import is_tar_source
from hfgen.data.tar_stream import TarImages

logger = logging.getLogger(__name__)

SHAPES_IMAGES = 20000
SHAPES_KINDS = (*SPLITS, MIXED)
SHAPES_SPLITS = ("train", "validation", "test")


def load_images(
    source: str,
    *,
    resolution: int,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    crop: str = "center",
    flip: bool = False,
    resize_ratio: float = 1.0,
    resample: str = "lanczos",
    seed: int = 0,
    strict: bool = False,
    limit: int | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    num_classes: int | None = None,
    shuffle_buffer: int = 1000,
) -> ShapesData | ImageData | TarImages:
    """Training images of ``resolution`` x ``resolution`` pixels, see :class:`ImageData` for the items.

    Args:
        source: one of

            - ``"shapes"`` (= ``"shapes:single"``), ``"shapes:double"`` or ``"shapes:mixed"``, which has both: the
              built-in captioned shapes, 20000 of them unless ``limit`` says otherwise. They are rendered at
              ``resolution``, so cropping and resizing do not apply; splits other than ``"train"`` are other draws;
            - a local folder with ``metadata.jsonl`` (rows with ``file_name`` and, if wanted, a caption and a label),
              with one folder of images per class, or with images alone; ``split`` chooses the folder of that name
              if there is one. Folders written by ``Dataset.save_to_disk`` and folders of parquet files work as well;
            - the id of a data set on the Hub, read with ``datasets.load_dataset``;
            - tar files, streamed: a folder of them or ``"path/{000..099}.tar"``, ``"path/*.tar"``,
              ``"hf://datasets/USER/NAME/*.tar"``, ``"https://..."``, see :class:`TarImages`.
        image_column, caption_column, label_column: columns of a data set, or fields of ``metadata.jsonl``. By default
            the only image column; ``caption`` or ``text``; ``label`` or the only ``ClassLabel``.
        crop, flip, resize_ratio, resample: see :class:`Augmentation`.
        strict: an unreadable image is an error instead of a warning.
        limit: use the first ``limit`` images only; not for streams.
        config_name, revision: of a data set on the Hub.
        num_classes, shuffle_buffer: of streams.

    Raises:
        ValueError: for an unknown source, split, column, crop or filter, for a folder without images, and for an
            option that the source does not have.
    """
    augmentation = Augmentation(resolution, crop, flip, resize_ratio, resample, seed)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: use at least 1, or None for all images")

    if source == "shapes" or source.startswith("shapes:"):
        _reject(source, config_name=config_name, revision=revision, num_classes=num_classes)
        return _load_shapes(source, resolution, split, flip, seed, limit)
    if is_tar_source(source):
        _reject(source, config_name=config_name, revision=revision, limit=limit)
        return TarImages(
            source,
            augmentation,
            split=split,
            image_column=image_column,
            caption_column=caption_column,
            label_column=label_column,
            num_classes=num_classes,
            shuffle_buffer=shuffle_buffer,
            strict=strict,
        )
    columns = (image_column, caption_column, label_column)
    _reject(source, num_classes=num_classes)
    if Path(source).expanduser().is_dir():
        _reject(source, config_name=config_name, revision=revision)
        rows = open_folder(Path(source).expanduser(), split, columns)
    elif source.startswith(("/", "./", "../", "~")):
        raise ValueError(f"image source {source!r} is not a folder: check the path")
    else:
        rows = open_hub(source, split, columns, config_name, revision)
    return ImageData(rows, augmentation, strict=strict, limit=limit)


def _reject(source: str, **options: str | int | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is {value!r}, but the image source {source!r} has no such option: leave it out")


class ImageData(torch.utils.data.Dataset):
    """Decoded, cropped images of a folder or a ``datasets.Dataset``.

    ``dataset[(epoch, index)]``, or ``dataset[index]`` for epoch 0, is a dict with

    - ``pixels``: uint8 ``(3, resolution, resolution)``;
    - ``label``: int in [0, num_classes), or -1 if the source has no labels;
    - ``caption``: str, only if the source has captions (a missing one is empty);
    - ``index``: the image that is shown;
    - ``skipped``: names of the unreadable images met on the way. Instead of an unreadable image the next readable one
      is shown; each is named once in a warning. With ``strict`` it is a :class:`BrokenImageError`.

    Crop and flip are functions of ``(seed, epoch, requested index)``.
    """

    def __init__(
        self,
        rows: FolderRows | HubRows,
        augmentation: Augmentation,
        *,
        strict: bool = False,
        limit: int | None = None,
    ):
        self.rows, self.augmentation, self.strict = rows, augmentation, strict
        self.length = len(rows) if limit is None else min(limit, len(rows))
        self.class_names = rows.class_names
        self.has_captions = rows.has_captions
        self._broken: dict[int, str] = {}

    def __len__(self) -> int:
        return self.length

    @property
    def num_classes(self) -> int:
        """The number of classes; a ValueError if the source has none."""
        if not self.class_names:
            raise ValueError(
                f"{self.rows.name} has no class labels: use one folder per class, a label in metadata.jsonl, or name "
                "the label column"
            )
        return len(self.class_names)

    def __getitem__(self, key: tuple[int, int] | int) -> dict:
        epoch, requested = key if isinstance(key, tuple) else (0, key)
        if not 0 <= requested < self.length:
            raise IndexError(f"index {requested} is outside of 0..{self.length - 1}")
        index, image, skipped = self._next_readable(requested)
        item = {
            "pixels": self.augmentation(image, epoch, requested),
            "label": self.rows.label(index),
            "index": index,
            "skipped": skipped,
        }
        if self.has_captions:
            item["caption"] = self.rows.caption(index)
        return item

    def captions(self) -> Iterator[str]:
        """Every caption once, in order; no image is decoded."""
        if not self.has_captions:
            raise ValueError(
                f"{self.rows.name} has no captions: add them to metadata.jsonl, or name the caption column"
            )
        return (self.rows.caption(index) for index in range(self.length))

    def _next_readable(self, requested: int) -> tuple[int, Image.Image, tuple[str, ...]]:
        skipped = []
        for offset in range(self.length):
            index = (requested + offset) % self.length
            if index not in self._broken:
                try:
                    return index, decode_image(*self.rows.image(index)), tuple(skipped)
                except BrokenImageError as error:
                    if self.strict:
                        raise BrokenImageError(f"{error}. Repair or remove it, or load with strict=False") from error
                    logger.warning("%s; the next readable image takes its place", error)
                    self._broken[index] = self.rows.image_name(index)
            skipped.append(self._broken[index])
        raise BrokenImageError(
            f"none of the {self.length} images of {self.rows.name} can be read; the first one is {skipped[0]}: check "
            "that these are image files"
        )


def _load_shapes(source: str, resolution: int, split: str, flip: bool, seed: int, limit: int | None) -> ShapesData:
    kind = source.partition(":")[2] or "single"
    if kind not in SHAPES_KINDS:
        expected = ", ".join(repr(f"shapes:{name}") for name in SHAPES_KINDS)
        raise ValueError(f"image source {source!r} is unknown: the built-in ones are 'shapes', {expected}")
    if split not in SHAPES_SPLITS:
        raise ValueError(f"split {split!r} is unknown: the built-in shapes have {list(SHAPES_SPLITS)}")
    if flip:
        raise ValueError("flip=True would make the captions of the built-in shapes wrong: use flip=False")
    if split != "train":
        seed = counter_seed(seed, SHAPES_SPLITS.index(split))
    return ShapesData(limit or SHAPES_IMAGES, seed=seed, resolution=resolution, split=kind)
