"""Tar files of samples, local or remote: finding them and reading their members.

Members whose names differ only after the first dot form a sample, as in ``webdataset``: ``dir/0001.jpg``,
``dir/0001.cls`` and ``dir/0001.json`` are three fields of the sample ``dir/0001``. Names only group the members:
nothing is extracted to the disk, and links, devices and folders are passed over.
"""

from __future__ import annotations

import glob
import logging
import re
import tarfile
import urllib.error
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import fsspec

from hfgen.data.rows import BrokenImageError
from hfgen.data.web_file import WebFile

logger = logging.getLogger(__name__)

MAX_MEMBER_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20  # of long names and pax records
_MAX_OPEN_FILES = 16
_SKIP_BYTES = 2**20
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

# What tarfile raises on damaged headers; a chain of pax headers recurses.
_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError)


class BrokenShardError(ValueError):
    """A tar file that cannot be opened or read to its end; the message names it."""


# ----------------------------------------------------------------------------------------------------------- names


def is_remote(source: str) -> bool:
    return "://" in source


def is_tar_source(source: str) -> bool:
    """Whether ``source`` names tar files: a URL, a name or pattern ending in ``.tar``, or a folder of tar files."""
    if is_remote(source) or source.endswith(".tar"):
        return True
    folder = Path(source).expanduser()
    return folder.is_dir() and any(any(part.glob("*.tar")) for part in (folder, folder / "train"))


def expand_braces(pattern: str) -> list[str]:
    """``a-{00..02}`` gives ``a-00``, ``a-01``, ``a-02``, and ``{x,y}`` gives ``x``, ``y``; several groups multiply."""
    opening, closing = pattern.find("{"), pattern.find("}")
    if opening < 0 or closing < opening:
        return [pattern]
    inside = pattern[opening + 1 : closing]
    if match := _RANGE.fullmatch(inside):
        first, last = match.groups()
        width = len(first) if first.startswith("0") else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    if not choices:
        raise ValueError(f"{pattern!r} has an empty range {{{inside}}}: the first number is larger than the last")
    return [pattern[:opening] + choice + rest for choice in choices for rest in expand_braces(pattern[closing + 1 :])]


def list_shards(source: str, split: str = "train") -> list[str]:
    """The tar files that ``source`` names, in sorted order for folders and wildcards.

    Args:
        source: a folder, or names of ``.tar`` files with ``{000..099}``, ``{a,b}`` and, unless they begin with
            ``https://``, wildcards.
        split: a sub-folder of a folder, if it has one of that name; other sources have the split ``"train"`` only.

    Raises:
        ValueError: if there is no such file or split.
    """
    folder = Path(source).expanduser()
    if not is_remote(source) and folder.is_dir():
        if (folder / split).is_dir():
            folder = folder / split
        elif split != "train":
            raise ValueError(f"the folder {folder} has no split {split!r}: put its tar files into {folder / split}")
        shards = sorted(str(path) for path in folder.glob("*.tar"))
        if not shards:
            raise ValueError(f"the folder {folder} has no .tar files")
        return shards
    if split != "train":
        raise ValueError(f"{source!r} has no split {split!r}: only a folder of tar files has others than 'train'")
    shards = [shard for pattern in expand_braces(source) for shard in _expand_wildcards(pattern)]
    for shard in shards:
        if not shard.partition("?")[0].endswith(".tar"):
            raise ValueError(f"{shard!r} is not a tar file: streams are made of uncompressed files that end in .tar")
        if not is_remote(shard) and not Path(shard).is_file():
            raise ValueError(f"there is no tar file {shard!r}: check {source!r}")
    return shards


def _expand_wildcards(pattern: str) -> list[str]:
    if pattern.startswith(("http://", "https://")):
        if "*" in pattern:
            raise ValueError(f"{pattern!r}: a web server cannot list files; name them, as in shard-{{000..099}}.tar")
        return [pattern]
    if not is_remote(pattern):
        pattern = str(Path(pattern).expanduser())
        if not glob.has_magic(pattern):
            return [pattern]
        shards = sorted(glob.glob(pattern))
    else:
        if not glob.has_magic(pattern):
            return [pattern]
        files, path = fsspec.core.url_to_fs(pattern)
        shards = [files.unstrip_protocol(found) for found in sorted(files.glob(path))]
    if not shards:
        raise ValueError(f"no tar file matches {pattern!r}")
    return shards


def open_file(name: str) -> BinaryIO:
    """Opens a local or remote file; ``https://`` and ``hf://`` files are streamed by one request."""
    if not is_remote(name):
        return open(name, "rb")
    if name.startswith(("http://", "https://")):
        return WebFile(name)
    files, path = fsspec.core.url_to_fs(name)
    return files.open(path, "rb", block_size=0) if name.startswith("hf://") else files.open(path, "rb")


