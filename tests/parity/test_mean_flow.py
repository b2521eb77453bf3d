"""MeanFlow against the official JAX code and a third-party PyTorch form: one test for each output of the case.

Tensors of ``jax`` have channels last. The loss of ``sit`` deviates from the official one, so it is put together here.
"""

import re
from functools import cache

import pytest
import torch

from hfgen.conversion import load_original, parts
from hfgen.conversion.rules import revert
from hfgen.losses.mean_flow import drop_first, guided_velocity, mean_flow_loss, order_times, total_derivative
from hfgen.pipelines.mean_flow import MeanFlowPipeline
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "mean_flow"
PARTS = {"jax": ("jax", "dit"), "sit": ("torch", "sit")}  # part of the converter, entry of the configuration
LOGIT_MEAN, LOGIT_STD, EQUAL_SHARE = -0.4, 1.0, 0.75


@cache
def model(name):
    case, (part, entry) = read_case(SYSTEM), PARTS[name]
    return load_original(SYSTEM, case.states[name], part=part, original_config=case.config[entry])


def images(name, part):
    """An input, channels first."""
    tensor = read_case(SYSTEM).inputs[f"{part}.{name}"]
    return tensor.permute(0, 3, 1, 2) if part == "jax" else tensor


def times(part):
    return read_case(SYSTEM).inputs[f"{part}.t"], read_case(SYSTEM).inputs[f"{part}.r"]


def labels(part):
    return read_case(SYSTEM).inputs[f"{part}.y"]


@torch.no_grad()
def network(part, name):
    t, r = times(part)
    z = images("z_t", part)
    if name == "jvp":
        return total_derivative(model(part), z, t, r, labels(part), images("tangent", part))
    return model(part)(z, t, labels(part), t - r).sample


def gradients(part, loss):
    """By official name."""
    names, parameters = zip(*model(part).named_parameters())
    found = dict(zip(names, torch.autograd.grad(loss, parameters)))
    return revert(found, parts(SYSTEM)[PARTS[part][0]].rules(model(part).config))


@cache
def official_loss(name):
    case = read_case(SYSTEM)
    settings = case.config["jax_losses"][name]
    draws = case.inputs["jax.train.label_drop_u"]
    x0, eps = images("train.x", "jax"), images("train.noise", "jax")
    t, r = case.inputs["jax.train.t"], case.inputs["jax.train.r"]
    dropped = drop_first(draws, settings["class_dropout_prob"])
    guidance = {}
    if settings["guidance_eq"] == "cfg":
        guidance = {
            "omega": settings["omega"],
            "kappa": settings["kappa"],
            "guidance_interval": (settings["t_start"], settings["t_end"]),
        }
    output = mean_flow_loss(
        model("jax"),
        x0,
        eps,
        t,
        r,
        labels("jax"),
        dropped=dropped,
        norm_power=settings["norm_p"],
        norm_eps=settings["norm_eps"],
        **guidance,
    )
    time = t[:, None, None, None]
    z, y_inp = (1 - time) * x0 + time * eps, torch.where(dropped, model("jax").unconditional_label, labels("jax"))
    results = {
        "z_t": z,
        "v_g": output.velocity,
        "y_inp": y_inp,
        "u": output.prediction,
        # The loss leaves it out where the target does not contain it.
        "dudt": total_derivative(model("jax"), z, t, r, y_inp, output.velocity),
        "u_tgt": output.target,
        "sq_error": output.squared_error,
        "loss": output.loss.detach(),
        "v_loss": output.velocity_error,
    }
    return results | {f"grad.{key}": value for key, value in gradients("jax", output.loss).items()}


def official_times(density):
    inputs = read_case(SYSTEM).inputs
    first, second = inputs["jax.tr.first"], inputs["jax.tr.second"]
    if density == "logit_normal":
        first, second = LOGIT_MEAN + LOGIT_STD * first, LOGIT_MEAN + LOGIT_STD * second
    return dict(zip("tr", order_times(first.sigmoid(), second.sigmoid(), EQUAL_SHARE)))


