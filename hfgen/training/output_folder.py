"""Keeps what hfgen writes apart from what a folder holds already."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

_SHOWN = 3
_OF_A_LAUNCH = (".*", "*.log", "*.out", "*.err", "*.lock", "*.tmp")  # a launcher's output, locks, half-written files


def check_output_folder(folder: Path, kind: str, *, marks: Sequence[str], parts: Sequence[str]) -> None:
    """Refuse a folder of other things; one that does not exist, is empty, or holds a launch's log files is fine.

    Args:
        folder: to be written into.
        kind: of what is written, for the message: ``"run"`` or ``"cache"``.
        marks: files of which any one says that the folder holds such a thing, as path relative to it.
        parts: patterns of the names that a start leaves which was interrupted before the first mark.

    Raises:
        ValueError: the folder, or one above it, is a file, or it holds something else.
    """
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if existing.exists() and not existing.is_dir():
        raise ValueError(
            f"{folder} cannot be the folder of a {kind}: {existing} is a file. Choose another --output_dir."
        )
    if not folder.is_dir() or any((folder / mark).is_file() for mark in marks):
        return
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in (*parts, *_OF_A_LAUNCH))]
    if foreign:
        shown = ", ".join(foreign[:_SHOWN]) + (", ..." if len(foreign) > _SHOWN else "")
        raise ValueError(
            f"{folder} holds no {kind} of hfgen but other things ({shown}), which would be mixed with its files. "
            "Choose a new or an empty folder as --output_dir."
        )
