"""Pairs of noise and the image that a flow made of it, in a folder of safetensors files.

    pairs.json              what made the pairs and how many there are
    pairs-00000.safetensors "noise" and "sample" (n, C, h, w) float32, "label" (n,) int64, -1 for none, "caption" in
                            the metadata, a JSON list of n texts, where there are prompts

A file appears under its name when it is complete, so a folder lacks files but never holds half of one.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from hfgen.models.untrusted import MAX_CONFIG_BYTES, read_json_object

INFO_FILE = "pairs.json"
_REBUILD = "examples/reflow.py writes it again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsInfo:
    """What decides about the pairs of a folder.

    Attributes:
        num_pairs: in the folder.
        pairs_per_file: in each file but the last.
        shape: (C, h, w) of the noise and of the sample.
        has_captions: whether the pairs belong to prompts.
        source: what made them: weights of the network, steps, guidance, seed, captions. Pairs are only continued when
            it is the same.
    """

    num_pairs: int
    pairs_per_file: int
    shape: tuple[int, int, int]
    has_captions: bool
    source: Mapping[str, str | int | float]

    def blocks(self) -> list[range]:
        """The pairs of each file."""
        step = self.pairs_per_file
        return [range(first, min(first + step, self.num_pairs)) for first in range(0, self.num_pairs, step)]

    def to_json(self) -> str:
        """The text of ``pairs.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def differences(self, other: PairsInfo) -> list[str]:
        """How this description, of a folder, differs from the ``other``, of a run, in words."""
        old, new = ({**dataclasses.asdict(info), **info.source} for info in (self, other))
        names = [name for name in {**old, **new} if name != "source" and old.get(name) != new.get(name)]
        return [f"its {name} is {old.get(name)}, not {new.get(name)}" for name in names]


def read_pairs_info(folder: Path) -> PairsInfo:
    """Read ``pairs.json``.

    Raises:
        ValueError: it is missing, or no sound description.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no pairs: it has no {INFO_FILE}. examples/reflow.py writes it.")
    values = read_json_object(path, MAX_CONFIG_BYTES)
    names = {field.name for field in dataclasses.fields(PairsInfo)}
    shape, source = values.get("shape"), values.get("source")
    sizes = [values.get("num_pairs"), values.get("pairs_per_file"), *(shape if isinstance(shape, list) else ())]
    sound = len(sizes) == 5 and all(type(size) is int and 0 < size < 2**40 for size in sizes)
    simple = isinstance(source, dict) and all(isinstance(value, str | int | float) for value in source.values())
    if values.keys() != names or not sound or not simple or type(values["has_captions"]) is not bool:
        raise ValueError(f"{path} does not describe pairs. {_REBUILD}.")
    return PairsInfo(**{**values, "shape": tuple(shape)})


def pairs_file(folder: Path, info: PairsInfo, block: range) -> Path:
    """The file that holds a block of pairs."""
    return folder / f"pairs-{block.start // info.pairs_per_file:05d}.safetensors"


def write_pairs_file(
    path: Path, noise: Tensor, sample: Tensor, labels: Tensor, captions: Sequence[str] | None
) -> None:
    """Write one file through a temporary name."""
    temporary = path.with_name(path.name + ".tmp")
    tensors = {"noise": noise.contiguous(), "sample": sample.contiguous(), "label": labels}
    save_file(tensors, temporary, metadata=None if captions is None else {"caption": json.dumps(list(captions))})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class FlowPairs(Dataset):
    """The pairs of a folder.

    ``pairs[(epoch, index)]``, or ``pairs[index]``, is a dict with ``noise`` and ``sample`` (C, h, w) float32,
    ``label`` (-1 for none), ``index`` and, if there are prompts, ``caption``. All epochs have the same pairs.

    Args:
        folder: that examples/reflow.py wrote.

    Raises:
        ValueError: the folder holds no pairs, lacks files, or a file does not fit the description.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.info = read_pairs_info(self.folder)
        absent = [block for block in self.info.blocks() if not pairs_file(self.folder, self.info, block).is_file()]
        if absent:
            raise ValueError(
                f"The pairs in {folder} are unfinished, {len(absent)} files are missing: run the command that writes "
                "them again, and it continues."
            )
        self._files: dict[int, tuple[Any, list[str] | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "info": self.info, "_files": {}}

    def __len__(self) -> int:
        return self.info.num_pairs

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of 0..{len(self) - 1}")
        number, row = divmod(index, self.info.pairs_per_file)
        if number not in self._files:
            self._files[number] = self._open(self.info.blocks()[number])
        file, captions = self._files[number]
        item = {name: file.get_slice(name)[row : row + 1][0] for name in ("noise", "sample")}
        item |= {"label": int(file.get_slice("label")[row : row + 1]), "index": index}
        return item if captions is None else {**item, "caption": captions[row]}

    def _open(self, block: range) -> tuple[Any, list[str] | None]:
        path = pairs_file(self.folder, self.info, block)
        shape = [len(block), *self.info.shape]
        try:
            file = safe_open(path, "pt")
            found = {
                name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()
            }
            captions = json.loads((file.metadata() or {})["caption"]) if self.info.has_captions else None
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}. Delete it: {_REBUILD}.") from error
        expected = {"noise": (shape, "F32"), "sample": (shape, "F32"), "label": ([len(block)], "I64")}
        texts = captions is None or (
            isinstance(captions, list) and len(captions) == len(block) and all(isinstance(c, str) for c in captions)
        )
        if found != expected or not texts:
            raise ValueError(f"{path} does not hold the pairs that {INFO_FILE} describes. Delete it: {_REBUILD}.")
        return file, captions