def read_beside(shard: str, name: str) -> str | None:
    """The text of the small file ``name`` in the folder of ``shard``, or None if there is none."""
    path = "/".join([shard.replace("\\", "/").rpartition("/")[0] or ".", name])
    try:
        with open_file(path) as file:
            return file.read(MAX_HEADER_BYTES).decode("utf-8")
    except FileNotFoundError:
        return None
    except urllib.error.HTTPError as error:
        if error.code in (403, 404):  # object stores answer 403 for what they do not have
            return None
        raise
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


# --------------------------------------------------------------------------------------------------------- members


@dataclass(frozen=True)
class Member:
    """One field of a sample: where its bytes are, and the bytes themselves if the file cannot be visited again."""

    offset: int
    size: int
    data: bytes | None = None


@dataclass(frozen=True)
class Sample:
    """The fields of one sample by their extension; ``number`` counts the samples of the shard."""

    shard: str
    number: int
    key: str
    fields: dict[str, Member]

    @property
    def name(self) -> str:
        return f"{self.shard}: {self.key}"


class _Reader:
    """What ``tarfile`` reads from: bounded reads, and forward seeks on files that only stream.

    Args:
        file: to read.
        length: of the file in bytes; None if it cannot seek.
    """

    def __init__(self, file: BinaryIO, length: int | None) -> None:
        self.file, self.length = file, length
        self.position, self.last = 0, b""

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if self.length is not None:
            if position > self.length:
                raise ValueError(f"it has {self.length} bytes, but a header reaches to {position}: it was cut off")
            self.position = self.file.seek(position)
        while self.position < position and self._take(min(position - self.position, _SKIP_BYTES)):
            pass

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header asks for {size} bytes, at most {MAX_HEADER_BYTES} are allowed")
        self.last = self._take(size)
        return self.last

    def _take(self, size: int) -> bytes:
        data = self.file.read(size)
        self.position += len(data)
        return data

    def body(self, offset: int, size: int) -> bytes:
        self.seek(offset)
        parts = []
        while size > 0 and (part := self._take(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def read_samples(shard: str, extensions: Collection[str]) -> Iterator[Sample]:
    """The samples of a tar file in order, with those fields whose extension (lower case, no dot) is wanted.

    A local file is walked from header to header without reading the contents; a remote one is read once, and the
    samples carry their contents.

    Raises:
        BrokenShardError: if the file is missing, damaged, cut off or holds absurd sizes.
    """
    local = not is_remote(shard)
    key, fields, number = None, {}, 0
    try:
        with open_file(shard) as file:
            reader = _Reader(file, Path(shard).stat().st_size if local else None)
            for info in _members(reader):
                folder, _, base = info.name.rpartition("/")
                stem, _, extension = base.partition(".")
                extension = extension.lower()
                if not stem or extension not in extensions:
                    continue
                if (member_key := f"{folder}/{stem}" if folder else stem) != key:
                    if fields:
                        yield Sample(shard, number, key, fields)
                        number += 1
                    key, fields = member_key, {}
                keep = not local and info.size <= MAX_MEMBER_BYTES
                data = reader.body(info.offset_data, info.size) if keep else None
                fields.setdefault(extension, Member(info.offset_data, info.size, data))
    except _TAR_ERRORS as error:
        reason = "its headers are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BrokenShardError(f"cannot read the tar file {shard}: {reason}") from error
    if fields:
        yield Sample(shard, number, key, fields)


def _members(reader: _Reader) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive; an error unless it ends as tar files do."""
    archive = tarfile.open(fileobj=reader, mode="r:")
    while (info := archive.next()) is not None:
        archive.members.clear()  # it would keep all of them
        if info.size < 0:
            raise ValueError(f"the member {info.name!r} has the size {info.size}")
        if info.isreg() and not info.issparse():
            yield info
    # tarfile takes damaged headers after the first one for the end, and would pass over the rest in silence.
    if len(reader.last) < tarfile.BLOCKSIZE:
        raise ValueError(f"it ends after {reader.tell()} bytes without an end mark: it was cut off")
    if any(reader.last):
        raise ValueError(f"the header at byte {reader.tell() - tarfile.BLOCKSIZE} is damaged")
    if any(reader.read(_SKIP_BYTES)):
        raise ValueError("data follows its end mark: tar files that were joined must be split again")


class MemberReader:
    """Reads members of local shards through a few files that stay open; a context manager."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()

    def __enter__(self) -> MemberReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def read(self, sample: Sample, extension: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
        """The bytes of a field; a BrokenImageError if it claims more than ``limit`` or the file has become shorter."""
        member = sample.fields[extension]
        if member.size > limit:
            raise BrokenImageError(
                f"cannot read {sample.name}.{extension}: it has {member.size} bytes, at most {limit} are allowed"
            )
        data = member.data
        if data is None:
            file = self._files.pop(sample.shard, None) or open(sample.shard, "rb")
            self._files[sample.shard] = file
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            file.seek(member.offset)
            data = file.read(member.size)
        if len(data) != member.size:
            raise BrokenImageError(f"cannot read {sample.name}.{extension}: the tar file is cut off inside of it")
        return data
