"""Attributes that written captions name right."""

from __future__ import annotations

import pytest

from hfgen.data.shapes import draw_scenes
from hfgen.evaluation.caption_accuracy import caption_accuracy

ONE = "a small red circle at the top left"
TWO = "a small red circle at the top left and a large blue cross in the centre"


def test_true_captions_are_all_right():
    captions = [
        caption for split in ("single", "double") for caption in draw_scenes(range(20), split=split).captions()
    ]
    values = caption_accuracy(captions, captions)
    assert set(values.values()) == {1.0}
    names = {"shape", "colour", "size", "cell", "attributes", "object"}
    assert values.keys() == names | {f"pair_{name}" for name in names} | {"pair", "objects"}


def test_each_attribute_counts_by_itself():
    values = caption_accuracy(
        ["a small red square at the top left", "a large green circle at the top", ONE], [ONE] * 3
    )
    assert values["shape"] == pytest.approx(2 / 3) and values["colour"] == pytest.approx(2 / 3)
    assert values["size"] == pytest.approx(2 / 3) and values["cell"] == pytest.approx(2 / 3)
    assert values["attributes"] == pytest.approx(2 / 3) and values["object"] == pytest.approx(1 / 3)


def test_two_objects_in_either_order_but_not_mixed_up():
    swapped = "a large blue cross in the centre and a small red circle at the top left"
    assert caption_accuracy([swapped], [TWO])["pair"] == 1
    mixed_up = "a small blue circle at the top left and a large red cross in the centre"
    values = caption_accuracy([mixed_up], [TWO])
    assert (values["pair_colour"], values["pair_shape"], values["pair"], values["pair_object"]) == (0, 1, 0, 0)


def test_missing_and_added_objects():
    values = caption_accuracy([ONE, TWO], [TWO, ONE])
    assert values["objects"] == 0
    assert values["pair_object"] == 0.5 and values["pair"] == 0  # one of the two is named
    assert values["object"] == 1  # the first phrase is right


def test_text_that_is_no_caption():
    texts = ["", "red", "a small red green circle at the top left", "a small reddish circle at the top left"]
    values = caption_accuracy(texts, [ONE] * 4)
    assert values["colour"] == 0.25  # the lone word; of two colours none counts, and a part of a word is none
    assert values["cell"] == values["size"] == values["shape"] == 0.5
    assert values["object"] == 0


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="got 1 written texts for 2 captions"):
        caption_accuracy([ONE], [ONE, ONE])
    with pytest.raises(ValueError, match="none of the captioned shapes"):
        caption_accuracy([ONE], ["a photo of a dog"])
