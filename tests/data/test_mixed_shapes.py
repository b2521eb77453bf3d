"""The mixture of both splits of the captioned shapes: it has their items, in turn."""

from __future__ import annotations

import pytest
import torch

from hfgen.data.shapes import ShapesData
from hfgen.data.sources import load_images
from hfgen.data.text import read_captions


def test_items_are_those_of_both_splits_in_turn():
    mixed, single, double = (
        load_images(f"shapes:{name}", resolution=16, limit=6) for name in ("mixed", "single", "double")
    )
    assert len(mixed) == 6
    for index in range(6):
        item, expected = mixed[3, index], (double if index % 2 else single)[0, index]
        assert torch.equal(item["pixels"], expected["pixels"])
        assert item["caption"] == expected["caption"]
        assert item["label"] == -1 and item["index"] == index
    captions = list(read_captions(ShapesData(4, resolution=8, split="mixed")))
    assert [" and " in caption for caption in captions] == [False, True, False, True]


def test_large_data_is_rendered_on_demand(monkeypatch):
    expected = ShapesData(5, resolution=8, split="mixed")
    monkeypatch.setattr("hfgen.data.shapes._CACHE_BYTES", 0)
    data = ShapesData(5, resolution=8, split="mixed")
    for index in range(5):
        assert torch.equal(data[index]["pixels"], expected[index]["pixels"])
        assert data[index]["caption"] == expected[index]["caption"]


def test_it_has_no_classes():
    with pytest.raises(ValueError, match='"mixed".*use the split "single"'):
        _ = ShapesData(2, split="mixed").num_classes
