import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.images import make_comparison, make_grid, make_strip, save_npz, save_png


def solid(*levels, size=4):
    return torch.stack([torch.full((3, size, size), level, dtype=torch.uint8) for level in levels])


def test_grid_places_tiles_in_reading_order():
    grid = np.asarray(make_grid(solid(10, 20, 30), columns=2, padding=1, upscale=2))
    assert grid.shape == (19, 19, 3)
    assert [grid[5, 5, 0], grid[5, 14, 0], grid[14, 5, 0], grid[14, 14, 0]] == [10, 20, 30, 255]
    assert (grid[0] == 255).all() and (grid[9] == 255).all() and (grid[1:9, 1:9] == 10).all()
    assert make_grid(solid(*range(5)), padding=0).size == (12, 8)


def test_upscaling_repeats_pixels():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2)
    grid = np.asarray(make_grid(image, padding=0, upscale=3))
    np.testing.assert_array_equal(grid[::3, ::3], image[0].permute(1, 2, 0))
    np.testing.assert_array_equal(grid[2::3, 2::3], image[0].permute(1, 2, 0))


def test_labels_are_drawn_below_their_tile():
    plain = make_grid(solid(0, 0, size=40), columns=2)
    labelled = make_grid(list(solid(0, 0, size=40)), columns=2, labels=["", "a large red circle"])
    assert labelled.size[0] == plain.size[0] and labelled.size[1] >= plain.size[1] + 24
    text = np.asarray(labelled)[42:] < 128
    assert not text[:, :44].any() and text[:, 44:].any()
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        make_grid(solid(0, 0), labels=["x"])


def test_strip_and_comparison():
    assert make_strip(solid(1, 2, 3), padding=0).size == (12, 4)
    image = np.asarray(make_comparison(solid(1, 2, 3), solid(11, 12, 13), columns=2, padding=0))
    np.testing.assert_array_equal(image[::4, ::4, 0], [[1, 2], [11, 12], [3, 255], [13, 255]])


def test_float_pixels_follow_the_rounding_rule():
    pixels = torch.zeros(1, 3, 2, 2)
    assert np.asarray(make_grid(pixels, padding=0))[0, 0, 0] == 128
    assert np.asarray(make_grid(pixels, padding=0, rounding="truncate"))[0, 0, 0] == 127
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        make_grid(torch.zeros(3, 2, 2))
    with pytest.raises(ValueError, match="columns=0"):
        make_grid(pixels, columns=0)


def test_files_are_complete_or_absent(tmp_path, monkeypatch):
    path = save_png(make_grid(solid(7)), tmp_path / "new" / "a.png")
    assert Image.open(path).size == (8, 8)
    pixels = torch.linspace(-1, 1, 24).view(2, 3, 2, 2)
    path = save_npz(pixels, tmp_path / "samples.npz", rounding="truncate")
    array = np.load(path)["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (2, 2, 2, 3)
    assert array[1, 0, 1, 2] == int((pixels[1, 2, 0, 1].item() + 1) * 127.5)
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_png(make_grid(solid(7)), tmp_path / "a.jpg")

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save_npz(pixels, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir() if p.is_file()] == ["samples.npz"]
