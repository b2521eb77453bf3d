"""The diffusion pipeline: networks, schedulers of hfgen and diffusers, guidance, latents, and what it refuses."""

from unittest import mock

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)

import hfgen
from hfgen.counters import generator
from hfgen.models.generators.dit import DiT
from hfgen.pipelines.diffusion import ImageDiffusionPipeline
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler
from support.instances import build_model

DDIM = {"clip_sample": False}


def network(**changes):
    """A DiT that predicts noise and variance of 8 x 8 pixels of 5 classes."""
    return build_model("DiT", **{"has_duration": False, "out_channels": 6, **changes})


def unet(**changes):
    arguments = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "num_class_embeds": 6,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**{**arguments, **changes}).eval()


def autoencoder(channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=channels,
            scaling_factor=0.5,
        ).eval()


def pipeline(transformer=None, scheduler=None, **arguments):
    pipe = ImageDiffusionPipeline(transformer or network(), scheduler or RespacedDDPMScheduler(**DDIM), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, class_labels=(0, 3), seed=0, **arguments):
    arguments = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent", **arguments}
    labels = class_labels if class_labels is None else list(class_labels)
    return pipe(labels, generator=generator(seed), **arguments)


def calls(pipe, **arguments):
    """(batch size, timestep) of each pass of the network, and the output of the pipeline."""
    seen = []
    forward = pipe.transformer.forward

    def record(x, timestep, *rest, **named):
        assert timestep.shape == (len(x),)
        seen.append((len(x), timestep[0].item()))
        return forward(x, timestep, *rest, **named)

    with mock.patch.object(pipe.transformer, "forward", record):
        output = sample(pipe, **arguments)
    return seen, output


@pytest.mark.parametrize("make", [network, unet])
@pytest.mark.parametrize(
    ("scheduler", "nfe"),
    [
        (DDIMScheduler, 4),
        (DDPMScheduler, 4),
        (DPMSolverMultistepScheduler, 4),
        (EulerDiscreteScheduler, 4),
        (HeunDiscreteScheduler, 7),
    ],
)
def test_schedulers_of_diffusers(make, scheduler, nfe):
    """Swapped in as diffusers says; those without use for a learned variance do not get it."""
    variance = "learned_range" if make is network else "fixed_small"
    pipe = pipeline(make(), RespacedDDPMScheduler(reverse_variance=variance))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen, output = calls(pipe)
    assert output.images.shape == (2, 3, 8, 8) and output.images.isfinite().all()
    assert output.nfe == len(seen) == nfe
    assert {size for size, _ in seen} == {4}
    assert [timestep for _, timestep in seen] == sorted((timestep for _, timestep in seen), reverse=True)


def test_ddim_of_diffusers_agrees():
    ours = pipeline(scheduler=RespacedDDPMScheduler(algorithm="ddim", timestep_spacing="leading"))
    theirs = pipeline(ours.transformer, DDIMScheduler(**DDIM))
    torch.testing.assert_close(sample(theirs).images, sample(ours).images, rtol=1e-3, atol=1e-3)


def test_ddpm_of_diffusers_gets_the_learned_variance():
    ours = pipeline(scheduler=RespacedDDPMScheduler(timestep_spacing="leading"))
    theirs = pipeline(ours.transformer, DDPMScheduler(**DDIM, variance_type="learned_range"))
    fixed = pipeline(ours.transformer, DDPMScheduler(**DDIM))
    found, expected, other = (sample(pipe).images for pipe in (theirs, ours, fixed))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    assert not torch.allclose(other, expected, atol=0.1)


def test_steps_default_to_the_configuration():
    pipe = pipeline(scheduler=RespacedDDPMScheduler(respacing="3,0", **DDIM))
    seen, output = calls(pipe, num_inference_steps=None)
    assert [timestep for _, timestep in seen] == [499, 250, 0] and output.nfe == 3
    pipe.scheduler = DDIMScheduler(**DDIM)
    assert sample(pipe, num_inference_steps=None).nfe == 50


