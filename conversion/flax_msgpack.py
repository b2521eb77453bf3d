"""Reading checkpoints that flax wrote with msgpack, without flax or msgpack.

Such a file is a nested map from names to arrays. An array is a msgpack extension of type 1 whose content is again
msgpack: (shape, dtype name, raw bytes in C order). Only these kinds of values are read; nothing in a file can run.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfgen.models.untrusted import MAX_TENSORS

_MAX_DEPTH = 16
_NDARRAY = 1  # flax's extension type of an array
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
# First byte -> kind and number of bytes that hold the length, or the value of an integer.
_HEADS = {
    **{0xC4 + k: ("bin", 2**k) for k in range(3)},
    **{0xC7 + k: ("ext", 2**k) for k in range(3)},
    **{0xCC + k: ("uint", 2**k) for k in range(4)},
    **{0xD0 + k: ("int", 2**k) for k in range(4)},
    **{0xD9 + k: ("str", 2**k) for k in range(3)},
    **{0xDC + k: ("array", 2 << k) for k in range(2)},
    **{0xDE + k: ("map", 2 << k) for k in range(2)},
}


def read_flax(path: Path) -> dict[str, Any]:
    """The arrays of a file as CPU tensors, by the names on the way to them joined with dots.

    Raises:
        ValueError: the file is cut off, of another kind, nested too deeply or holds too many values.
    """
    reader = _Reader(memoryview(path.read_bytes()))
    try:
        tree = reader.value()
        reader.finish()
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is cut off or not a flax msgpack checkpoint: {error}.") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; expected a map of flax parameters.")
    return dict(_flatten(tree))


def _flatten(tree: dict[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


class _Reader:
    """A cursor over msgpack bytes."""

    def __init__(self, view: memoryview):
        self._view = view
        self._position = 0
        self._num_values = 0

    def finish(self) -> None:
        if self._position != len(self._view):
            raise ValueError(f"{len(self._view) - self._position} bytes after its end")

    def value(self, depth: int = 0) -> Any:
        self._num_values += 1
        if self._num_values > 4 * MAX_TENSORS:
            raise ValueError(f"more than {4 * MAX_TENSORS:,} values")
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        kind, size = self._head()
        if kind == "map":
            return self._map(size, depth)
        if kind == "array":
            return [self.value(depth + 1) for _ in range(size)]
        if kind == "ext":
            extension = self._integer(1)
            if extension != _NDARRAY:
                raise ValueError(f"an extension of type {extension} where arrays have type {_NDARRAY}")
            return _tensor(self._take(size))
        if kind == "str":
            return str(self._take(size), "utf-8")
        return self._take(size) if kind == "bin" else size

    def _map(self, size: int, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in entries:
                raise ValueError(f"the name {key!r}, which is no text or occurs twice")
            entries[key] = self.value(depth + 1)
        return entries

    def _head(self) -> tuple[str, int]:
        """Kind of the next value and its length; for an integer the value itself."""
        first = self._integer(1)
        if first < 0x80:
            return "uint", first
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "array", first & 0x0F
        if first < 0xC0:
            return "str", first & 0x1F
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in _HEADS:
            raise ValueError(f"a value of msgpack kind 0x{first:02x}, which checkpoints do not have")
        kind, size = _HEADS[first]
        return kind, self._integer(size, signed=kind == "int")

    def _integer(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "big", signed=signed)

    def _take(self, size: int) -> memoryview:
        end = self._position + size
        if end > len(self._view):
            raise ValueError(f"{size:,} bytes expected at {self._position:,}, but it ends at {len(self._view):,}")
        taken = self._view[self._position : end]
        self._position = end
        return taken


def _tensor(content: memoryview) -> Tensor:
    reader = _Reader(content)
    parts = reader.value()
    reader.finish()
    if not isinstance(parts, list) or len(parts) != 3:
        raise ValueError("an array that is not (shape, dtype, bytes)")
    shape, dtype, data = parts
    if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"an array of the shape {shape!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"an array of dtype {dtype!r}")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if not isinstance(data, memoryview) or len(data) != expected:
        raise ValueError(f"an array of shape {tuple(shape)} that does not have its {expected:,} bytes")
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).view(shape)
