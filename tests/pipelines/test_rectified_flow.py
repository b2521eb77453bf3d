"""The flow pipeline with classes or without a condition: steps, guidance, editing, inversion, errors."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UNet2DModel,
)

from hfgen import DiT, InterpolantSDEScheduler, RectifiedFlowPipeline
from hfgen.pipelines.flow_networks import LabelFlowNetwork
from support.instances import build_model


def dit(**changes):
    return build_model("DiT", **{"has_duration": False, **changes})


def pipeline(transformer=None, scheduler=None, **parts):
    pipe = RectifiedFlowPipeline(dit() if transformer is None else transformer, scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(side=8, batch=1):
    return noise(batch, 3, side, side, seed=2).clamp(-1, 1)


class Linear(DiT):
    """A network whose velocity is ``rate x`` for class 0 and ``-rate x`` without a class."""

    rate = 1.0

    def forward(self, hidden_states, timestep, class_labels, duration=None, return_dict=True):
        sign = torch.where(class_labels == self.unconditional_label, -1.0, 1.0).view(-1, 1, 1, 1)
        return (self.rate * sign * hidden_states,)


def linear():
    return Linear(sample_size=4, in_channels=3, num_classes=1, num_layers=0, width=4, num_heads=1)


@pytest.mark.parametrize(
    ("scheduler", "order"), [(FlowMatchEulerDiscreteScheduler, 1), (FlowMatchHeunDiscreteScheduler, 2)]
)
def test_convergence_order(scheduler, order):
    """dx / dsigma = x from 1 to 0 gives x / e; the error falls by 2^order with twice the steps."""
    start = torch.ones(1, 3, 4, 4)
    errors = []
    for steps in (8, 16):
        pipe = pipeline(linear(), FlowMatchEulerDiscreteScheduler())
        pipe.scheduler = scheduler()
        # Even steps: the schedulers' own leave a gap of another size at the end.
        pipe.scheduler.sigma_min = 1 / steps
        end = pipe(
            class_labels=0, latents=start, num_inference_steps=steps, guidance_scale=1.0, output_type="latent"
        ).images
        errors.append((end - start / torch.e).abs().max().item())
    # Heun's last step is Euler's, which adds an error of its own order: the step squared.
    assert 0.8 * 2**order < errors[0] / errors[1] < 1.25 * 2**order


def test_nfe_counts_passes():
    pipe, calls = pipeline(linear()), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    for scheduler, passes in ((FlowMatchEulerDiscreteScheduler(), 5), (FlowMatchHeunDiscreteScheduler(), 9)):
        pipe.scheduler, calls[:] = scheduler, []
        output = pipe(class_labels=0, num_inference_steps=5, output_type="latent")
        assert output.nfe == len(calls) == passes


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        InterpolantSDEScheduler(diffusion_norm=1e-6, last_step_size=0.01),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers(scheduler):
    """They solve dx / dsigma = x from 1 to 0, too."""
    start = noise(1, 3, 4, 4)
    arguments = {"class_labels": 0, "latents": start, "num_inference_steps": 60, "output_type": "latent"}
    pipe = pipeline(linear(), scheduler)
    end = pipe(**arguments, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(end, start / torch.e, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_are_of_equal_length(steps):
    pipe = pipeline()
    pipe(class_labels=0, num_inference_steps=steps, output_type="latent")
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.linspace(1, 0, steps + 1))


def test_times_are_those_of_the_scheduler():
    pipe, seen = pipeline(linear(), FlowMatchEulerDiscreteScheduler(shift=3.0)), []
    pipe.transformer.register_forward_pre_hook(
        lambda _, arguments, keywords: seen.append(keywords["timestep"]), with_kwargs=True
    )
    pipe(class_labels=0, num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    assert torch.equal(torch.cat(seen), pipe.scheduler.timesteps) and seen[0].dtype == torch.float32
    seen.clear()
    pipe(class_labels=0, sigmas=[1.0, 0.5], guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(torch.cat(seen), torch.tensor([1000.0, 750.0]))  # shifted by 3


def test_guidance():
    """One step of x - (x w - (-x)(w - 1)) = x - (2 w - 1) x."""
    pipe, start = pipeline(linear()), torch.ones(1, 3, 4, 4)
    for scale in (0.0, 1.0, 3.0):
        end = pipe(class_labels=0, latents=start, sigmas=[1.0], guidance_scale=scale, output_type="latent").images
        torch.testing.assert_close(end, start - (2 * scale - 1) * start)


def test_guidance_of_the_first_channels():
    """The others follow the condition alone, in samples and on the way back."""
    start, image = torch.ones(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.5)
    ends, noises = [], []
    for channels in (None, 2):
        pipe = pipeline(linear(), guidance_channels=channels)
        arguments = {"class_labels": 0, "guidance_scale": 3.0}
        ends.append(pipe(**arguments, latents=start, sigmas=[1.0], output_type="latent").images)
        noises.append(pipe.invert(image, **arguments, num_inference_steps=1, method="euler").images)
    for (everywhere, first), rate in ((ends, -1.0), (noises, 1.0)):  # a step of Euler is x + rate x without guidance
        begin = start if rate < 0 else image
        assert torch.equal(first[:, :2], everywhere[:, :2])
        torch.testing.assert_close(first[:, 2:], begin[:, 2:] * (1 + rate))
        assert not torch.allclose(everywhere[:, 2:], first[:, 2:])
    for channels in (0, 4):
        with pytest.raises(ValueError, match=f"guidance_channels must be between 1 and the 3.*got {channels}"):
            pipeline(guidance_channels=channels)


def test_guidance_is_computed_only_while_it_is_on():
    pipe, rows = pipeline(linear()), []
    pipe.transformer.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    arguments = {"class_labels": [0, 0], "sigmas": [1.0, 0.75, 0.5, 0.25], "output_type": "latent"}
    pipe(**arguments, guidance_interval=(0.4, 0.8), guidance_scale=2.0)
    assert rows == [2, 4, 4, 2]
    rows.clear()
    pipe(**arguments, guidance_scale=1.0)
    assert rows == [2, 2, 2, 2]
    rows.clear()
    pipe(**arguments, guidance_schedule=[1.0, 1.0, 2.0, 1.0])
    assert rows == [2, 2, 4, 2]


def test_unconditional_network():
    pipe = pipeline(build_model("NCSNpp"))
    images = pipe(num_images_per_prompt=2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and not torch.equal(images[0], images[1])
    with pytest.raises(ValueError, match="no condition to guide: use guidance_scale=1"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="NCSNpp takes no condition"):
        pipe(class_labels=0)
    with pytest.raises(ValueError, match="height must be a multiple of 2 pixels"):
        pipe(height=9)


def test_image_to_image():
    """A share of the steps; the less noise, the closer the result is to the image."""
    pipe, image = pipeline(), picture()
    arguments = {"class_labels": 1, "image": image, "num_inference_steps": 10, "output_type": "pt"}
    distances = []
    for strength, passes in ((0.1, 1), (0.5, 5), (1.0, 10)):
        output = pipe(**arguments, strength=strength, generator=torch.Generator().manual_seed(0))
        assert output.nfe == passes
        distances.append((output.images * 2 - 1 - image).abs().mean().item())
    assert distances == sorted(distances)
    from_noise = pipe(class_labels=1, num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    whole = pipe(**{**arguments, "output_type": "pil"}, generator=torch.Generator().manual_seed(0))
    assert whole.images[0].tobytes() == from_noise.images[0].tobytes()


def test_image_to_image_with_heun_starts_at_the_right_time():
    pipe, image, times = pipeline(linear(), FlowMatchHeunDiscreteScheduler()), torch.zeros(1, 3, 4, 4), []
    pipe.transformer.register_forward_pre_hook(
        lambda _, arguments, keywords: times.append(keywords["timestep"].item()), with_kwargs=True
    )
    output = pipe(
        class_labels=0, image=image, num_inference_steps=4, strength=0.5, guidance_scale=1.0, output_type="latent"
    )
    steps = pipe.scheduler.sigmas.unique().flip(0)[2:-1] * 1000  # the last two of four, each but the last twice
    assert output.nfe == 3
    torch.testing.assert_close(torch.tensor(times), torch.stack([steps[0], steps[1], steps[1]]))


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), FlowMatchHeunDiscreteScheduler()])
def test_inpainting_keeps_the_rest(scheduler):
    pipe, image = pipeline(scheduler=scheduler), picture()
    mask = torch.zeros(8, 8)
    mask[2:5, 3:7] = 1
    seen = []
    images = pipe(
        class_labels=[1, 2],
        image=image,
        mask_image=mask,
        num_inference_steps=6,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, timestep, tensors: seen.append(tensors["latents"]) or {},
    ).images
    kept = mask.bool().logical_not().expand(3, 8, 8)
    assert torch.equal(images[0][kept], image[0][kept]) and torch.equal(images[1][kept], image[0][kept])
    assert (images[0] - image[0])[~kept].abs().min() > 0
    # Before the end the rest is the image with the noise of that time.
    start = pipe.scheduler.sigmas[1]
    residual = (seen[0][0] - (1 - start) * image[0])[kept] / start
    assert 0.7 < residual.std() < 1.3


def test_latents_of_an_autoencoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = AutoencoderKL(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks, shift_factor=0.1
        )
    pipe = pipeline(dit(in_channels=4), vae=vae.eval())
    image, mask = picture(16), torch.zeros(16, 16)
    mask[5, 5] = 1  # of one pixel: its latent is painted, which is 2x2 pixels
    images = pipe(class_labels=1, image=image, mask_image=mask, num_inference_steps=3, output_type="latent").images
    known = (vae.encode(image).latent_dist.mode() - 0.1) * vae.config.scaling_factor
    changed = ((images - known).abs().amax(dim=1)[0] > 1e-6).nonzero().tolist()
    assert changed == [[2, 2]]
    torch.testing.assert_close(
        pipe.decode_latents(known), vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
    )
    assert pipe(class_labels=1, num_inference_steps=1, height=8, width=24, output_type="pt").images.shape[2:] == (
        8,
        24,
    )
    with pytest.raises(ValueError, match=r"height must be a multiple of 4 pixels \(a vae factor of 2 times 2"):
        pipe(class_labels=1, height=18)


def test_sequence_latents_are_refused():
    tokenizer = build_model("TiTok", bottleneck="kl")
    with pytest.raises(ValueError, match="no grid of latents"):
        pipeline(dit(in_channels=6), vae=tokenizer)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_inversion_and_back(guidance_scale):
    """The error of the round trip falls with the number of steps."""
    pipe = pipeline(dit(timestep_scale=1e-3), FlowMatchHeunDiscreteScheduler())
    image, errors = picture(batch=2), []
    for steps in (10, 40):
        arguments = {"num_inference_steps": steps, "class_labels": [1, 3], "guidance_scale": guidance_scale}
        inverted = pipe.invert(image, **arguments)
        assert inverted.images.shape == image.shape and inverted.nfe == 2 * steps
        again = pipe(**arguments, latents=inverted.images, output_type="latent").images
        errors.append((again - image).abs().max().item())
    assert errors[1] < 0.02 and errors[1] < errors[0] / 3


def test_inversion_of_one_image_for_many_conditions():
    pipe = pipeline()
    latents = pipe.invert(picture(), class_labels=[0, 1, 2], num_inference_steps=2, method="euler").images
    assert len(latents) == 3 and not torch.allclose(latents[0], latents[1])
    with pytest.raises(ValueError, match="Unknown ODE method 'rk45'"):
        pipe.invert(picture(), class_labels=0, method="rk45")
    with pytest.raises(ValueError, match="2 conditions for 3 images"):
        pipe.invert(picture(batch=3), class_labels=[0, 1])


def test_denoised_of_a_callback_is_the_image_in_the_last_step():
    seen = []
    images = pipeline()(
        class_labels=0,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, timestep, tensors: seen.append(tensors["denoised"]) or {},
        callback_on_step_end_tensor_inputs=["denoised"],
    ).images
    torch.testing.assert_close(seen[-1], images, rtol=0, atol=1e-5)
    assert not torch.allclose(seen[0], images, atol=1e-2)


def test_names_of_classes():
    pipe = pipeline(class_names=["red", "green", "blue", "cyan", "pink"])
    arguments = {"latents": noise(1, 3, 8, 8), "num_inference_steps": 1, "output_type": "pt"}
    assert torch.equal(pipe(class_labels="blue", **arguments).images, pipe(class_labels=2, **arguments).images)


BAD_CALLS = {
    "no condition": ({"class_labels": None}, "Give class_labels: a DiT needs a condition"),
    "prompt": ({"prompt": "a circle"}, "Got prompt, but a DiT takes class_labels"),
    "negative prompt": ({"negative_prompt": "red"}, "a DiT does not"),
    "label": ({"class_labels": 6}, "Class label 6 is out of range"),
    "name": ({"class_labels": "red"}, "stores no class names"),
    "images": ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
    "sigmas": ({"sigmas": [0.5, 0.7]}, "sigmas must fall"),
    "no sigmas": ({"sigmas": []}, "at least 1, got 0"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale must be a finite"),
    "interval": ({"guidance_interval": (0.6, 0.5)}, "guidance_interval"),
    "schedule": ({"guidance_schedule": "up"}, "'up'"),
    "strength": ({"image": picture(), "strength": 0.0}, r"strength must be in \(0, 1\].*got 0.0"),
    "strength above one": ({"image": picture(), "strength": 1.5}, "strength.*1.5"),
    "mask alone": ({"mask_image": torch.ones(8, 8)}, "give the image too"),
    "mask shape": ({"image": picture(), "mask_image": torch.ones(4, 8)}, "masks of 8x4 pixels.*of 8x8"),
    "masks": ({"image": picture(), "mask_image": torch.ones(2, 8, 8)}, "2 masks.*1 images"),
    "empty mask": ({"image": picture(), "mask_image": torch.zeros(8, 8)}, "masks nothing"),
    "image size": ({"image": picture(9)}, "height must be a multiple of 2 pixels.*got 9"),
    "image batch": ({"image": picture(batch=2)}, "batch of 2, but there are 1"),
    "size and image": ({"image": picture(), "height": 8}, "leave them out"),
    "size": ({"width": 5}, "width must be a multiple of 2 pixels.*got 5"),
    "generators": ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
    "latents": ({"latents": noise(1, 3, 4, 4)}, r"\(1, 3, 4, 4\), expected \(1, 3, 8, 8\)"),
    "output": ({"output_type": "jpeg"}, "'jpeg'"),
}


@pytest.mark.parametrize("arguments, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**{"class_labels": 0, "num_inference_steps": 1, **arguments})


def test_schedulers_of_diffusion_are_refused():
    for scheduler in (DDIMScheduler(), DPMSolverMultistepScheduler()):
        with pytest.raises(ValueError, match="prediction_type='epsilon' takes no velocities"):
            pipeline(scheduler=scheduler)
    pipe = pipeline()
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="takes no velocities"):
        pipe(class_labels=0)
    with pytest.raises(ValueError, match="takes no sigmas"):
        pipeline(scheduler=FlowMatchHeunDiscreteScheduler())(class_labels=0, sigmas=[1.0])


def test_networks_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="use MeanFlowPipeline"):
        pipeline(dit(has_duration=True))
    with pytest.raises(ValueError, match="6 output channels"):
        pipeline(dit(out_channels=6))
    with pytest.raises(ValueError, match="UNet2DModel is no flow network"):
        pipeline(
            UNet2DModel(
                block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
            )
        )


def test_latents_without_an_autoencoder():
    pipe = pipeline(dit(in_channels=4))
    assert pipe(class_labels=0, num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="4 channels and the pipeline has no vae"):
        pipe(class_labels=0)


def test_a_compiled_network():
    pipe = pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")  # traced when it is first called, not here
    assert type(pipe.network) is LabelFlowNetwork and pipe.network.transformer is pipe.transformer
    pipe.check_inputs(1, 1, None, None, None, 1.0, "pil", ())