def test_guidance_doubles_the_batch_only_while_it_is_on():
    pipe = pipeline()
    assert [size for size, _ in calls(pipe)[0]] == [4] * 4
    assert [size for size, _ in calls(pipe, guidance_scale=1.0)[0]] == [2] * 4
    assert [size for size, _ in calls(pipe, guidance_interval=(0.3, 0.7))[0]] == [2, 4, 4, 2]
    assert [size for size, _ in calls(pipe, class_labels=None)[0]] == [1] * 4


def test_guidance_acts_on_the_first_channels():
    outputs = {}

    def first_output(channels, scale):
        def callback(pipe, step, timestep, tensors):
            outputs.setdefault((channels, scale), tensors["model_output"])
            return {}

        pipe = pipeline(guidance_channels=channels)
        names = ["model_output"]
        sample(pipe, guidance_scale=scale, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        return outputs[channels, scale]

    conditional, unconditional = first_output(None, 1.0), first_output(None, 0.0)
    expected = conditional.clone()
    expected[:, :3] += 2 * (conditional - unconditional)[:, :3]
    torch.testing.assert_close(first_output(None, 3.0), expected)
    expected[:, 2:] = conditional[:, 2:]
    torch.testing.assert_close(first_output(2, 3.0), expected)
    assert not torch.allclose(conditional[:, :3], unconditional[:, :3], atol=1e-3)


def test_the_last_class_embedding_of_a_unet_stands_for_no_class():
    pipe = pipeline(unet(), DDIMScheduler(**DDIM))
    unconditional = sample(pipe, class_labels=None)
    assert torch.equal(unconditional.images, sample(pipe, class_labels=[5], guidance_scale=1.0).images)
    assert not torch.allclose(unconditional.images, sample(pipe, class_labels=[4]).images, atol=1e-3)
    with pytest.raises(ValueError, match="6 is out of range.*0 to 4"):
        sample(pipe, class_labels=[6])


def test_a_unet_without_classes():
    pipe = pipeline(unet(num_class_embeds=None), DDIMScheduler(**DDIM))
    seen, output = calls(pipe, class_labels=None, num_images_per_prompt=3)
    assert output.images.shape[0] == 3 and [size for size, _ in seen] == [3] * 4
    with pytest.raises(ValueError, match="The network has no classes"):
        sample(pipe, class_labels=[0])


def test_latents_are_decoded(tmp_path):
    transformer, vae = network(in_channels=4, out_channels=8), autoencoder(4)
    pipe = pipeline(transformer, vae=vae, class_names=["a", "b", "c", "d", "e"], guidance_channels=3)
    latents = sample(pipe, ["a", "d"]).images
    images = sample(pipe, ["a", "d"], output_type="pt").images
    assert latents.shape == (2, 4, 8, 8) and images.shape == (2, 3, 16, 16)
    with torch.no_grad():
        expected = vae.decode(latents / 0.5).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1))
    pipe.save_pretrained(tmp_path)
    loaded = hfgen.AutoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.vae) is AutoencoderKL
    assert torch.equal(sample(loaded, ["a", "d"], output_type="pt").images, images)
    without = pipeline(transformer, guidance_channels=3)
    assert torch.equal(sample(without).images, latents)
    with pytest.raises(ValueError, match="no vae to decode"):
        sample(without, output_type="pil")


def test_parts_of_diffusers_are_saved_and_loaded(tmp_path):
    pipe = pipeline(unet(), DDIMScheduler(**DDIM))
    pipe.save_pretrained(tmp_path)
    loaded = ImageDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is UNet2DModel and type(loaded.scheduler) is DDIMScheduler
    assert torch.equal(sample(loaded).images, sample(pipe).images)


def test_other_sizes_and_given_noise():
    for transformer in (network(), unet(out_channels=6)):
        pipe = pipeline(transformer)
        assert sample(pipe, height=12, width=16).images.shape == (2, 3, 12, 16)
        noise = torch.randn(2, 3, 8, 8, generator=generator(5))
        pipe.scheduler = DDIMScheduler(**DDIM)
        assert torch.equal(sample(pipe, latents=noise).images, sample(pipe, seed=1, latents=noise).images)
        with pytest.raises(ValueError, match=r"latents have shape \(2, 3, 8, 8\), expected \(2, 3, 8, 12\)"):
            sample(pipe, latents=noise, width=12)
        for side in (7, 0):
            with pytest.raises(ValueError, match=f"height must be a multiple of 2 pixels.*got {side}"):
                sample(pipe, height=side)
    with pytest.raises(ValueError, match="give height"):
        sample(pipeline(unet(sample_size=None), DDIMScheduler(**DDIM)))


