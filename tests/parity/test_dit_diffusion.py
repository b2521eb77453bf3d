"""The diffusion of DiT and the interpolant of SiT against the official code: one test for each output of the case.

The outputs of the networks themselves are read by test_dit_network.py.
"""

import re
from functools import cache
from unittest import mock

import pytest
import torch

import hfgen.schedulers.interpolant_sde as interpolant_sde
import hfgen.schedulers.respaced_ddpm as respaced_ddpm
from hfgen.conversion import load_original
from hfgen.losses.diffusion import diffusion_loss
from hfgen.losses.flow import flow_interpolate, flow_loss
from hfgen.pipelines.diffusion import ImageDiffusionPipeline
from hfgen.pipelines.rectified_flow import RectifiedFlowPipeline
from hfgen.sampling.guidance import guide
from hfgen.sampling.ode import solve_ode
from hfgen.schedulers.interpolant_sde import InterpolantSDEScheduler
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler
from hfgen.training.flow_pairs import pair_conditions
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "dit"
NETWORK = re.compile(r"t_embed|c|block\.\d+|forward|forward_cfg|sit\.forward")
GUIDANCE_CHANNELS = 3
LABEL_DROPOUT = "class_dropout_prob"


@cache
def model(part):
    case = read_case(SYSTEM)
    return load_original(part, case.states[part], original_config=case.config[part])


def dropped_labels(part, prefix):
    case = read_case(SYSTEM)
    drop = case.inputs[f"{prefix}train.label_drop_u"] < case.config[part][LABEL_DROPOUT]
    return torch.where(drop, model(part).unconditional_label, case.inputs[f"{prefix}y"])


@cache
@torch.no_grad()
def training():
    inputs, scheduler = read_case(SYSTEM).inputs, RespacedDDPMScheduler.from_preset("dit")
    latents, noise, timesteps = (inputs[f"train.{name}"] for name in ("latents", "noise", "t"))
    noisy = scheduler.add_noise(latents, noise, timesteps)
    output = model("dit")(noisy, timesteps, dropped_labels("dit", "")).sample
    return diffusion_loss(scheduler, output, latents, noise, timesteps)


@cache
def scheduler_of(name):
    """That of a sampling run; 250 is that of the released samplers."""
    if name == "respaced_250":
        return RespacedDDPMScheduler.from_preset("dit")
    settings = read_case(SYSTEM).config["sampling"]
    if name == "sample_ddim":
        return RespacedDDPMScheduler(algorithm="ddim", respacing=f"ddim{settings['ddim_steps']}")
    return RespacedDDPMScheduler(respacing=settings[name]["num_sampling_steps"])


def step0(name):
    """The first step of both halves of the official batch, which the pipeline keeps the first of."""
    inputs, scheduler = read_case(SYSTEM).inputs, scheduler_of(name)
    x, y = inputs["sample.noise_init"].repeat(2, 1, 1, 1), inputs["y"]
    labels = torch.cat([y, torch.full_like(y, model("dit").unconditional_label)])
    timestep = scheduler.timesteps[0]
    with torch.no_grad():
        output = model("dit")(x, timestep.expand(len(x)), labels).sample
    guided = guide(*output[:, :GUIDANCE_CHANNELS].chunk(2), inputs["cfg_scale"].item()).repeat(2, 1, 1, 1)
    output = torch.cat([guided, output[:, GUIDANCE_CHANNELS:]], dim=1)
    return scheduler.step(output, timestep, x, variance_noise=inputs[f"{name}.noise_steps"][0]).prev_sample


@cache
def sample(name):
    """Latents of the pipeline with the noise of the case."""
    inputs = read_case(SYSTEM).inputs
    start = inputs["sample.noise_init"]
    draws = iter(inputs.get(f"{name}.noise_steps", ()))
    pipeline = ImageDiffusionPipeline(model("dit"), scheduler_of(name), guidance_channels=GUIDANCE_CHANNELS)
    pipeline.set_progress_bar_config(disable=True)
    with mock.patch.object(respaced_ddpm, "randn_tensor", lambda *_: next(draws)[: len(start)]):
        output = pipeline(inputs["y"], guidance_scale=inputs["cfg_scale"].item(), latents=start, output_type="latent")
    assert output.nfe == len(scheduler_of(name).timesteps)
    return output.images


@cache
@torch.no_grad()
def sit_training():
    """The official velocity is data minus noise at the time 1 - sigma."""
    inputs = read_case(SYSTEM).inputs
    latents, noise, time = (inputs[f"sit.train.{name}"] for name in ("latents", "noise", "t"))
    noisy = flow_interpolate(latents, noise, 1 - time)
    velocity = model("sit")(noisy, 1000 * (1 - time), dropped_labels("sit", "sit.")).sample
    return {"pred": -velocity, "loss": flow_loss(velocity, latents, noise)}


def sit_pipeline(scheduler=None):
    pipeline = RectifiedFlowPipeline(model("sit"), scheduler, guidance_channels=GUIDANCE_CHANNELS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sit_arguments():
    inputs = read_case(SYSTEM).inputs
    return {
        "class_labels": inputs["sit.y"],
        "guidance_scale": inputs["cfg_scale"].item(),
        "latents": inputs["sit.sample.noise_init"],
        "output_type": "latent",
    }


def sit_sigmas():
    return torch.linspace(1, 0, read_case(SYSTEM).config["sit_sampling"]["ode_num_steps"]).tolist()


def sit_euler():
    return sit_pipeline()(**sit_arguments(), sigmas=sit_sigmas()[:-1]).images


@torch.no_grad()
def sit_heun():
    """FlowMatchHeunDiscreteScheduler takes its last step by Euler, which the official solver does not."""
    pipeline, arguments = sit_pipeline(), sit_arguments()
    labels, scale = arguments["class_labels"], arguments["guidance_scale"]
    conditions = pair_conditions(pipeline, {"label": labels}, guided=True)

    def velocity(x, sigma):
        return conditions.velocity(pipeline.network, x, 1000 * sigma, scale)

    return solve_ode(velocity, arguments["latents"], sit_sigmas(), "heun")


def sit_sde():
    case, arguments = read_case(SYSTEM), sit_arguments()
    draws, steps = iter(case.inputs["sit.sample_sde.noise_steps"]), case.config["sit_sampling"]["sde_num_steps"]
    count = len(arguments["latents"])
    with mock.patch.object(interpolant_sde, "randn_tensor", lambda *_: next(draws)[:count]):
        return sit_pipeline(InterpolantSDEScheduler())(**arguments, num_inference_steps=steps).images


CHECKS = {
    r"train\.(mse|vb|loss)": lambda name: getattr(training(), name),
    r"(\w+)\.timesteps": lambda name: scheduler_of(name).timesteps,
    r"(\w+)\.step0": lambda name: step0(name),
    r"(sample\w*)\.latents": lambda name: sample(name),
    r"sit\.train\.(.+)": lambda name: sit_training()[name],
    r"sit\.sample_ode_euler": lambda: sit_euler(),
    r"sit\.sample_ode_heun2": lambda: sit_heun(),
    r"sit\.sample_sde": lambda: sit_sde(),
}
OUTPUTS = [name for name in output_names(SYSTEM) if not NETWORK.fullmatch(name)]


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    assert_matches(check(*found.groups()), read_case(SYSTEM).outputs[name])


def test_case_has_outputs():
    assert OUTPUTS, f"there is no golden case at {case_path(SYSTEM)}"
