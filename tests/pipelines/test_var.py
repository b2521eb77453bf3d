"""What VARPipeline does beyond the contracts of every pipeline: guidance, editing, names and errors."""

import numpy as np
import PIL.Image
import pytest
import torch

from hfgen import MultiScaleVQVAE, VARPipeline, VARTransformer
from hfgen.counters import generator
from hfgen.sampling.guidance import guidance_schedule

PATCH_NUMS = (1, 2, 4)
NAMES = ["red", "green", "blue"]


def tokenizer(**changes):
    arguments = {
        "num_codes": 20,
        "latent_channels": 4,
        "base_channels": 4,
        "channel_multipliers": (1, 1),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "patch_nums": PATCH_NUMS,
    }
    torch.manual_seed(0)
    model = MultiScaleVQVAE(**(arguments | changes)).eval()
    torch.nn.init.normal_(model.quantizer.embedding.weight, generator=generator(1))
    return model


def transformer(**changes):
    arguments = {
        "num_codes": 20,
        "code_dim": 4,
        "num_classes": 3,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "patch_nums": PATCH_NUMS,
    }
    model = VARTransformer(**(arguments | changes)).eval()
    draws = generator(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=draws))
    return model


@pytest.fixture(scope="module")
def pipe():
    pipeline = VARPipeline(tokenizer(), transformer(), class_names=NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def recorded(pipe, **arguments):
    """The codes and the guided logits of every scale."""
    steps = []

    def keep(pipe, scale, side, tensors):
        steps.append((tensors["codes"], tensors["logits"]))
        return {}

    wanted = ["codes", "logits"]
    output = pipe(
        callback_on_step_end=keep, callback_on_step_end_tensor_inputs=wanted, output_type="latent", **arguments
    )
    codes, logits = zip(*steps)
    return torch.cat(codes, dim=1), torch.cat(logits, dim=1), output


@pytest.mark.parametrize("schedule", ["linear", "constant", [1.0, 1.0, 3.0]])
def test_sampling_equals_teacher_forcing(pipe, schedule):
    """The guided logits of every scale, cached and uncached, and the latents of the drawn codes."""
    labels = torch.tensor([2, 0])
    codes, logits, output = recorded(
        pipe, class_labels=labels, guidance_scale=3.0, guidance_schedule=schedule, top_k=0, top_p=1.0,
        generator=generator(4),
    )  # fmt: skip
    scales = guidance_schedule(schedule, 3.0, 3) if isinstance(schedule, str) else schedule
    weights = torch.tensor(scales).repeat_interleave(torch.tensor([1, 4, 16]))[:, None]
    with torch.no_grad():
        inputs = pipe.vq_model.quantizer.generator_inputs(codes)
        conditional = pipe.transformer(inputs, labels).logits
        unconditional = pipe.transformer(inputs, torch.full_like(labels, 3)).logits
        latents = pipe.vq_model.quantizer.decode(codes)
    torch.testing.assert_close(logits, weights * conditional - (weights - 1) * unconditional, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.images, latents, rtol=1e-5, atol=1e-5)
    assert output.nfe == 3


def test_the_unconditional_half_is_computed_only_for_guidance(pipe, monkeypatch):
    rows = []
    plain = pipe.transformer.forward_scale

    def count(latents, condition, cache, scale, num_logit_rows, guidance_scale):
        rows.append((len(cache.rows), num_logit_rows, guidance_scale))
        return plain(latents, condition, cache, scale, num_logit_rows, guidance_scale)

    monkeypatch.setattr(pipe.transformer, "forward_scale", count)
    for labels, scale, expected in (
        ([0, 1], 2.0, [(4, 2, 1.0), (4, 2, 1.5), (4, 2, 2.0)]),  # the ramp starts without guidance
        ([0, 1], 1.0, [(2, 2, 1.0)] * 3),
        (None, 2.0, [(1, 1, 1.0)] * 3),
    ):
        rows.clear()
        pipe(labels, guidance_scale=scale, output_type="latent")
        assert rows == expected


def test_classes_by_name_and_by_index(pipe):
    by_name = pipe(["blue", "red"], top_k=1, output_type="latent").images
    assert torch.equal(by_name, pipe([2, 0], top_k=1, output_type="latent").images)
    assert pipe.class_names == NAMES


def test_the_image_so_far(pipe):
    """Each callback's latents decode to an image; the last one is the result."""
    images = []

    def show(pipe, scale, side, tensors):
        images.append(pipe.decode_latents(tensors["f_hat"]))
        return {}

    final = pipe(1, output_type="pt", generator=generator(0), callback_on_step_end=show).images
    assert len(images) == 3
    torch.testing.assert_close(images[-1] / 2 + 0.5, final)
    assert not torch.equal(images[0], images[-1])


def test_smooth_sampling_mixes_codes(pipe):
    drawn = pipe(0, generator=generator(3), output_type="latent").images
    smooth = pipe(0, generator=generator(3), output_type="latent", smooth=True).images
    assert torch.isfinite(smooth).all() and not torch.equal(drawn, smooth)


def picture(seed=0, side=8):
    return torch.rand(1, 3, side, side, generator=generator(seed)) * 2 - 1


def test_a_mask_that_keeps_everything_reconstructs(pipe):
    image = picture()
    output = pipe(1, image=image, mask_image=torch.zeros(8, 8), output_type="latent").images
    with torch.no_grad():
        expected = pipe.vq_model.encode(image).latents
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_mask_that_paints_everything_keeps_the_first_scale_only(pipe):
    codes, _, edited = recorded(pipe, class_labels=1, image=picture(), mask_image=torch.ones(8, 8), top_k=1)
    true = pipe.vq_model.encode(picture()).codes
    mixed = torch.cat([true[:, :1], codes[:, 1:]], dim=1)
    torch.testing.assert_close(edited.images, pipe.vq_model.quantizer.decode(mixed), rtol=1e-5, atol=1e-5)


def test_in_painting_from_pictures(pipe):
    """White of a PIL mask is painted; the rest of the latents comes from the image at the finest scale."""
    image = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (8, 8, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    images = pipe([0, 1], image=image, mask_image=mask, generator=generator(0), output_type="pil").images
    assert [one.size for one in images] == [(8, 8)] * 2


BAD_CALLS = {
    "label too large": ({"class_labels": 4}, "Class label 4 is out of range.*0 to 2"),
    "label negative": ({"class_labels": [0, -1]}, "Class label -1"),
    "no labels": ({"class_labels": []}, "class_labels is empty"),
    "unknown name": ({"class_labels": "pink"}, "'pink'.*red, green, blue"),
    "too few generators": ({"class_labels": [0, 1], "generator": [generator(0)]}, "1 generators for 2 images"),
    "too many generators": ({"class_labels": 0, "generator": [generator(0)] * 2}, "2 generators for 1 images"),
    "negative guidance": ({"class_labels": 0, "guidance_scale": -1.0}, "guidance_scale.*-1"),
    "infinite guidance": ({"class_labels": 0, "guidance_scale": float("inf")}, "guidance_scale.*inf"),
    "guidance list": ({"class_labels": 0, "guidance_schedule": [1.0]}, "1 values.*3 steps"),
    "guidance name": ({"class_labels": 0, "guidance_schedule": "up"}, "'up'"),
    "top_p zero": ({"class_labels": 0, "top_p": 0.0}, "top_p must be in"),
    "top_p above one": ({"class_labels": 0, "top_p": 1.5}, "top_p must be in.*1.5"),
    "top_k negative": ({"class_labels": 0, "top_k": -3}, "top_k.*20 codes, got -3"),
    "temperature": ({"class_labels": 0, "temperature": 0.0}, "temperature.*top_k=1"),
    "output type": ({"class_labels": 0, "output_type": "jpeg"}, "output_type.*'jpeg'"),
    "no images": ({"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt.*0"),
    "callback tensor": ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["latent"]}, "latent.*f_hat"),
    "image without mask": ({"class_labels": 0, "image": picture()}, "both image and mask_image"),
    "image of another size": ({"image": picture(side=16), "mask_image": torch.ones(8, 8)}, r"16x16.*8x8.*resize"),
    "image range": ({"image": picture() * 9, "mask_image": torch.ones(8, 8)}, r"\[-1, 1\]"),
    "image channels": ({"image": picture()[:, :1], "mask_image": torch.ones(8, 8)}, r"\(1, 1, 8, 8\)"),
    "image batch": (
        {"class_labels": 0, "image": picture().expand(3, -1, -1, -1), "mask_image": torch.ones(8, 8)},
        "batch of 3.*1 images",
    ),
    "mask range": ({"image": picture(), "mask_image": torch.full((8, 8), 255.0)}, "mask_image must lie in"),
    "mask shape": ({"image": picture(), "mask_image": torch.ones(8)}, r"mask_image must be.*\(8,\)"),
}


@pytest.mark.parametrize("arguments, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


@pytest.mark.parametrize(
    ("tokenizer_changes", "transformer_changes", "message"),
    [
        ({"patch_nums": (1, 3, 4)}, {}, r"patch_nums: \(1, 3, 4\) and \(1, 2, 4\)"),
        ({}, {"num_codes": 21}, "codebook size: 20 and 21"),
        ({}, {"code_dim": 8}, "latent channels: 4 and 8"),
    ],
)
def test_components_that_do_not_fit(tokenizer_changes, transformer_changes, message):
    with pytest.raises(ValueError, match=message):
        VARPipeline(tokenizer(**tokenizer_changes), transformer(**transformer_changes))


def test_one_name_per_class():
    with pytest.raises(ValueError, match="2 class_names for 3 classes"):
        VARPipeline(tokenizer(), transformer(), class_names=["a", "b"])