def test_ddim_noise():
    pipe = pipeline(scheduler=DDIMScheduler(**DDIM))
    still, noisy = (sample(pipe, eta=eta).images for eta in (0.0, 1.0))
    assert torch.equal(still, sample(pipe).images) and not torch.allclose(still, noisy, atol=1e-2)
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="eta is 0.5, but a DPMSolverMultistepScheduler has no such setting"):
        sample(pipe, eta=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "between 1 and the 1000 timesteps of training, got 0"),
        ({"num_inference_steps": 1001}, "between 1 and the 1000 timesteps of training, got 1001"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_interval": (0.7, 0.3)}, "guidance interval must satisfy"),
        ({"class_labels": ["red"]}, "Unknown class name 'red'"),
        ({"class_labels": [6]}, "Class label 6 is out of range"),
        ({"output_type": "gif"}, "got 'gif'"),
    ],
)
def test_wrong_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline(), **arguments)


def test_a_scheduler_must_fit_the_network():
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts 'epsilon'.*DDIMScheduler expects 'v_prediction'"):
        sample(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has prediction_type None.*RectifiedFlow"):
        sample(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler(variance_type="learned_range")
    with pytest.raises(ValueError, match="first three channels.*variance_type=None"):
        sample(pipe)
    with pytest.raises(ValueError, match="the network predicts no variance; use 'fixed_small'"):
        pipeline(network(out_channels=3))
    with pytest.raises(ValueError, match="expects 'epsilon'.*prediction_type='sample'"):
        pipeline(prediction_type="sample")
    sample(pipeline(scheduler=RespacedDDPMScheduler(prediction_type="sample"), prediction_type="sample"))


def test_networks_that_do_not_fit():
    with pytest.raises(ValueError, match="3 input and 5 output channels.*has 3, or 6"):
        pipeline(network(out_channels=5))
    for changes in ({"has_duration": True}, {"reverse_time": True, "timestep_scale": 1e-3}):
        with pytest.raises(ValueError, match="no diffusion network.*RectifiedFlowPipeline"):
            pipeline(network(**changes))
    with pytest.raises(ValueError, match="is a Linear, expected a DiT or a UNet2DModel"):
        pipeline(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="4 channels, but the transformer has 3"):
        pipeline(vae=autoencoder(4))
    for channels in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the 3 channels, got {channels}"):
            pipeline(guidance_channels=channels)
    with pytest.raises(ValueError, match="Got 2 class_names for 5 classes"):
        pipeline(class_names=["a", "b"])


@pytest.mark.parametrize("make", [network, unet])
def test_a_compiled_network_is_read_like_the_network(make):
    pipe = pipeline(make(), DDIMScheduler(**DDIM))
    expected = (pipe.latent_shape(), pipe.prepare_labels(None, 1, "cpu").tolist())
    pipe.transformer = torch.compile(pipe.transformer)
    assert (pipe.latent_shape(), pipe.prepare_labels(None, 1, "cpu").tolist()) == expected


def test_default_scheduler():
    for channels, variance in ((6, "learned_range"), (3, "fixed_small")):
        pipe = ImageDiffusionPipeline(network(out_channels=channels), prediction_type="v_prediction")
        assert pipe.scheduler.config.reverse_variance == variance and len(pipe.scheduler.timesteps) == 250
        assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert ImageDiffusionPipeline(network()).config.prediction_type == "epsilon"


def test_published_preset():
    """DiT-XL/2 as released fits the pipeline, on no memory."""
    with torch.device("meta"):
        transformer = DiT.from_preset("DiT-XL/2-256")
    pipe = ImageDiffusionPipeline(transformer, guidance_channels=3)
    assert torch.equal(pipe.scheduler.timesteps, RespacedDDPMScheduler.from_preset("dit").timesteps)
    assert pipe.latent_shape() == (4, 32, 32)
