"""Tiny tar files of samples for the tests of streams."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, width: int = 12, height: int = 10) -> bytes:
    """A small picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
    """Members by name, as contents or as ready-made headers without contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: tuple[int, ...] = (4, 3, 5, 4, 2), num_classes: int = 3) -> Path:
    """Shards ``00.tar``, ``01.tar``, ... of pictures with labels and captions; sample k is named ``k`` and unique."""
    sample = 0
    for shard, count in enumerate(counts):
        members = {}
        for _ in range(count):
            members[f"{sample:04d}.png"] = png(sample)
            members[f"{sample:04d}.cls"] = str(sample % num_classes).encode()
            members[f"{sample:04d}.txt"] = f"picture number {sample}\n".encode()
            sample += 1
        write_tar(folder / f"{shard:02d}.tar", members)
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(num_classes)))
    return folder
