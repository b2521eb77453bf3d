"""The judge of captions is right on true images, and sees each kind of error."""

from __future__ import annotations

import pytest
import torch

from hfgen.data.shapes import captioned_shapes, draw_scenes, render
from hfgen.data.sources import load_images
from hfgen.evaluation.captions import isolate_cells, judge_captions, parse_caption

SINGLE = ("shape", "colour", "size", "cell", "object", "found")
DOUBLE = ("pair_shape", "pair_colour", "pair_size", "pair_object", "pair")


def _images(kind: str, count: int) -> tuple[torch.Tensor, list[str]]:
    data = load_images(kind, resolution=32, limit=count)
    rows = [data[index] for index in range(count)]
    return torch.stack([row["pixels"] for row in rows]), [row["caption"] for row in rows]


def test_true_images_are_right():
    values = judge_captions(*_images("shapes:mixed", 200))
    assert values.keys() == {*SINGLE, *DOUBLE}
    assert all(value == 1.0 for value in values.values()), values


def test_captions_of_one_kind_have_its_values_only():
    assert judge_captions(*_images("shapes", 4)).keys() == set(SINGLE)
    assert judge_captions(*_images("shapes:double", 4)).keys() == set(DOUBLE)


def test_captions_of_other_images_are_right_by_chance():
    pixels, captions = _images("shapes:mixed", 400)
    values = judge_captions(pixels.roll(2, 0), captions)
    expected = {"shape": 1 / 4, "colour": 1 / 6, "size": 1 / 2, "cell": 1 / 9}
    for name, chance in expected.items():
        assert values[name] == pytest.approx(chance, abs=0.12), name
    assert values["found"] == 1.0 and values["object"] < 0.05 and values["pair"] < 0.05


def test_swapped_colours_are_an_error_of_binding():
    """Every word of the caption is in the image, but at the other object."""
    scenes = draw_scenes(range(64), split="double")
    pixels = torch.from_numpy(render(scenes)[0]).permute(0, 3, 1, 2)
    differ = torch.from_numpy(scenes.colour[:, 0] != scenes.colour[:, 1])
    scenes.colour[:] = scenes.colour[:, ::-1]
    captions = [text for text, keep in zip(scenes.captions(), differ) if keep]
    values = judge_captions(pixels[differ], captions)
    assert values["pair_colour"] == 0 and values["pair"] == 0
    assert values["pair_shape"] == values["pair_size"] == 1


def test_parse_caption_inverts_the_captions():
    rows = captioned_shapes(50, split="double")
    for row in rows:
        objects = parse_caption(row["caption"])
        for name in ("shape", "colour", "size", "cell"):
            assert [getattr(each, name) for each in objects] == row[name]


def test_isolate_cells_keeps_one_cell():
    pixels = torch.zeros(1, 3, 9, 9)
    pixels[0, :, 3:6, 6:9] = 1.0
    pixels[0, :, 0:2, 0:2] = 1.0
    kept = isolate_cells(pixels, torch.tensor([5]))
    assert kept.sum() == 27 and kept[0, :, 3:6, 6:9].min() == 1


def test_bad_input_is_named():
    pixels, captions = _images("shapes", 2)
    with pytest.raises(ValueError, match="got 1 captions for 2 images"):
        judge_captions(pixels, captions[:1])
    with pytest.raises(ValueError, match="'a photo' is none of the captioned shapes"):
        judge_captions(pixels, ["a photo", captions[1]])
