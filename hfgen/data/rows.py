"""Rows of images with labels and captions, from a local folder or through ``datasets``.

Opening never decodes an image, and reading a row gives the file or its bytes: damage shows up in ``decode_image``.
"""

from __future__ import annotations

import io
import json
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path, PurePath

import datasets
import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "validation", "val", "test")

# By content, whatever the name says: Pillow has decoders that start other programs (EPS) or that few have looked at.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
MAX_PIXELS = 89_000_000  # just below where Pillow begins to warn; decoding such an image takes a gigabyte

Columns = tuple[str | None, str | None, str | None]  # image, caption, label; None: found by name or type

# What Pillow's decoders raise on damaged files.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class BrokenImageError(ValueError):
    """A file or a data set row that cannot be decoded as an image; the message names it."""


def decode_image(source: str | Path | bytes, name: str) -> Image.Image:
    """Reads an image file as upright RGB.

    The EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits and animations
    give their first frame.

    Raises:
        BrokenImageError: if ``name`` is no regular file or no image, is cut off, cannot be opened, or has more than
            ``MAX_PIXELS`` pixels, of which a few kilobytes can hold any number.
    """
    try:
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif not stat.S_ISREG(os.stat(source).st_mode):  # a named pipe would never end
            raise ValueError("it is not a regular file")
        with Image.open(source, formats=_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels are more than {MAX_PIXELS:,}; shrink it")
            image = ImageOps.exif_transpose(opened)
            return _to_rgb(image)
    except _DECODING_ERRORS as error:
        raise BrokenImageError(f"cannot read the image {name}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        grey = np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class FolderRows:
    """Image files with optional labels and captions."""

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        labels: Sequence[int] | None,
        class_names: Sequence[str],
        captions: Sequence[str] | None,
    ):
        self.name = f"the folder {root}"
        self.class_names, self.has_captions = list(class_names), captions is not None
        self._files, self._labels, self._captions = [str(file) for file in files], labels, captions

    def __len__(self) -> int:
        return len(self._files)

    def image_name(self, index: int) -> str:
        return self._files[index]

    def image(self, index: int) -> tuple[str, str]:
        return self._files[index], self._files[index]

    def label(self, index: int) -> int:
        return -1 if self._labels is None else self._labels[index]

    def caption(self, index: int) -> str:
        return self._captions[index]


class HubRows:
    """Rows of a ``datasets.Dataset`` whose image column is read undecoded, so that damage is seen here."""

    def __init__(self, name: str, data: datasets.Dataset, columns: Columns):
        self.name = f"the data set {name}"
        image, caption, label = columns
        features = data.features
        for column in filter(None, columns):
            if column not in features:
                raise ValueError(f"{self.name} has no column {column!r}: its columns are {list(features)}")
        if image is None:
            image = self._only(features, datasets.Image, "image")
            if image is None:
                raise ValueError(f"{self.name} has no image column: its columns are {list(features)}")
        elif not isinstance(features[image], datasets.Image):
            raise ValueError(f"the column {image!r} of {self.name} holds {features[image]}, not images")
        if label is None:
            label = "label" if "label" in features else self._only(features, datasets.ClassLabel, "label")
        if caption is None:
            caption = next((column for column in ("caption", "text") if column in features), None)

        self._image_column = image
        self._images = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self.has_captions = caption is not None
        self._captions = data.select_columns([caption]) if caption else None
        self._caption_column = caption
        self.class_names, self._labels = [], None
        if label is not None:
            self.class_names, self._labels = _class_labels(data, label)

    def _only(self, features: datasets.Features, kind: type, role: str) -> str | None:
        found = [column for column, feature in features.items() if isinstance(feature, kind)]
        if len(found) > 1:
            if role in found:
                return role
            raise ValueError(f"{self.name} has several columns to choose from, {found}: pass {role}_column")
        return found[0] if found else None

    def __len__(self) -> int:
        return len(self._images)

    def image_name(self, index: int) -> str:
        return f"{self.name} row {index}"

    def image(self, index: int) -> tuple[str | bytes, str]:
        name, value = self.image_name(index), self._images[index][self._image_column]
        if value is None:
            raise BrokenImageError(f"cannot read the image {name}: the row has no image")
        return value["bytes"] if value["bytes"] is not None else value["path"], name

    def label(self, index: int) -> int:
        return -1 if self._labels is None else self._labels[index]

    def caption(self, index: int) -> str:
        return self._captions[index][self._caption_column] or ""


def _class_labels(data: datasets.Dataset, column: str) -> tuple[list[str], list[int]]:
    values = data.with_format(None)[column][:]
    feature = data.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), values
    return _number_classes(values, f"the column {column!r}")


