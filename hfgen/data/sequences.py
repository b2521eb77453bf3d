"""Sequences of text and images as ids, and rows that several of them share.

A document is one sequence. An image in it is a run of slots between two markers::

    caption first    bos caption boi slots eoi eos
    image first      bos boi slots eoi caption eos
    no caption       bos boi slots eoi
    text             bos text eos

A text that goes on after the document has no eos, which would teach that it ends there.

The slots are of as many tokens as an image has; whoever knows the images puts patches or codes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_SEGMENT = 0


@dataclass(frozen=True)
class Document:
    """One sequence.

    Attributes:
        ids: with slots for images.
        images: the images of a batch that the slots stand for, in order of appearance.
        image_first: whether text follows the images that is about them.
    """

    ids: tuple[int, ...]
    images: tuple[int, ...] = ()
    image_first: bool = False


@dataclass(frozen=True)
class SequenceFormat:
    """The ids that documents are made of.

    Attributes:
        bos, eos: begin and end of a document.
        boi, eoi: begin and end of an image.
        pad: fills rows up.
        slot: a token of an image; may be any id that text has not, such as -1.
        num_slots: tokens of an image.
    """

    bos: int
    eos: int
    boi: int
    eoi: int
    pad: int
    slot: int
    num_slots: int

    @property
    def overhead(self) -> int:
        """Tokens of a document with an image besides its caption."""
        return self.num_slots + 4

    def text(self, text: Sequence[int], *, goes_on: bool = False) -> Document:
        """Text alone."""
        return Document((self.bos, *text, *self._end(goes_on)))

    def captioned(self, caption: Sequence[int], image: int, *, image_first: bool, goes_on: bool = False) -> Document:
        """An image and its caption, or the beginning of one that ``goes_on``, in either order."""
        parts = (*self._image(), *caption) if image_first else (*caption, *self._image())
        return Document((self.bos, *parts, *self._end(goes_on and image_first)), (image,), image_first)

    def uncaptioned(self, image: int) -> Document:
        """An image without its caption.

        It ends with the image: an end of the document would teach that images have no captions.
        """
        return Document((self.bos, *self._image()), (image,))

    def _end(self, goes_on: bool) -> tuple[int, ...]:
        return () if goes_on else (self.eos,)

    def _image(self) -> tuple[int, ...]:
        return (self.boi, *[self.slot] * self.num_slots, self.eoi)


@dataclass(frozen=True)
class PackedRows:
    """Documents side by side in rows of one length.

    Attributes:
        ids: (R, L) int64, padded at the end.
        segment_ids: (R, L) int64: 1, 2, ... for the documents of a row, ``PADDING_SEGMENT`` for its padding.
        images: (N,) int64, the images of the batch in order of appearance over the flattened rows.
        image_first: (N,) boolean, whether text about the image follows it.
        num_wasted: how many of the R L ids are padding.
    """

    ids: Tensor
    segment_ids: Tensor
    images: Tensor
    image_first: Tensor
    num_wasted: int

    @property
    def wasted_share(self) -> float:
        """The share of padding."""
        return self.num_wasted / self.ids.numel()

    def to(self, device: torch.device | str) -> PackedRows:
        """The same rows on a device."""
        tensors = (self.ids, self.segment_ids, self.images, self.image_first)
        return PackedRows(*(tensor.to(device) for tensor in tensors), self.num_wasted)


def pack(documents: Sequence[Document], length: int, pad: int) -> PackedRows:
    """Put documents into as few rows as first-fit decreasing finds, which is at most 11/9 of the least and one more.

    Args:
        documents: at least one; equally long ones keep their order.
        length: L.
        pad: id of padding.

    Raises:
        ValueError: a document is longer than a row, or there is none.
    """
    longest = max((len(document.ids) for document in documents), default=0)
    if not 0 < longest <= length:
        raise ValueError(
            f"The longest of {len(documents)} documents has {longest} tokens; expected 1 to {length}, the length of a "
            "row. Cut texts, or make rows longer."
        )
    rows: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda each: -len(each.ids)):
        row = next((index for index, left in enumerate(room) if left >= len(document.ids)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(document)
        room[row] -= len(document.ids)

    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    segment_ids = torch.full_like(ids, PADDING_SEGMENT)
    for row, members in enumerate(rows):
        start = 0
        for segment, document in enumerate(members, start=1):
            end = start + len(document.ids)
            ids[row, start:end] = torch.tensor(document.ids)
            segment_ids[row, start:end] = segment
            start = end
    members = [document for row in rows for document in row]
    images = [image for document in members for image in document.images]
    image_first = [document.image_first for document in members for _ in document.images]
    return PackedRows(
        ids,
        segment_ids,
        torch.tensor(images, dtype=torch.int64),
        torch.tensor(image_first, dtype=torch.bool),
        num_wasted=sum(room),
    )
