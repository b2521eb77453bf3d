"""What a cache folder holds, and how its description is read without trusting it.

    cache.json        this description; it is written last, so a folder without it is unfinished
    codes.npy         (N, K, ...) uint8, uint16 or int32: N images in K augmented versions each
      or moments.npy  (N, K, 2 C, h, w) float16: mean and log-variance of a KL autoencoder's posterior
      or latents.npy  (N, K, ...) float16: of a deterministic continuous tokenizer
    labels.npy        (N,) int32 class, -1 for none
    captions.npy      (bytes,) uint8: UTF-8 text, each caption followed by a line feed; only if there are captions
    caption_ends.npy  (N,) int64: where each caption ends, its line feed included

File names are fixed: nothing in ``cache.json`` names a path.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
INFO_FILE = "cache.json"
UNFINISHED_FOLDER = "unfinished"
KINDS = {"codes": ("uint8", "uint16", "int32"), "moments": ("float16",), "latents": ("float16",)}
REBUILD = "examples/cache_tokens.py (or cache_latents.py) with --overwrite writes it again"

_MAX_INFO_BYTES = 2**24
_MAX_SIZES = {"num_rows": 2**40, "num_variants": 2**16}
_MAX_ROW_VALUES = 2**28

Scalar = str | int | float | bool | None


@dataclasses.dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made a cache: two with equal identities give equal tokens.

    Attributes:
        class_name: of the model.
        config: its constructor arguments.
        weights: SHA-256, as hexadecimal digits, over the names, shapes, dtypes and values of its state dict.
        name: folder or Hub id that it was loaded from, for people; not compared.
    """

    class_name: str
    config: Mapping[str, Any]
    weights: str
    name: str = ""

    def differences(self, other: TokenizerIdentity) -> list[str]:
        """How this tokenizer, of a cache, differs from the ``other`` one, of a run, in words."""
        if self.class_name != other.class_name:
            return [f"the tokenizer is a {other.class_name}, the cache was made by a {self.class_name}"]
        names = sorted(self.config.keys() | other.config.keys())
        found = [
            f"the tokenizer's {name} is {other.config.get(name)}, in the cache {self.config.get(name)}"
            for name in names
            if self.config.get(name) != other.config.get(name)
        ]
        if self.weights != other.weights:
            found.append(
                f"the tokenizer's weights are {other.weights[:12]}, the cache was made by {self.weights[:12]}"
                + (f" ({self.name})" if self.name else "")
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """The description of a cache, ``cache.json``.

    Attributes:
        kind: ``"codes"``, ``"moments"`` or ``"latents"``.
        dtype: of the stored values.
        row_shape: shape of the tokens of one image.
        num_rows: N, number of images.
        num_variants: K, augmented versions of each image; epoch e reads version e modulo K.
        codebook_size: number of codes; None for a continuous tokenizer.
        num_caption_bytes: length of ``captions.npy``; None if there are no captions.
        class_names: names of the classes, empty if there are none.
        num_skipped: unreadable images, whose place was taken by the next readable one.
        tokenizer: what made the cache.
        preprocessing: data set, resolution, crop and all else that decides about the pixels.
    """

    kind: str
    dtype: str
    row_shape: tuple[int, ...]
    num_rows: int
    num_variants: int
    codebook_size: int | None
    num_caption_bytes: int | None
    class_names: tuple[str, ...]
    num_skipped: int
    tokenizer: TokenizerIdentity
    preprocessing: Mapping[str, Scalar]

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each array; array ``name`` is the file ``name.npy``."""
        arrays = {
            self.kind: ((self.num_rows, self.num_variants, *self.row_shape), np.dtype(self.dtype)),
            "labels": ((self.num_rows,), np.dtype(np.int32)),
        }
        if self.num_caption_bytes is not None:
            arrays["captions"] = ((self.num_caption_bytes,), np.dtype(np.uint8))
            arrays["caption_ends"] = ((self.num_rows,), np.dtype(np.int64))
        return arrays

    def to_json(self) -> str:
        """The text of ``cache.json``."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n"


def smallest_dtype(codebook_size: int) -> str:
    """The smallest dtype that holds every code."""
    return next(dtype for dtype in KINDS["codes"] if codebook_size - 1 <= np.iinfo(dtype).max)


def read_info(path: Path) -> CacheInfo:
    """Read ``cache.json``.

    Raises:
        ValueError: if it is damaged, of another version, or holds anything but a sound description.
    """
    size = path.stat().st_size
    if size > _MAX_INFO_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {_MAX_INFO_BYTES} of any honest description.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}. {REBUILD}.") from error
    try:
        return _checked(values)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a cache: {error}. {REBUILD}.") from error


def _checked(values: Any) -> CacheInfo:
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__} instead of names and values")
    version = values.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, and this hfgen reads version {FORMAT_VERSION}")
    _check_names("it", values, CacheInfo)
    tokenizer = values["tokenizer"]
    if not isinstance(tokenizer, dict):
        raise ValueError(f"tokenizer is {tokenizer!r}, expected names and values")
    _check_names("tokenizer", tokenizer, TokenizerIdentity)
    texts = [tokenizer[name] for name in ("class_name", "weights", "name")]
    if not all(isinstance(text, str) for text in texts) or not isinstance(tokenizer["config"], dict):
        raise ValueError("tokenizer has values of a wrong type")

    kind, dtype, row_shape, names = (values[name] for name in ("kind", "dtype", "row_shape", "class_names"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {list(KINDS)}")
    if dtype not in KINDS[kind]:
        raise ValueError(f"dtype is {dtype!r}, expected one of {list(KINDS[kind])}")
    for name, largest in _MAX_SIZES.items():
        _check_size(name, values[name], 1, largest)
    if not isinstance(row_shape, list) or not 1 <= len(row_shape) <= 4:
        raise ValueError(f"row_shape is {row_shape!r}, expected one to four sizes")
    row_values = 1
    for size in row_shape:
        _check_size("row_shape", size, 1, _MAX_ROW_VALUES)
        row_values *= size
    _check_size("the product of row_shape", row_values, 1, _MAX_ROW_VALUES)
    if kind == "codes":
        _check_size("codebook_size", values["codebook_size"], 1, np.iinfo(dtype).max + 1)
    elif values["codebook_size"] is not None:
        raise ValueError(f"codebook_size is {values['codebook_size']!r}, but {kind} have none")
    if values["num_caption_bytes"] is not None:
        _check_size("num_caption_bytes", values["num_caption_bytes"], values["num_rows"], 2**48)
    _check_size("num_skipped", values["num_skipped"], 0, values["num_rows"])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is not a list of texts")
    preprocessing = values["preprocessing"]
    if not isinstance(preprocessing, dict) or not all(isinstance(v, Scalar) for v in preprocessing.values()):
        raise ValueError("preprocessing is not a list of names with simple values")
    return CacheInfo(
        **{
            **values,
            "row_shape": tuple(row_shape),
            "class_names": tuple(names),
            "tokenizer": TokenizerIdentity(**tokenizer),
        }
    )


def _check_names(where: str, values: Mapping[str, Any], expected: type) -> None:
    names = {field.name for field in dataclasses.fields(expected)}
    if values.keys() != names:
        raise ValueError(
            f"{where} lacks {sorted(names - values.keys())} and has the unknown {sorted(values.keys() - names)}"
        )


def _check_size(name: str, value: Any, smallest: int, largest: int) -> None:
    if type(value) is not int or not smallest <= value <= largest:
        raise ValueError(f"{name} is {value!r}, expected an integer in [{smallest}, {largest}]")
