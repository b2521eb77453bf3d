import itertools
import pickle
import re

import datasets
import numpy as np
import pytest
import torch

from hfgen.data.shapes import (
    CELLS,
    COLOURS,
    SHAPES,
    SIZES,
    ShapesData,
    captioned_shapes,
    coverage,
    draw_scenes,
    render,
)

OBJECT = (
    r"a (small|large) (red|green|blue|yellow|magenta|cyan) (circle|square|triangle|cross) "
    r"(in the centre|at the (?:top|bottom)(?: left| right)?|at the left|at the right)"
)


@pytest.mark.parametrize("split", ["single", "double"])
def test_items_depend_only_on_seed_and_index(split):
    few, many = ShapesData(5, seed=3, split=split), ShapesData(40, seed=3, split=split)
    for index in range(5):
        assert torch.equal(few[(0, index)]["pixels"], many[(7, index)]["pixels"])
        assert few[index]["caption"] == many[index]["caption"]


def test_rendering_on_demand_equals_the_cache(monkeypatch):
    cached = ShapesData(6, seed=1)
    monkeypatch.setattr("hfgen.data.shapes._CACHE_BYTES", 0)
    on_demand = ShapesData(6, seed=1)
    for index in range(6):
        expected, item = cached[(0, index)], on_demand[(0, index)]
        assert torch.equal(item.pop("pixels"), expected.pop("pixels"))
        assert item == expected


def test_seeds_and_splits_are_disjoint():
    images = [ShapesData(200, seed=seed) for seed in (0, 1)] + [ShapesData(200, split="double")]
    distinct = {item["pixels"].numpy().tobytes() for data in images for item in map(data.__getitem__, range(200))}
    assert len(distinct) == 600


def test_attributes_are_uniform_and_independent():
    scenes = draw_scenes(range(20000), seed=2)
    attributes = {"shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "cell": len(CELLS)}
    for first, second in itertools.combinations(attributes, 2):
        pairs = getattr(scenes, first)[:, 0] * attributes[second] + getattr(scenes, second)[:, 0]
        cells = attributes[first] * attributes[second]
        expected = 20000 / cells
        chi2 = ((np.bincount(pairs, minlength=cells) - expected) ** 2 / expected).sum()
        assert chi2 < cells + 5 * np.sqrt(2 * cells), (first, second)


def test_captions_name_the_attributes():
    scenes = draw_scenes(range(300), seed=4, split="double")
    for index, caption in enumerate(scenes.captions()):
        words = re.fullmatch(f"{OBJECT} and {OBJECT}", caption).groups()
        for k in range(2):
            cell = CELLS[scenes.cell[index, k]]
            phrase = "in the centre" if cell == "centre" else f"at the {cell}"
            names = (SIZES[scenes.size[index, k]], COLOURS[scenes.colour[index, k]], SHAPES[scenes.shape[index, k]])
            assert words[4 * k : 4 * k + 4] == (*names, phrase)
    assert re.fullmatch(OBJECT, ShapesData(1)[(0, 0)]["caption"])


def test_objects_stay_in_their_cells():
    scenes = draw_scenes(range(500), seed=5, split="double")
    assert (scenes.cell[:, 0] != scenes.cell[:, 1]).all()
    cell_of = np.arange(30) // 10
    cell_of = 3 * cell_of[:, None] + cell_of
    for k in range(2):
        covered = coverage(scenes.shape[:, k], scenes.centre[:, k], scenes.radius[:, k], 30)
        inside = np.where(cell_of == scenes.cell[:, k, None, None], covered, 0)
        # Half of the outline's soft pixel may reach over the border of the cell.
        np.testing.assert_allclose(inside.sum(axis=(1, 2)), covered.sum(axis=(1, 2)), rtol=0.1)
        assert (np.where(cell_of == scenes.cell[:, k, None, None], 0, covered) <= 0.5).all()


def test_pixels_inside_have_the_object_colour_and_edges_are_blended():
    scenes = draw_scenes(range(50), seed=6)
    images, segmentation = render(scenes, 64)
    for index in range(50):
        centre = (scenes.centre[index, 0] * 64).astype(int)
        np.testing.assert_allclose(images[index, centre[1], centre[0]], scenes.rgb[index, 0], atol=0.51)
        far = images[index][0, 0] if scenes.cell[index, 0] != 0 else images[index][-1, -1]
        np.testing.assert_allclose(far, scenes.background[index], atol=0.51)
    circles = np.flatnonzero(scenes.shape[:, 0] == 0)
    assert all(len(np.unique(images[index].reshape(-1, 3), axis=0)) > 10 for index in circles)
    assert (segmentation.max(axis=(1, 2)) == 1 + scenes.shape[:, 0]).all()


def test_coverage_has_the_area_of_the_shape():
    scenes = draw_scenes(range(200), seed=8)
    images, segmentation = render(scenes, 256)
    side = 2 * scenes.radius[:, 0] * 256
    area = np.array([np.pi / 4, 1, 1 / 2, 5 / 9])[scenes.shape[:, 0]] * side**2
    np.testing.assert_allclose((segmentation > 0).sum(axis=(1, 2)), area, rtol=0.06)


@pytest.mark.parametrize("split", ["single", "double"])
def test_dataset(split):
    data = captioned_shapes(12, seed=9, split=split)
    fast = ShapesData(12, seed=9, split=split)
    assert isinstance(data, datasets.Dataset) and len(data) == 12
    assert isinstance(data.features["label"], datasets.ClassLabel)
    assert data.features["label"].names[:7] == [
        "red circle", "green circle", "blue circle", "yellow circle", "magenta circle", "cyan circle", "red square",
    ]  # fmt: skip
    for index, row in enumerate(data):
        assert row["image"].mode == "RGB" and row["image"].size == (32, 32)
        assert row["segmentation"].mode == "L" and row["segmentation"].size == (32, 32)
        pixels = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)
        assert torch.equal(pixels, fast[index]["pixels"])
        assert (row["label"], row["caption"]) == (fast[index]["label"], fast[index]["caption"])
        shapes = [row["shape"]] if split == "single" else row["shape"]
        assert set(np.unique(row["segmentation"])) == {0, *(1 + shape for shape in shapes)}
        assert row["label"] == (row["shape"] * 6 + row["colour"] if split == "single" else -1)


def test_classes():
    assert ShapesData(1).num_classes == 24
    with pytest.raises(ValueError, match="no classes"):
        _ = ShapesData(1, split="double").num_classes


def test_bad_arguments():
    with pytest.raises(ValueError, match="'triple'.*'double', 'single'"):
        captioned_shapes(2, split="triple")
    with pytest.raises(ValueError, match="num_images is 0"):
        ShapesData(0)
    with pytest.raises(ValueError, match="resolution 4"):
        ShapesData(1, resolution=4)
    with pytest.raises(IndexError, match="index 2"):
        ShapesData(2)[(0, 2)]


def test_data_loader_workers():
    data = pickle.loads(pickle.dumps(ShapesData(8)))
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=[(1, k) for k in range(8)], num_workers=1)
    batches = list(loader)
    assert torch.equal(
        torch.cat([batch["pixels"] for batch in batches]), torch.stack([data[k]["pixels"] for k in range(8)])
    )
    assert batches[0]["label"].tolist() == [data[k]["label"] for k in range(4)]
