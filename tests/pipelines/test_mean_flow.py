"""What MeanFlowPipeline does beyond the contracts of every pipeline: steps, guidance, sizes, autoencoders, errors."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from hfgen import DiT, MeanFlowPipeline
from hfgen.pipelines.latents import decode_latents, encode_pixels
from support.instances import build_model

NAMES = ["red", "green", "blue", "cyan", "pink"]


def autoencoder(**changes):
    sizes = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [4, 8],
        "norm_num_groups": 2,
        "latent_channels": 4,
        "scaling_factor": 0.5,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(**{**sizes, **changes}).eval()


def pipeline(vae=None, **changes):
    made = MeanFlowPipeline(build_model("DiT", **changes), vae, class_names=NAMES)
    made.set_progress_bar_config(disable=True)
    return made


def recorded(pipe, **arguments):
    """The output for a red image, and batch size, times, labels and durations of every call of the network."""
    calls = []

    def record(_, inputs):
        latents, *others = inputs
        calls.append((len(latents), *(values.tolist() for values in others)))

    hook = pipe.transformer.register_forward_pre_hook(record)
    output = pipe("red", generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)
    hook.remove()
    return output, calls


def test_one_pass_by_default():
    output, calls = recorded(pipeline())
    assert calls == [(1, [1.0], [0], [1.0])] and output.nfe == 1


def test_equal_steps():
    output, calls = recorded(pipeline(), num_inference_steps=4)
    assert [call[1] for call in calls] == [[1.0], [0.75], [0.5], [0.25]]
    assert all(call[3] == [0.25] for call in calls) and output.nfe == 4


def test_given_steps():
    output, calls = recorded(pipeline(), sigmas=[1.0, 0.25])
    assert [(call[1], call[3]) for call in calls] == [([1.0], [0.75]), ([0.25], [0.25])] and output.nfe == 2


def test_every_step_moves_along_the_average_velocity():
    pipe, noise = pipeline(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = noise
    with torch.no_grad():
        for t, r in ((1.0, 0.5), (0.5, 0.0)):
            u = pipe.transformer(latents, torch.tensor([t]), torch.tensor([1]), torch.tensor([t - r])).sample
            latents = latents - (t - r) * u
    actual = pipe("green", num_inference_steps=2, latents=noise, output_type="latent").images
    torch.testing.assert_close(actual, latents)


def test_guidance_is_one_batch_and_only_while_it_is_on():
    off, calls = recorded(pipeline())
    assert calls[0][0] == 1
    on, calls = recorded(pipeline(), guidance_scale=3.0)
    assert calls == [(2, [1.0, 1.0], [0, 5], [1.0, 1.0])] and on.nfe == 1
    without = pipeline()(generator=torch.Generator().manual_seed(0), output_type="latent").images
    torch.testing.assert_close(on.images, without + 3 * (off.images - without), rtol=1e-4, atol=1e-4)
    alone = pipeline()(generator=torch.Generator().manual_seed(0), guidance_scale=3.0, output_type="latent").images
    assert torch.equal(alone, without)


def test_other_sizes():
    images = pipeline()(0, height=16, width=4, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (1, 3, 16, 4)


def test_latents_of_an_autoencoder():
    vae = autoencoder()
    pipe = pipeline(vae, in_channels=4)
    draws = torch.Generator()
    latents = pipe(0, generator=draws.manual_seed(0), output_type="latent").images
    assert latents.shape == (1, 4, 8, 8)
    images = pipe(0, generator=draws.manual_seed(0), output_type="pt").images
    assert images.shape == (1, 3, 16, 16)
    with torch.no_grad():
        expected = vae.decode(latents / 0.5).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(images, expected)
    assert pipe(0, height=24, width=8, output_type="pt").images.shape == (1, 3, 24, 8)


def test_saved_with_an_autoencoder(tmp_path):
    pipe = pipeline(autoencoder(), in_channels=4)
    pipe.save_pretrained(tmp_path)
    loaded = MeanFlowPipeline.from_pretrained(tmp_path)
    assert type(loaded.vae) is AutoencoderKL and type(loaded.transformer) is DiT
    assert MeanFlowPipeline.from_pipe(loaded).vae is loaded.vae


@torch.no_grad()
def test_pixels_and_latents_on_the_scale_of_a_generator():
    vae = autoencoder(shift_factor=0.25)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = vae.encode(pixels).latent_dist.mode()
    latents = encode_pixels(vae, pixels)
    torch.testing.assert_close(latents, (mean - 0.25) * 0.5)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(mean).sample.clamp(-1, 1))
    assert torch.equal(encode_pixels(None, pixels), pixels)
    assert torch.equal(decode_latents(None, 3 * pixels), (3 * pixels).clamp(-1, 1))


def test_components_that_do_not_fit():
    with pytest.raises(ValueError, match="predicts no average velocity: MeanFlow needs a DiT with has_duration"):
        pipeline(has_duration=False)
    with pytest.raises(ValueError, match="This NCSNpp predicts no average velocity"):
        MeanFlowPipeline(build_model("NCSNpp"))
    with pytest.raises(ValueError, match="latents of the vae have 4 channels, but the transformer has 3"):
        pipeline(autoencoder())
    with pytest.raises(ValueError, match="vae is a Linear, which has no encode and decode"):
        pipeline(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Got 2 class_names for 5 classes"):
        MeanFlowPipeline(build_model("DiT"), class_names=["red", "green"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "violet"}, "Unknown class name 'violet'; known are: red"),
        ({"class_labels": 6}, "Class label 6 is out of range"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"sigmas": [0.5, 1.0]}, r"fall from at most 1 .* Got \[0.5, 1.0\]"),
        ({"sigmas": [1.0, 0.0]}, r"stay above 0.* Got \[1.0, 0.0\]"),
        ({"sigmas": []}, r"Got \[\]"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number of at least 0"),
        ({"height": 7}, "height must be a multiple of 2 pixels"),
        ({"width": 0}, "width must be a multiple of 2 pixels"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, r"latents have shape \(1, 3, 4, 4\), expected \(1, 3, 8, 8\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"class_labels": 0, **arguments})


def test_latents_without_an_autoencoder_are_no_images():
    pipe = pipeline(in_channels=4)
    with pytest.raises(ValueError, match="makes latents of 4 channels and the pipeline has no vae .*register_modules"):
        pipe(0)
    assert pipe(0, output_type="latent").images.shape == (1, 4, 8, 8)
