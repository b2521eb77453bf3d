import numpy as np
import pytest
import torch
from PIL import Image

from hfgen.data.transforms import (
    adm_center_crop,
    center_crop,
    horizontal_flip,
    random_crop,
    resize_shorter_side,
    to_pixels,
    to_tensor,
    to_uint8,
)


def picture(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_shorter_side():
    assert resize_shorter_side(picture(60, 40), 18).size == (27, 18)
    assert resize_shorter_side(picture(31, 100), 18).size == (18, 58)


def test_crops_are_the_named_pixels():
    image = picture(20, 15)
    array = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 9)), array[3:12, 6:15])  # 5.5 is rounded to even
    np.testing.assert_array_equal(np.asarray(random_crop(image, 9, (0.0, 0.999))), array[6:15, :9])
    np.testing.assert_array_equal(np.asarray(random_crop(image, 9, (0.999, 0.0))), array[:9, 11:])
    np.testing.assert_array_equal(np.asarray(horizontal_flip(image)), array[:, ::-1])
    with pytest.raises(ValueError, match="20 x 15 has no crop of 16 x 16"):
        center_crop(image, 16)


def test_adm_crop():
    image = picture(37, 16)
    expected = np.asarray(image)[:, 10:26]
    np.testing.assert_array_equal(np.asarray(adm_center_crop(image, 16)), expected)
    halved = picture(64, 64)
    means = np.asarray(halved, dtype=float).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(np.asarray(adm_center_crop(halved, 16)), means, atol=2)  # four roundings


def test_tensor_layout():
    image = picture(5, 4)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 4, 5) and tensor[1, 2, 3] == image.getpixel((3, 2))[1]


def test_rounding_rules():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_pixels(every)), every)
    assert to_pixels(every)[[0, -1]].tolist() == [-1, 1]
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.9, 0.999, 1.0, 3.0])
    assert to_uint8(pixels).tolist() == [0, 0, 128, 242, 255, 255, 255]
    assert to_uint8(pixels, "truncate").tolist() == [0, 0, 127, 242, 254, 255, 255]
    assert to_uint8(pixels, "adm").tolist() == [0, 0, 128, 242, 255, 255, 255]
    assert to_uint8(torch.tensor([0.005]), "adm").item() == 128 and to_uint8(torch.tensor([0.006])).item() == 128
    with pytest.raises(ValueError, match="rounding 'up'"):
        to_uint8(pixels, "up")
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        to_uint8(every)
    with pytest.raises(ValueError, match=r"torch\.float32"):
        to_pixels(pixels)
