"""Documents of text and images, and rows of them."""

from __future__ import annotations

import pytest
import torch

from hfgen.data.sequences import Document, SequenceFormat, pack

BOS, EOS, BOI, EOI, PAD, SLOT = 1, 2, 90, 91, 92, 93
FORMAT = SequenceFormat(bos=BOS, eos=EOS, boi=BOI, eoi=EOI, pad=PAD, slot=SLOT, num_slots=3)
IMAGE = (BOI, SLOT, SLOT, SLOT, EOI)


def _documents(*lengths: int) -> list[Document]:
    return [Document(tuple([10 + index] * length)) for index, length in enumerate(lengths)]


def test_documents():
    assert FORMAT.text([7, 8]).ids == (BOS, 7, 8, EOS)
    first, last = (FORMAT.captioned([7, 8], 4, image_first=order) for order in (True, False))
    assert first.ids == (BOS, *IMAGE, 7, 8, EOS) and first.image_first and first.images == (4,)
    assert last.ids == (BOS, 7, 8, *IMAGE, EOS) and not last.image_first
    assert len(first.ids) == FORMAT.overhead + 2
    # Nothing after the image says that there is no caption.
    assert FORMAT.uncaptioned(0).ids == (BOS, *IMAGE) and not FORMAT.uncaptioned(0).image_first


def test_what_goes_on_has_no_end():
    assert FORMAT.text([7, 8], goes_on=True).ids == (BOS, 7, 8)
    assert FORMAT.captioned([7], 0, image_first=True, goes_on=True).ids == (BOS, *IMAGE, 7)
    assert FORMAT.captioned([7], 0, image_first=False, goes_on=True).ids == (BOS, 7, *IMAGE, EOS)


def test_rows_hold_every_document_once():
    documents = _documents(3, 5, 2, 4, 1)
    rows = pack(documents, 8, PAD)
    assert rows.ids.shape == rows.segment_ids.shape == (2, 8)
    found = []
    for ids, segments in zip(rows.ids.tolist(), rows.segment_ids.tolist()):
        assert segments == sorted(segments, key=lambda segment: (segment == 0, segment))  # padding is at the end
        assert [segment == 0 for segment in segments] == [token == PAD for token in ids]
        for segment in set(segments) - {0}:
            found.append(tuple(token for token, each in zip(ids, segments) if each == segment))
    assert sorted(found) == sorted(document.ids for document in documents)
    assert rows.num_wasted == 1 and rows.wasted_share == 1 / 16


def test_longest_documents_are_placed_first():
    # In the order given, 4 4 6 6 would need three rows of 10.
    rows = pack(_documents(4, 4, 6, 6), 10, PAD)
    assert len(rows.ids) == 2 and rows.num_wasted == 0


def test_images_in_order_of_appearance():
    documents = [
        FORMAT.captioned([5], 0, image_first=True),
        FORMAT.text([5, 6]),
        FORMAT.captioned([5, 6, 7, 8], 1, image_first=False),
        FORMAT.uncaptioned(2),
    ]
    rows = pack(documents, 20, PAD)
    assert rows.images.tolist() == [1, 0, 2] and rows.image_first.tolist() == [False, True, False]
    assert (rows.ids == SLOT).sum() == 3 * FORMAT.num_slots
    assert all(torch.equal(getattr(rows.to("cpu"), name), getattr(rows, name)) for name in ("ids", "images"))


def test_rows_without_images():
    rows = pack([FORMAT.text([5])], 4, PAD)
    assert rows.images.dtype == torch.int64 and rows.images.shape == rows.image_first.shape == (0,)


def test_documents_that_do_not_fit():
    with pytest.raises(ValueError, match="longest of 2 documents has 9 tokens; expected 1 to 8"):
        pack(_documents(3, 9), 8, PAD)
    with pytest.raises(ValueError, match="of 0 documents"):
        pack([], 8, PAD)
