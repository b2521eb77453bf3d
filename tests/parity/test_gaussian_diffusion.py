"""The diffusion of guided diffusion and MAR against the official code, where no network of theirs is needed."""

import re
from functools import cache

import pytest
import torch

from hfgen.losses.diffusion import diffusion_loss
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler
from support.golden import assert_matches, case_path, output_names, read_case

GUIDED, MAR = "guided_diffusion", "mar"


def guided(**changes):
    """The scheduler of the case; steps with gradients of the classifier and the network's outputs as stored."""
    settings = read_case(GUIDED).config["diffusion"]
    assert settings["learn_sigma"]
    preset = {"linear": "guided-diffusion", "cosine": "guided-diffusion-64"}[settings["noise_schedule"]]
    config = RespacedDDPMScheduler.from_preset(preset).config
    return RespacedDDPMScheduler.from_config(
        config, num_train_timesteps=settings["steps"], **{"respacing": None, **changes}
    )


def ascending(respacing):
    return guided(respacing=respacing).timesteps.flip(0)


def sampling(name):
    return read_case(GUIDED).config["sampling"][name]


@cache
def reverse():
    case = read_case(GUIDED)
    found = guided().reverse(case.outputs["unet"], case.inputs["x"], case.inputs["t"])
    return {
        "mean": found.mean,
        "log_variance": found.log_variance,
        "variance": found.log_variance.exp(),
        "pred_xstart": found.x0,
    }


def step(algorithm):
    """Each row has its own timestep in this case."""
    case, scheduler = read_case(GUIDED), guided(algorithm=algorithm)
    rows = zip(
        case.outputs["unet"].split(1),
        case.inputs["t"],
        case.inputs["x"].split(1),
        case.inputs["noise_step"].split(1),
        case.outputs["classifier_grad"].split(1),
    )
    eta = sampling("ddim_eta") if algorithm == "ddim" else None
    results = [
        scheduler.step(output, timestep, x, variance_noise=noise, score=score, eta=eta)
        for output, timestep, x, noise, score in rows
    ]
    return {name: torch.cat([result[name] for result in results]) for name in results[0]}


def mar(respacing="100"):
    config = RespacedDDPMScheduler.from_preset("mar").config
    return RespacedDDPMScheduler.from_config(config, respacing=respacing)


def mar_timesteps(run):
    return mar(read_case(MAR).config["sampling"][run]["num_sampling_steps"]).timesteps


CHECKS = {
    GUIDED: {
        r"alphas_cumprod": lambda: guided().process.alphas_cumprod,
        r"x_t": lambda: guided().add_noise(
            *(read_case(GUIDED).inputs[name] for name in ("x_start", "noise_train", "t_train"))
        ),
        r"p_(mean|variance|log_variance|pred_xstart)": lambda name: reverse()[name],
        r"p_sample_guided": lambda: step("ddpm")["prev_sample"],
        r"ddim_step_eta": lambda: step("ddim")["prev_sample"],
        r"ddim_step_eta_pred_xstart": lambda: step("ddim")["pred_original_sample"],
        r"map_250": lambda: ascending("250"),
        r"map_sections": lambda: ascending(sampling("sections")),
        r"(ddim|ddpm)_timestep_map": lambda name: ascending(sampling(f"{name}_respacing")),
        r"ddpm_respaced_(betas|alphas_cumprod)": lambda name: getattr(
            guided(respacing=sampling("ddpm_respacing")).respaced, name
        ),
    },
    MAR: {
        r"respaced_100\.timesteps": lambda: mar().timesteps.flip(0),
        r"respaced_100\.betas": lambda: mar().respaced.betas,
        r"(sample\w*)\.timesteps": lambda run: mar_timesteps(run),
    },
}
OUTPUTS = [
    (system, name)
    for system, checks in CHECKS.items()
    for name in output_names(system)
    if any(re.fullmatch(pattern, name) for pattern in checks)
]


@pytest.mark.parametrize(("system", "name"), OUTPUTS)
def test_output(system, name):
    matches = [(check, found) for pattern, check in CHECKS[system].items() if (found := re.fullmatch(pattern, name))]
    check, found = matches[0]
    actual, expected = check(*found.groups()), read_case(system).outputs[name]
    if expected.dtype == torch.float64:  # tables, which must agree far beyond float32
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    else:
        assert_matches(actual, expected)


@pytest.mark.parametrize("system", CHECKS)
def test_case_has_outputs(system):
    assert any(name == system for name, _ in OUTPUTS), f"there is no golden case at {case_path(system)}"


def test_variational_bound_is_that_of_the_official_posterior():
    """log variance -1 of the learned range is the posterior: with the true mean the bound is zero where t > 0."""
    case = read_case(GUIDED)
    x0, noise = case.inputs["x_start"], case.inputs["noise_train"]
    timesteps = torch.full((len(x0),), 500)
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = diffusion_loss(guided(), output, x0, noise, timesteps)
    assert loss.mse.max() == 0 and loss.vb.abs().max() < 1e-5
