"""Reading checkpoint files without running what is inside them."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hfgen.conversion.flax_msgpack import read_flax
from hfgen.models.untrusted import MAX_INDEX_BYTES, read_json_object

PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".msgpack")
_INDEX_SUFFIX = ".index.json"
# Tensors may share memory, but not so much that a small file makes large copies. Small buffers are often expanded.
_MAX_EXPANSION = 8
_EXPANSION_ALLOWANCE = 64 * 2**20  # bytes


def read_checkpoint(
    checkpoint: str | PathLike[str] | Mapping[str, Any], *, allow_pickle: bool = False
) -> dict[str, Any]:
    """The content of a checkpoint on the CPU.

    Args:
        checkpoint: a ``.safetensors``, ``.pth``, ``.pt``, ``.ckpt`` or ``.bin`` file, a flax ``.msgpack`` file (also
            without a suffix), the ``*.index.json`` of a sharded one, a folder that holds exactly one of these, or a
            mapping, which is returned as it is.
        allow_pickle: run the pickle program of a PyTorch file when it holds more than tensors and plain containers.
            Only for files that you trust as much as a program. Otherwise no code of the file is ever executed.

    Returns:
        Tensors by name. A PyTorch file keeps its own nesting, such as a trainer's wrapper around the state dict; the
        names of a flax file are joined with dots.
        Tensors may be mapped from the file: clone those that must outlive it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, of another kind or refused; the folder holds none or several; the shard index
            does not fit its files.
    """
    if isinstance(checkpoint, Mapping):
        return dict(checkpoint)
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    if path.is_dir():
        path = _only_checkpoint(path)
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_sharded(path, allow_pickle)
    if path.suffix not in (*SUFFIXES, ""):
        raise ValueError(f"{path} is not a checkpoint: its name must end in one of {', '.join(SUFFIXES)}.")
    return _read_file(path, allow_pickle)


def _only_checkpoint(folder: Path) -> Path:
    """The one checkpoint of a folder; the shards of an index do not count beside it."""
    indices = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    shards = {name for index in indices for name in _weight_map(index).values()}
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.name not in shards)
    candidates = indices + files
    if not candidates:
        raise ValueError(f"The folder {folder} holds no checkpoint ({', '.join(SUFFIXES)}).")
    if len(candidates) > 1:
        names = ", ".join(path.name for path in candidates)
        raise ValueError(f"The folder {folder} holds several checkpoints: {names}. Name one of these files.")
    return candidates[0]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard name of a shard index, with only plain file names beside the index as shards."""
    try:
        weight_map = read_json_object(index, MAX_INDEX_BYTES)["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a shard index with a 'weight_map': {error!r}.") from error
    for shard in shards:
        # A shard outside the folder would let a downloaded index read any file of the machine.
        if not isinstance(shard, str) or re.search(r"[/\\:\0]", shard) or Path(shard).suffix not in SUFFIXES:
            raise ValueError(f"{index} names the shard {shard!r}; only checkpoint files beside the index are allowed.")
    return weight_map


def _read_sharded(index: Path, allow_pickle: bool) -> dict[str, Any]:
    weight_map = _weight_map(index)
    state: dict[str, Any] = {}
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not path.is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is not there.")
        state.update(_read_file(path, allow_pickle))
    if state.keys() != weight_map.keys():
        name = min(state.keys() ^ weight_map.keys())
        raise ValueError(f"{index} and its shards disagree on which tensors there are, first on {name!r}.")
    return state


def _read_file(path: Path, allow_pickle: bool) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in PICKLE_SUFFIXES:
        content = _read_pickle(path, allow_pickle)
    else:
        content = read_flax(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict.")
    claimed, size = _tensor_bytes(content), path.stat().st_size
    if claimed > _MAX_EXPANSION * size + _EXPANSION_ALLOWANCE:
        raise ValueError(f"{path} has {size:,} bytes, but copies of its tensors would take {claimed:,}.")
    return dict(content)


def _tensor_bytes(content: Any) -> int:
    """Bytes that copies of all tensors in nested containers take; an expanded tensor claims more than it stores."""
    total, pending, seen = 0, [content], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            total += value.numel() * value.element_size()
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))  # a pickle can hold a list inside itself
            pending.extend(value.values() if isinstance(value, Mapping) else value)
    return total


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or not a safetensors file: {error}.") from error


def _read_pickle(path: Path, allow_pickle: bool) -> Any:
    with path.open("rb") as file:  # reports what the operating system refuses, before damage is looked for
        is_pickle = re.match(rb"\x80[\2-\5]", file.read(2)) is not None
    # Only the zip format of torch.save can be mapped; older files are read whole.
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can fail with any exception
        refused = None if allow_pickle else _refused(str(error), is_pickle)
        if refused is None:
            # Without PyTorch's own advice, which is to read the file unsafely.
            reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
            reason = reason or type(error).__name__
            raise ValueError(f"{path} is cut off or not a PyTorch checkpoint: {reason}") from error
        raise ValueError(
            f"{path} was not read: besides tensors it holds {refused}, and restoring that can run any code. If you "
            "trust the file, pass allow_pickle=True (on the command line --trust-pickle)."
        ) from error


def _check_archive(path: Path) -> None:
    """torch.save never compresses: a compressed member is a zip bomb, and mapped it would be read as garbage."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [member.filename for member in archive.infolist() if member.file_size != member.compress_size]
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is cut off or not a PyTorch checkpoint: {error}") from error
    if packed:
        raise ValueError(
            f"{path} is not a checkpoint as torch.save writes it: {packed[0]} is compressed. Save it again with torch."
        )


def _refused(message: str, is_pickle: bool) -> str | None:
    """What the weights-only reader of PyTorch refused, by its message; None when the file was simply unreadable."""
    told = r"(?:GLOBAL|unrecognized function|allowlisted .*but got) (.+?)(?: was not | whose |$)"
    if found := re.search(told, message, re.MULTILINE):
        return found[1]
    if is_pickle and "Unsupported operand" in message:
        return "instructions of a later pickle protocol"
    return None
