"""Files that somebody might publish to harm whoever loads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


class Payload:
    """Restoring it from a pickle creates the file ``trace``."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def write_safetensors(
    path: Path, header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> None:
    """A safetensors file with any header; ``length`` is the header's length that the file claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Headers of safetensors files that lie, by what they lie about, with the bytes that follow and the claimed length.
LYING_HEADERS: dict[str, tuple[dict[str, Any] | bytes, bytes, int | None]] = {
    "length-2^60": (b"{}", b"", 2**60),
    "length-2^64-1": (b"{}", b"", 2**64 - 1),
    "length-beyond-file": (b"{}", b"", 3000),
    "shape-overflows": ({"a": entry([2**40, 2**40], 0, 16)}, bytes(16), None),
    "shape-larger-than-data": ({"a": entry([2**40], 0, 16)}, bytes(16), None),
    "negative-shape": ({"a": entry([-4], 0, 16)}, bytes(16), None),
    "offsets-outside": ({"a": entry([2**38], 0, 2**40)}, bytes(16), None),
    "offsets-backwards": ({"a": entry([4], 16, 0)}, bytes(16), None),
    "offsets-overlap": ({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, bytes(24), None),
    "offsets-with-a-hole": ({"a": entry([4], 0, 16), "b": entry([4], 32, 48)}, bytes(48), None),
    "unknown-dtype": ({"a": entry([4], 0, 16, "OBJECT")}, bytes(16), None),
    "deeply-nested": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", None),
    "no-json": (b"\xff" * 64, b"", None),
}
