"""Training images from tar files of any number and size, in an order that is a function of counters.

The shards of all epochs, each epoch permuted anew, form one endless sequence. It is dealt in turn to *lanes*, one per
loading worker of every process: with L lanes, lane l reads the shards at the places l, l + L, l + 2 L, ... of that
sequence. So every lane is endless, which gives every process the same number of steps whatever the number of shards
is, and every sample of every epoch is read by exactly one lane, once. A lane mixes its samples of one epoch in a
shuffle buffer and empties the buffer before it goes on to the next epoch.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from hfgen.counters import numpy_generator
from hfgen.data.augmentation import Augmentation
from hfgen.data.rows import IMAGE_SUFFIXES, BrokenImageError, decode_image
from hfgen.data.shards import MemberReader, Sample, list_shards, read_beside, read_samples

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
CAPTION_FIELDS = ("caption", "text")  # of a sample's .json
_TEXT_BYTES = 2**20
_LOOKAHEAD = 1000  # unreadable images in a row that end the stream
_ORDER, _BUFFER = 0x74617231, 0x74617232  # streams of random numbers


class TarImages(torch.utils.data.IterableDataset):
    """Images, labels (``.cls``) and captions (``.txt`` or ``.json``) of tar files.

    Items are dicts with

    - ``pixels``: uint8 ``(3, resolution, resolution)``;
    - ``label``: int in [0, num_classes), or -1 if the samples have no labels;
    - ``caption``: str, only if the samples have captions (a missing one is empty);
    - ``index``: ``shard number * 2**32 + sample number``, and ``name``: the same for people;
    - ``skipped``: names of the unreadable samples met on the way. In place of an unreadable sample the next readable
      one of the lane is shown; each is named once in a warning. With ``strict`` it is a :class:`BrokenImageError`.

    Crop and flip are functions of ``(seed, epoch, shard, sample)``.

    Args:
        source: see :func:`hfgen.data.shards.list_shards`.
        augmentation: makes the pixels; its seed also decides the order.
        split: a sub-folder, if ``source`` is a folder.
        image_column: extension of the image member, such as ``"jpg"`` or ``"seg.png"``; by default the first that is
            an image.
        caption_column: ``"txt"``, or a field of ``.json``; by default ``.txt``, else ``caption`` or ``text``.
        label_column: ``"cls"`` (default), or a field of ``.json`` that holds integers.
        num_classes: needed for labels unless ``classes.txt`` (one name per line) or ``classes.json`` (a list of names)
            lies beside the shards.
        shuffle_buffer: samples to choose the next one from; 1 keeps the order inside the shards.
        strict: an unreadable sample is an error instead of a warning.

    Raises:
        ValueError: for missing files, contradicting class numbers, and fields that the first sample does not have.
        BrokenShardError: at any time, if a tar file is damaged or cut off.
    """

    def __init__(
        self,
        source: str,
        augmentation: Augmentation,
        *,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        num_classes: int | None = None,
        shuffle_buffer: int = 1000,
        strict: bool = False,
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer}: use at least 1, which keeps the order of the files")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}: use at least 1")
        self.name = f"the tar files {source}"
        self.shards = list_shards(source, split)
        self.augmentation, self.shuffle_buffer, self.strict = augmentation, shuffle_buffer, strict
        self._numbers = {shard: number for number, shard in enumerate(self.shards)}
        self._image_extensions = (image_column.lower(),) if image_column else IMAGE_EXTENSIONS
        self._extensions = {*self._image_extensions, "cls", "txt", "json"}
        self._counts: dict[str, int] = {}  # samples of the shards that were read to their end
        self._named: set[str] = set()

        first = next(read_samples(self.shards[0], self._extensions), None)
        if first is None:
            raise ValueError(f"{self.shards[0]} holds no samples: expected members such as 0001.jpg and 0001.cls")
        with MemberReader() as reader:
            record = self._json(first, reader) if "json" in first.fields else {}
        self._label_column = label_column or ("cls" if "cls" in first.fields else None)
        self._caption_column = caption_column or (
            "txt" if "txt" in first.fields else next((name for name in CAPTION_FIELDS if name in record), None)
        )
        for column in filter(None, (self._label_column, self._caption_column)):
            if column not in first.fields and column not in record:
                raise ValueError(
                    f"{self.name}: no {column!r} in the first sample, {first.name}, with the members "
                    f"{sorted(first.fields)} and the JSON fields {sorted(record)}"
                )
        self.has_captions = self._caption_column is not None
        self.class_names = self._class_names(num_classes) if self._label_column else []

    def __len__(self) -> int:
        raise TypeError(f"{self.name} are a stream: the number of images is not known before they have been read")

    @property
    def num_classes(self) -> int:
        """The number of classes; a ValueError if the source has none or does not tell."""
        if not self.class_names:
            raise ValueError(
                f"{self.name} do not tell their number of classes: pass num_classes, or put classes.txt (one name per "
                "line) beside the shards"
                if self._label_column
                else f"{self.name} have no class labels: add .cls members, or name a field of .json as label_column"
            )
        return len(self.class_names)

    def stream(self, lane: int = 0, lanes: int = 1, start: int = 0) -> Iterator[dict[str, Any]]:
        """The endless items of a lane from its item number ``start`` on.

        Skipped epochs of shards that this object has read before cost nothing; otherwise the headers of local files
        are walked, and remote files are read, up to the position, without decoding images.

        Raises:
            ValueError: if there are fewer shards than lanes.
        """
        if lanes > len(self.shards):
            raise ValueError(f"{self.name} are {len(self.shards)}, which cannot feed {lanes} lanes")
        order = self._order(lane, lanes, start)
        upcoming: deque[tuple[int, Sample]] = deque()
        with MemberReader() as reader:
            while True:
                yield self._next_readable(upcoming, order, reader)
                upcoming.popleft()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every readable item of epoch 0 once, in the order of the files."""
        with MemberReader() as reader:
            for sample in self._in_order():
                try:
                    yield self._item(0, sample, reader, ())
                except BrokenImageError as error:
                    self._report(sample, error)

    def captions(self) -> Iterator[str]:
        """Every caption once, in the order of the files; no image is decoded."""
        if not self.has_captions:
            raise ValueError(f"{self.name} have no captions: add .txt members, or a field 'caption' in .json")
        with MemberReader() as reader:
            for sample in self._in_order():
                try:
                    yield self._caption(sample, reader)
                except BrokenImageError as error:
                    self._report(sample, error)

    # ---------------------------------------------------------------------------------------------------- order

    def _in_order(self) -> Iterator[Sample]:
        for shard in self.shards:
            yield from self._samples(shard)

    def _samples(self, shard: str) -> Iterator[Sample]:
        count = 0
        for sample in read_samples(shard, self._extensions):
            count += 1
            yield sample
        self._counts[shard] = count

    def _order(self, lane: int, lanes: int, start: int) -> Iterator[tuple[int, Sample]]:
        """The endless ``(epoch, sample)`` of a lane, without the first ``start``."""
        epoch, idle_epochs = 0, 0
        while True:
            shards = self._lane_shards(epoch, lane, lanes)
            known = all(shard in self._counts for shard in shards)
            if known and sum(self._counts[shard] for shard in shards) <= start:
                start -= sum(self._counts[shard] for shard in shards)
            else:
                for sample in self._shuffled(shards, numpy_generator(_BUFFER, self.augmentation.seed, epoch, lane)):
                    if start == 0:
                        yield epoch, sample
                    else:
                        start -= 1
            idle_epochs = 0 if any(self._counts[shard] for shard in shards) else idle_epochs + 1
            if idle_epochs > len(self.shards):
                raise ValueError(f"{self.name} hold no images")
            epoch += 1

    def _lane_shards(self, epoch: int, lane: int, lanes: int) -> list[str]:
        """A lane's part of an epoch, which begins at place ``epoch * N`` of the endless sequence."""
        permutation = numpy_generator(_ORDER, self.augmentation.seed, epoch).permutation(len(self.shards))
        first = (lane - epoch * len(self.shards)) % lanes
        return [self.shards[number] for number in permutation[first::lanes]]

    def _shuffled(self, shards: list[str], draws: Any) -> Iterator[Sample]:
        buffer: list[Sample] = []
        for shard in shards:
            for sample in self._samples(shard):
                if len(buffer) < self.shuffle_buffer:
                    buffer.append(sample)
                    continue
                chosen = int(draws.random() * len(buffer))
                yield buffer[chosen]
                buffer[chosen] = sample
        while buffer:
            yield buffer.pop(int(draws.random() * len(buffer)))

    # ---------------------------------------------------------------------------------------------------- items

    def _next_readable(
        self, upcoming: deque[tuple[int, Sample]], order: Iterator[tuple[int, Sample]], reader: MemberReader
    ) -> dict[str, Any]:
        """The item of ``upcoming[0]``, or the next readable one, which is shown again when its own turn comes."""
        skipped: list[str] = []
        while len(skipped) < _LOOKAHEAD:
            if len(upcoming) == len(skipped):
                upcoming.append(next(order))
            epoch, sample = upcoming[len(skipped)]
            if sample.name not in self._named:
                try:
                    return self._item(epoch, sample, reader, tuple(skipped))
                except BrokenImageError as error:
                    self._report(sample, error)
            skipped.append(sample.name)
        raise BrokenImageError(
            f"{_LOOKAHEAD} samples in a row cannot be read, the first one is {skipped[0]}: check the files and the "
            "columns"
        )

    def _report(self, sample: Sample, error: BrokenImageError) -> None:
        if self.strict:
            raise BrokenImageError(f"{error}. Repair or remove it, or load with strict=False") from error
        logger.warning("%s; the next readable image takes its place", error)
        self._named.add(sample.name)

    def _item(self, epoch: int, sample: Sample, reader: MemberReader, skipped: tuple[str, ...]) -> dict[str, Any]:
        shard = self._numbers[sample.shard]
        extension = next((name for name in self._image_extensions if name in sample.fields), None)
        if extension is None:
            raise BrokenImageError(f"cannot read {sample.name}: it has no image, only {sorted(sample.fields)}")
        image = decode_image(reader.read(sample, extension), f"{sample.name}.{extension}")
        item = {
            "pixels": self.augmentation(image, epoch, shard, sample.number),
            "label": self._label(sample, reader),
            "index": (shard << 32) + sample.number,
            "name": sample.name,
            "skipped": skipped,
        }
        if self.has_captions:
            item["caption"] = self._caption(sample, reader)
        return item

    def _label(self, sample: Sample, reader: MemberReader) -> int:
        if self._label_column is None:
            return -1
        value = self._value(sample, self._label_column, reader)
        try:
            label = int(value)
            valid = label >= 0 and not isinstance(value, bool | float)
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise BrokenImageError(
                f"cannot read {sample.name}: its label is {str(value)[:40]!r}, expected a class number such as 7"
            )
        if self.class_names and label >= len(self.class_names):
            raise ValueError(
                f"{sample.name} has the label {label}, but {self.name} are said to have {len(self.class_names)} "
                f"classes, numbered from 0: correct num_classes, or classes.txt beside the shards"
            )
        return label

    def _caption(self, sample: Sample, reader: MemberReader) -> str:
        value = self._value(sample, self._caption_column, reader)
        if not isinstance(value, str | None):
            raise BrokenImageError(f"cannot read {sample.name}: its caption is {str(value)[:40]}, expected text")
        return (value or "").strip()

    def _value(self, sample: Sample, column: str, reader: MemberReader) -> Any:
        """A member's text, or a field of the sample's JSON; None if it is missing."""
        if column in ("cls", "txt"):
            return self._text(sample, column, reader) if column in sample.fields else None
        return self._json(sample, reader).get(column) if "json" in sample.fields else None

    def _text(self, sample: Sample, extension: str, reader: MemberReader) -> str:
        try:
            return reader.read(sample, extension, _TEXT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BrokenImageError(f"cannot read {sample.name}.{extension}: {error}") from error

    def _json(self, sample: Sample, reader: MemberReader) -> dict[str, Any]:
        text = self._text(sample, "json", reader)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BrokenImageError(f"cannot read {sample.name}.json: {error}") from error
        if not isinstance(record, dict):
            raise BrokenImageError(f"cannot read {sample.name}.json: expected an object such as {{'caption': '...'}}")
        return record

    def _class_names(self, num_classes: int | None) -> list[str]:
        text, names = read_beside(self.shards[0], "classes.txt"), None
        if text is not None:
            names = [line.strip() for line in text.splitlines() if line.strip()]
        elif (text := read_beside(self.shards[0], "classes.json")) is not None:
            names = json.loads(text)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("classes.json beside the shards must be a list of names, in the order of the labels")
        if names is None:
            return [str(number) for number in range(num_classes or 0)]
        if num_classes not in (None, len(names)):
            raise ValueError(
                f"num_classes is {num_classes}, but the list of classes beside the shards has {len(names)} names"
            )
        return names
