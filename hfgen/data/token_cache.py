"""Tokens of images from a cache folder, in place of the images; see :mod:`hfgen.data.cache_format` for its files."""

from __future__ import annotations

import math
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hfgen.data.cache_format import INFO_FILE, REBUILD, UNFINISHED_FOLDER, CacheInfo, read_info


class TokenCache(Dataset):
    """The rows of a cache folder, memory-mapped.

    ``cache[(epoch, index)]``, or ``cache[index]`` for epoch 0, is a dict with

    - ``codes``: int64, of the tokenizer's shape; or ``moments``: float16 ``(2 C, h, w)``, the mean and log-variance
      of a KL autoencoder; or ``latents``: float16;
    - ``label``: int in [0, num_classes), or -1 if there are no labels;
    - ``caption``: str, only if there are captions;
    - ``index``: the row.

    Epoch e shows version e modulo K of the K augmented ones. Loading processes map the files anew.

    Args:
        folder: written by ``examples/cache_tokens.py`` or ``examples/cache_latents.py``.

    Raises:
        ValueError: if the folder is no cache, unfinished, or its files do not fit their description.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / INFO_FILE).is_file():
            unfinished = (self.folder / UNFINISHED_FOLDER).is_dir()
            raise ValueError(
                f"The cache {folder} is unfinished: run the command that writes it again, and it continues."
                if unfinished
                else f"{folder} is not a cache: it has no {INFO_FILE}. examples/cache_tokens.py and cache_latents.py "
                "write caches."
            )
        self.info: CacheInfo = read_info(self.folder / INFO_FILE)
        self._open()
        labels, num_classes = self.labels, len(self.info.class_names)
        if labels.min() < -1 or labels.max() >= num_classes:
            raise ValueError(
                f"{self.folder / 'labels.npy'} holds labels from {labels.min()} to {labels.max()}, but there are "
                f"{num_classes} classes. {REBUILD}."
            )

    def _open(self) -> None:
        self._arrays = {
            name: _map_array(self.folder / f"{name}.npy", shape, dtype)
            for name, (shape, dtype) in self.info.arrays().items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "info": self.info}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self.info.num_rows

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, empty if there are none."""
        return list(self.info.class_names)

    @property
    def num_classes(self) -> int:
        """The number of classes; a ValueError if there are none."""
        if not self.info.class_names:
            raise ValueError(f"The cache {self.folder} has no class labels: make it from a labelled data set.")
        return len(self.info.class_names)

    @property
    def has_captions(self) -> bool:
        """Whether items have a ``caption``."""
        return self.info.num_caption_bytes is not None

    @property
    def tokens(self) -> np.ndarray:
        """The codes, moments or latents of all rows and versions, as stored: (N, K, ...)."""
        return self._arrays[self.info.kind]

    @property
    def labels(self) -> np.ndarray:
        """The classes of all rows, (N,) int32, -1 for none."""
        return self._arrays["labels"]

    def caption(self, index: int) -> str:
        """The caption of a row."""
        ends, text = self._arrays["caption_ends"], self._arrays["captions"]
        first, last = int(ends[index - 1]) if index else 0, int(ends[index])
        if not 0 <= first < last <= len(text):
            raise ValueError(f"{self.folder / 'caption_ends.npy'} is damaged at row {index}. {REBUILD}.")
        return text[first : last - 1].tobytes().decode("utf-8")

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of 0..{len(self) - 1}")
        kind, row = self.info.kind, self.tokens[index, epoch % self.info.num_variants]
        if kind == "codes":
            # A code that no embedding has would end a GPU run without saying where it came from.
            if not 0 <= row.min() <= row.max() < self.info.codebook_size:
                raise ValueError(
                    f"{self.folder / 'codes.npy'} is damaged: row {index} has codes from {row.min()} to {row.max()}, "
                    f"the codebook has {self.info.codebook_size}. {REBUILD}."
                )
            row = row.astype(np.int64)
        else:
            row = row.copy()
        item = {kind: torch.from_numpy(row), "label": int(self.labels[index]), "index": index}
        if self.has_captions:
            item["caption"] = self.caption(index)
        return item


def _map_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Map an array whose header must say what the description of the cache says; nothing is unpickled."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"it has version {version} of the npy format")
            found = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
    # All that numpy's reader of the header, a Python literal, can raise.
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(f"{path} cannot be read: {error}. {REBUILD}.") from error
    if found != (shape, False, dtype):
        raise ValueError(
            f"{path} holds {found[2]} of shape {found[0]}, but {INFO_FILE} describes {dtype} of shape {shape}. "
            f"{REBUILD}."
        )
    expected, size = offset + math.prod(shape) * dtype.itemsize, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, not {expected}: it was cut off. {REBUILD}.")
    # The plain view is quicker to index than a numpy.memmap, and keeps the mapping alive.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))