@cache
def other_loss(name):
    """The third-party loss, from the same derivative and guided velocity."""
    case, network = read_case(SYSTEM), model("sit")
    settings = case.config["sit_losses"][name]
    inputs = {key: case.inputs[f"sit.train.{key}"] for key in ("time_normal", "equal_u", "label_drop_u")}
    r, t = (LOGIT_MEAN + LOGIT_STD * inputs["time_normal"]).sigmoid().sort(dim=1).values.unbind(1)
    r = torch.where(inputs["equal_u"] < 1 - settings["ratio_r_not_equal_t"], t, r)
    x0, eps = images("train.x", "sit"), images("train.noise", "sit")
    time = t[:, None, None, None]
    z, velocity = (1 - time) * x0 + time * eps, eps - x0
    dropped = inputs["label_drop_u"] < settings["label_dropout_prob"]
    y = torch.where(dropped, network.unconditional_label, labels("sit"))
    weights = {"omega": settings["cfg_omega"], "kappa": settings["cfg_kappa"]}
    interval = (settings["cfg_min_t"], settings["cfg_max_t"])
    guided = guided_velocity(network, z, velocity, t, y, interval=interval, **weights)
    guided = torch.where(dropped[:, None, None, None], velocity, guided)
    derivative = total_derivative(network, z, t, r, y, guided)
    target = guided - (t - r)[:, None, None, None] * derivative
    error = (network(z, t, y, t - r).sample - target).square()
    loss = error.flatten(1).sum(1)
    if settings["weighting"] == "adaptive":
        loss = loss.square() / (loss.detach().square() + 1e-3) ** settings["adaptive_p"]
    inside = ~dropped & (interval[0] <= t) & (t <= interval[1])
    results = {"loss": loss.detach(), "mse": error.mean().detach()}
    for k, rows in enumerate([rows for rows in (inside, ~inside) if rows.any()]):
        each = {"z_t": z, "r": r, "t": t, "v": guided, "dudt": derivative}
        results |= {f"jvp{k}.{key}": value[rows] for key, value in each.items()}
    return results | {f"grad.{key}": value for key, value in gradients("sit", loss.mean()).items()}


def sample(part, sigmas, scale=1.0):
    pipeline = MeanFlowPipeline(model(part))
    pipeline.set_progress_bar_config(disable=True)
    noise = images("sample.noise", part)
    output = pipeline(
        labels(part), sigmas=sigmas, guidance_scale=scale, latents=noise, output_type="latent", return_dict=True
    )
    assert output.nfe == len(sigmas)
    return output.images


CHECKS = {
    r"(jax|sit)\.(u|jvp)": lambda part, name: network(part, name),
    r"jax\.(loss_\w+)\.(.+)": lambda name, what: official_loss(name)[what],
    r"jax\.tr_(\w+)\.([tr])": lambda density, what: official_times(density)[what],
    r"jax\.(sample_\w+)": lambda name: sample("jax", read_case(SYSTEM).config["jax_sampling"][name][:-1]),
    r"sit\.(loss_\w+)\.(.+)": lambda name, what: other_loss(name)[what],
    r"sit\.sample_(\d+)step_cfg([\d.]+)": lambda steps, scale: sample(
        "sit", torch.linspace(1, 0, int(steps) + 1)[:-1].tolist(), float(scale)
    ),
}


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    actual, expected = check(*found.groups()), read_case(SYSTEM).outputs[name]
    if name.startswith("jax.") and actual.ndim == 4 and "grad" not in name:
        actual = actual.permute(0, 2, 3, 1)
    assert_matches(actual, expected)


def test_case_has_outputs():
    assert output_names(SYSTEM), f"there is no golden case at {case_path(SYSTEM)}"


def test_every_part_was_checked():
    for part in read_case(SYSTEM).states:
        assert {f"{part}.u", f"{part}.jvp"} <= set(output_names(SYSTEM))
