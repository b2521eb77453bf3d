import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hfgen.data.shapes import draw_scenes, render
from hfgen.data.transforms import to_pixels
from hfgen.evaluation.judge import diversity, judge_labels, judge_shapes

ATTRIBUTES = ("shape", "colour", "size", "cell")


def true_images(count, seed=1234, resolution=32):
    scenes = draw_scenes(range(count), seed=seed)
    images, _ = render(scenes, resolution)
    return scenes, torch.from_numpy(images).permute(0, 3, 1, 2)


def accuracy(pixels, scenes):
    reading = judge_shapes(pixels)
    truth = {name: torch.from_numpy(getattr(scenes, name)[:, 0]) for name in ATTRIBUTES}
    rates = {name: (getattr(reading, name) == value).float().mean().item() for name, value in truth.items()}
    rates["label"] = (reading.label == torch.from_numpy(scenes.labels())).float().mean().item()
    return rates


def blur(pixels, sigma):
    kernel = torch.exp(-0.5 * (torch.arange(-2.0, 3) / sigma) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(pixels, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(padded, kernel.expand(3, 1, 5, 5), groups=3)


@pytest.mark.parametrize("resolution", [32, 64])
def test_true_images(resolution):
    scenes, images = true_images(2000, resolution=resolution)
    for pixels in (images, to_pixels(images)):
        assert min(accuracy(pixels, scenes).values()) > 0.99


@pytest.mark.parametrize(("noise", "sigma"), [(0.05, None), (0.0, 0.6), (0.05, 0.6)])
def test_noisy_and_blurry_images(noise, sigma):
    scenes, images = true_images(1000)
    pixels = to_pixels(images)
    pixels = blur(pixels, sigma) if sigma else pixels
    pixels = pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    assert min(accuracy(pixels, scenes).values()) > 0.95


def test_noise_and_blank_images_are_no_objects():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 3, 32, 32, generator=generator)
    smooth = F.interpolate(torch.randn(500, 3, 4, 4, generator=generator), (32, 32), mode="bicubic")
    for pixels in (noise, 0.1 * noise, noise.uniform_(-1, 1, generator=generator), smooth, torch.zeros_like(noise)):
        reading = judge_shapes(pixels)
        assert reading.found.float().mean() < 0.01
        assert (reading.label[~reading.found] == -1).all() and (reading.cell[~reading.found] == -1).all()


def test_a_wrong_attribute_is_noticed():
    scenes, images = true_images(200)
    swapped = images[:, [1, 2, 0]]  # red becomes blue, ...
    rates = accuracy(swapped, scenes)
    assert rates["colour"] == 0 and rates["shape"] == 1
    assert accuracy(images.flip(-1), scenes)["cell"] < 0.5


def test_labels():
    scenes, images = true_images(300)
    labels = torch.from_numpy(scenes.labels())
    assert judge_labels(images, labels) == {"label": 1, "shape": 1, "colour": 1, "found": 1}
    other_colour = labels // 6 * 6 + (labels + 1) % 6
    assert judge_labels(images, other_colour) == {"label": 0, "shape": 1, "colour": 0, "found": 1}
    with pytest.raises(ValueError, match=r"expected \(300,\)"):
        judge_labels(images, labels[:5])
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        judge_shapes(images[0])


def test_diversity():
    scenes, images = true_images(2000)
    spread = diversity(judge_shapes(images))
    assert spread["cell_entropy"] > 0.99 and spread["size_entropy"] > 0.99 and spread["label_entropy"] > 0.98
    assert spread["cells"]["top left"] == pytest.approx((scenes.cell == 0).mean(), abs=0.01)
    one = torch.from_numpy((scenes.cell[:, 0] == 4) & (scenes.size[:, 0] == 1))
    collapsed = diversity(judge_shapes(images[one]))
    assert collapsed["cells"]["centre"] == 1 and collapsed["cell_entropy"] == 0 and collapsed["sizes"]["large"] == 1
    assert diversity(judge_shapes(torch.zeros(3, 3, 32, 32)))["cell_entropy"] == 0


@pytest.mark.parametrize("radius", [0.095, 0.12, 0.128, 0.14, 0.16])
def test_the_shape_of_an_object_between_the_sizes_is_read(radius):
    """A generator also draws objects of sizes that the data does not have."""
    scenes = draw_scenes(range(500), seed=7)
    images, _ = render(dataclasses.replace(scenes, radius=np.full_like(scenes.radius, radius)), 32)
    reading = judge_shapes(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert (reading.shape == torch.from_numpy(scenes.shape[:, 0])).float().mean() > 0.99
    assert (reading.size == int(radius > 0.128)).float().mean() > 0.99 or radius == 0.128
