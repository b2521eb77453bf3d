"""Edited images keep the given pixels: the blend of MaskGIT's editor, its hard form, and what is never changed."""

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest
import torch

from hfgen import MaskedTokenScheduler, MaskGITPipeline
from hfgen.counters import generator
from hfgen.pipelines.editing import blend_edit
from support.grey_tokenizer import GreyTokenizer
from support.instances import build_model

SIDE = 64  # pixels, of 4 x 4 tokens


@pytest.fixture(scope="module")
def pipe():
    scheduler = MaskedTokenScheduler(num_inference_steps=3)
    made = MaskGITPipeline(GreyTokenizer(patch_size=SIDE // 4), build_model("MaskGITTransformer"), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def picture(seed=0):
    return torch.rand(1, 3, SIDE, SIDE, generator=generator(seed)) * 2 - 1


LEFT = torch.zeros(SIDE, SIDE)
LEFT[:, : SIDE // 2] = 1


def edit(pipe, labels=(0,), **arguments):
    """The edited pixels in [-1, 1], and what the tokenizer makes of the same codes."""
    arguments = {"image": picture(), "mask_image": LEFT, **arguments}
    images = [
        pipe(list(labels), generator=generator(0), output_type=kind, **arguments).images for kind in ("pt", "latent")
    ]
    return images[0] * 2 - 1, pipe.decode_latents(images[1])


@pytest.mark.parametrize("size", [256, 512])
def test_equals_the_published_editor(size):
    """Chang et al. composite on arrays (H, W, 3) in [0, 1] with the map of 16 pixel tokens that are painted."""
    latent_mask = np.zeros((size // 16, size // 16))
    latent_mask[3:9, 2:11] = 1
    draws = np.random.default_rng(0)
    given, outputs = draws.random((2, size, size, 3), dtype=np.float32)
    soft = PIL.Image.fromarray(np.uint8(latent_mask * 255.0)).resize((size, size))
    soft = soft.filter(PIL.ImageFilter.GaussianBlur(radius=size // 16 - 1))
    soft = np.float32(soft)[:, :, np.newaxis] / 255.0
    expected = outputs * soft + (1 - soft) * given

    as_tensors = [torch.from_numpy(array).permute(2, 0, 1)[None] for array in (outputs, given)]
    actual = blend_edit(*as_tensors, torch.from_numpy(latent_mask == 1)[None], size // 16 - 1)
    np.testing.assert_allclose(actual[0].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1e-6)


def test_the_default_is_the_published_radius(pipe):
    default, raw = edit(pipe)
    torch.testing.assert_close(default, edit(pipe, mask_blur=SIDE // 16 - 1)[0])
    assert not torch.allclose(default, edit(pipe, mask_blur=1.0)[0], atol=1e-2)
    painted = torch.tensor([[[1, 1, 0, 0]] * 4]).bool()
    torch.testing.assert_close(default, blend_edit(raw, picture(), painted, 3), rtol=0, atol=1e-5)


def test_far_from_the_edge_nothing_is_mixed(pipe):
    """Given pixels to the right, new ones to the left, and a mean of both in between."""
    edited, raw = edit(pipe)
    torch.testing.assert_close(edited[..., 48:], picture()[..., 48:], rtol=0, atol=1e-6)
    torch.testing.assert_close(edited[..., :16], raw[..., :16], rtol=0, atol=1e-6)
    low, high = torch.minimum(raw, picture()), torch.maximum(raw, picture())
    edge = edited[..., 28:36]
    assert (edge >= low[..., 28:36] - 1e-6).all() and (edge <= high[..., 28:36] + 1e-6).all()
    assert not torch.allclose(edge, raw[..., 28:36], atol=0.05)


def test_without_blur_the_edge_runs_between_tokens(pipe):
    edited, raw = edit(pipe, mask_blur=0, mask_margin=1)
    torch.testing.assert_close(edited[..., 48:], picture()[..., 48:], rtol=0, atol=1e-6)
    torch.testing.assert_close(edited[..., :48], raw[..., :48], rtol=0, atol=1e-6)


def test_each_image_of_a_batch_has_its_mask(pipe):
    masks = torch.stack([LEFT, 1 - LEFT])
    images = torch.cat([picture(1), picture(2)])
    edited, raw = edit(pipe, [0, 1], image=images, mask_image=masks, mask_blur=0)
    half = SIDE // 2
    torch.testing.assert_close(edited[0, :, :, half:], images[0, :, :, half:], rtol=0, atol=1e-6)
    torch.testing.assert_close(edited[1, :, :, :half], images[1, :, :, :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(edited[0, :, :, :half], raw[0, :, :, :half], rtol=0, atol=1e-6)


def test_a_picture_keeps_its_bytes(pipe):
    array = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mask = PIL.Image.fromarray(np.uint8(LEFT.numpy() * 255))
    (edited,) = pipe(0, image=PIL.Image.fromarray(array), mask_image=mask, generator=generator(0)).images
    assert np.array_equal(np.asarray(edited)[:, 48:], array[:, 48:])
    assert not np.array_equal(np.asarray(edited)[:, :16], array[:, :16])


@pytest.mark.parametrize("blur", [-1, float("nan"), float("inf")])
def test_bad_blur(pipe, blur):
    with pytest.raises(ValueError, match=f"mask_blur must be a finite number of at least 0 pixels .*got {blur}"):
        edit(pipe, mask_blur=blur)
