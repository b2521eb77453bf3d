"""The U-Nets, samplers and losses of rectified flow against the official code: one test for each output."""

import re
from functools import cache

import pytest
import torch

from hfgen.conversion import load_original, parts
from hfgen.losses.flow import flow_interpolate, flow_loss
from hfgen.losses.reflow import one_step_loss, reflow_sigmas, straightness
from hfgen.sampling.rectified_flow import euler_sample, rk45_sample, sde_sample
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "rectified_flow"
PARTS = {"rf": "ncsnpp_ddpmpp", "rf_hq": "ncsnpp_hq"}
ADAPTIVE_TOLERANCE = 1e-3  # stated by the notes of the case


@cache
def model(part):
    case = read_case(SYSTEM)
    return load_original(SYSTEM, case.states[PARTS[part]], original_config=case.config[PARTS[part]])


def velocity(part):
    """Of points and one sigma; the official code counts from the other end, in float32, which float64 can express."""

    def call(points, sigma):
        time = torch.full((len(points),), 1 - sigma)
        return model(part)(points, 1000 - 1000 * time.double()).sample

    return call


def forward(part):
    case = read_case(SYSTEM)
    return -model(part)(case.inputs[f"{part}.x"], 1000 * (1 - case.inputs[f"{part}.t"].double())).sample


def prediction(part, num_steps=None, uniform=None):
    """Velocity, images and noise at the training times of :func:`reflow_sigmas`."""
    inputs = read_case(SYSTEM).inputs
    images, noise = inputs[f"{part}.x1"], inputs[f"{part}.z0"]
    uniform = inputs[f"{part}.train.u"] if uniform is None else uniform
    sigma = reflow_sigmas(uniform.double(), num_steps)
    return model(part)(flow_interpolate(images, noise, sigma).float(), 1000 * sigma).sample, images, noise


def loss(part, name):
    if name == "distill_k4":
        index = read_case(SYSTEM).inputs[f"{part}.train.k_index"]
        return flow_loss(*prediction(part, num_steps=4, uniform=(index + 0.5) / 4)).mean()
    if name == "distill_t0":
        return one_step_loss(*prediction(part, num_steps=1)).mean()
    if name == "1rf_sum":
        found = prediction(part)
        return flow_loss(*found).mean() * found[0][0].numel() / 2
    return flow_loss(*prediction(part, num_steps={"reverse_t1": 0}.get(name))).mean()


def sample(part, name):
    case = read_case(SYSTEM)
    settings, noise = case.config["rf_sampling"], case.inputs[f"{part}.z0"]
    if name == "sde":
        draws = case.inputs[f"{part}.sde_noise"]
        images = sde_sample(velocity(part), noise, draws, settings["sigma_variance"])
    else:
        images = euler_sample(velocity(part), noise, 1 if name == "onestep" else settings["euler_steps"])
    return (images + 1) / 2


def pair(part, name):
    case = read_case(SYSTEM)
    noise = case.inputs[f"{part}.z0"]
    if name == "rk45":
        return rk45_sample(velocity(part), noise)[0]
    return euler_sample(velocity(part), noise, case.config["rf_sampling"]["euler_steps"])


def bend(part):
    case = read_case(SYSTEM)
    return straightness(velocity(part), case.inputs[f"{part}.z0"], case.config["rf_sampling"]["euler_steps"])


PART = r"(rf|rf_hq)"
CHECKS = {
    rf"{PART}\.forward": forward,
    rf"{PART}\.loss_(.+)": loss,
    rf"{PART}\.sample_(.+)": sample,
    rf"{PART}\.reflow_pair_(.+)": pair,
    rf"{PART}\.straightness": bend,
}
NAMES = [name for name in output_names(SYSTEM) if name.startswith(tuple(f"{part}." for part in PARTS))]


@pytest.mark.parametrize("name", NAMES)
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    with torch.no_grad():
        actual = check(*found.groups())
    tolerance = ADAPTIVE_TOLERANCE if name.endswith("rk45") else 1e-5
    assert_matches(actual, read_case(SYSTEM).outputs[name], tolerance=tolerance)


def test_case_has_outputs():
    assert NAMES, f"there is no golden case at {case_path(SYSTEM)}"


@pytest.mark.parametrize("part", PARTS)
def test_official_layout_round_trip(part):
    state = read_case(SYSTEM).states.get(PARTS[part])
    if state is None:
        pytest.skip("the case has no such part")
    official = parts(SYSTEM)["transformer"].save(model(part))
    assert official.keys() == state.keys() - {"module.sigmas"}
    assert all(torch.equal(value, state[name]) for name, value in official.items())