def _number_classes(values: Sequence[str | int], where: str) -> tuple[list[str], list[int]]:
    """Class names and numbers: integers are class numbers already, strings are numbered in sorted order."""
    kinds = {type(value) for value in values}
    if kinds == {int}:
        if min(values) < 0:
            raise ValueError(f"{where} has the label {min(values)}: integer labels count from 0")
        return [str(number) for number in range(max(values) + 1)], list(values)
    if kinds == {str}:
        names = sorted(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        return names, [numbers[value] for value in values]
    raise ValueError(
        f"{where} holds labels of type {sorted(kind.__name__ for kind in kinds)}: every row needs a label, and all of "
        "them must be integers or all strings"
    )


def open_folder(root: Path, split: str, columns: Columns) -> FolderRows | HubRows:
    """Opens a local folder, see :func:`hfgen.data.sources.load_images` for what it may hold."""
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(str(root))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"the data set {root} has no split {split!r}: it has {list(data)}")
            data = data[split]
        return HubRows(str(root), data, columns)
    if any(root.glob("*.parquet")) or any(root.glob("data/*.parquet")):
        return open_hub(str(root), split, columns)

    splits = [name for name in SPLITS if (root / name).is_dir()]
    if split in splits:
        root = root / split
    elif splits or split != "train":
        raise ValueError(f"the folder {root} has no split {split!r}: its split folders are {splits}")
    if (root / "metadata.jsonl").is_file():
        return _open_metadata(root, columns)
    for column in filter(None, columns):
        raise ValueError(f"the column {column!r} was asked for, but the folder {root} has no metadata.jsonl")

    classes = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    images = {folder: _image_files(folder) for folder in classes}
    classes = [folder for folder in classes if images[folder]]
    flat = sorted(file for file in root.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if classes and flat:
        raise ValueError(
            f"the folder {root} holds images ({flat[0].name}, ...) beside class folders ({classes[0].name}, ...): "
            "move them into a class folder"
        )
    if not classes and not flat:
        raise ValueError(
            f"the folder {root} has no images: expected files ending in {', '.join(IMAGE_SUFFIXES)}, in one folder "
            "per class or beside a metadata.jsonl"
        )
    if flat:
        return FolderRows(root, flat, None, [], None)
    files = [file for folder in classes for file in images[folder]]
    labels = [number for number, folder in enumerate(classes) for _ in images[folder]]
    return FolderRows(root, files, labels, [folder.name for folder in classes], None)


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)


def _open_metadata(root: Path, columns: Columns) -> FolderRows:
    path = root / "metadata.jsonl"
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(
                    f"{path} line {number} is a {type(rows[-1]).__name__}: expected an object with fields"
                )
    if not rows:
        raise ValueError(
            f'{path} is empty: expected lines such as {{"file_name": "a.png", "caption": "a red circle"}}'
        )
    file_field, caption_field, label_field = columns
    file_field = file_field or "file_name"
    caption_field = caption_field or next((name for name in ("caption", "text") if name in rows[0]), None)
    label_field = label_field or ("label" if "label" in rows[0] else None)
    for number, row in enumerate(rows, start=1):
        for field in filter(None, (file_field, caption_field, label_field)):
            if field not in row:
                raise ValueError(f"{path} row {number} has no field {field!r}: it has {list(row)}")
    captions = [row[caption_field] or "" for row in rows] if caption_field else None
    class_names, labels = [], None
    if label_field:
        class_names, labels = _number_classes([row[label_field] for row in rows], f"{path} field {label_field!r}")
    files = [_file_inside(root, row[file_field], f"{path} row {number}") for number, row in enumerate(rows, start=1)]
    return FolderRows(root, files, labels, class_names, captions)


def _file_inside(root: Path, name: object, where: str) -> Path:
    """``root / name``, which must not lead out of ``root``: somebody else may have written the list."""
    if not isinstance(name, str) or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise ValueError(f"{where} names the file {name!r}: expected a path inside the folder {root}")
    return root / name


def open_hub(
    source: str, split: str, columns: Columns, config_name: str | None = None, revision: str | None = None
) -> HubRows:
    """Opens a data set with ``datasets.load_dataset``."""
    try:
        data = datasets.load_dataset(source, config_name, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"image source {source!r} with split {split!r} cannot be opened: expected 'shapes', a local folder, or "
            f"the id of a data set on the Hub. {type(error).__name__}: {error}"
        ) from error
    return HubRows(source, data, columns)
