"""MMDiT, the flow pipeline, losses, paths and solvers against diffusers, SD3.5's code and the flow matching library.

One test for each output of the golden case; the U-Nets of rectified flow are in test_rectified_flow_unet.py.
"""

import re
from functools import cache

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, SD3Transformer2DModel

from hfgen.conversion import load_original
from hfgen.losses.flow import (
    flow_interpolate,
    flow_loss,
    flow_weights,
    logit_normal_sigmas,
    mode_sigmas,
    preconditioned_flow_loss,
)
from hfgen.pipelines.rectified_flow import RectifiedFlowPipeline
from hfgen.sampling.flow_paths import path_coefficients, time_of_ratio
from hfgen.sampling.ode import solve_ode
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "rectified_flow"
UNET = ("rf.", "rf_hq.")
TRAIN_INDICES = [0, 1, 250, 500, 998, 999]  # these and the following are stated by the sheet of the case
RATIOS = torch.tensor([0.1, 1.0, 7.0])
SOLVER_STEPS = {"euler": 4, "midpoint": 4, "heun3": 2}
PATHS = {"cond_ot": "straight", "poly3": "polynomial", "vp": "vp", "linear_vp": "linear-vp", "cosine": "cosine"}


def names() -> list[str]:
    return [name for name in output_names(SYSTEM) if not name.startswith(UNET)]


def inputs(prefix):
    given = read_case(SYSTEM).inputs
    return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}


@cache
def sd3():
    case = read_case(SYSTEM)
    model = SD3Transformer2DModel(**case.config["sd3"]).eval()
    model.load_state_dict(case.states["sd3"])
    return model


@cache
@torch.no_grad()
def forward():
    """The forward pass and what happens inside."""
    model, given, seen = sd3(), inputs("sd3."), {}

    def record(module, arguments, output):
        seen["block0.context"], seen["block0.hidden"] = output

    hook = model.transformer_blocks[0].register_forward_hook(record)
    sample = model(given["latents"], given["context"], given["pooled"], given["timestep"]).sample
    hook.remove()
    cropped = model.pos_embed.cropped_pos_embed(*given["latents"].shape[-2:])
    temb = model.time_text_embed(given["timestep"], given["pooled"])
    return seen | {"forward": sample, "pos_embed_cropped": cropped, "temb": temb}


@cache
def sampled(solver):
    """The pipeline with the noise, embeddings and guidance of the case; also after its first pass."""
    case, given, steps = read_case(SYSTEM), inputs("sd3."), []
    scheduler = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[solver]
    pipeline = RectifiedFlowPipeline(sd3(), scheduler(shift=case.config["sampling"]["shift"]))
    pipeline.set_progress_bar_config(disable=True)
    factor = sd3().config.patch_size
    assert given["noise"].shape[-1] % factor == 0
    output = pipeline(
        prompt_embeds=given["context"],
        pooled_prompt_embeds=given["pooled"],
        negative_prompt_embeds=given["context_null"],
        negative_pooled_prompt_embeds=given["pooled_null"],
        height=given["noise"].shape[-2],
        width=given["noise"].shape[-1],
        latents=given["noise"],
        num_inference_steps=case.config["sampling"]["steps"],
        guidance_scale=case.config["sampling"]["guidance"],
        output_type="latent",
        callback_on_step_end=lambda pipe, i, timestep, tensors: steps.append(tensors["latents"]) or {},
    )
    return {"": output.images, ".step0": steps[0]}


@cache
def scheduled(name):
    setting = read_case(SYSTEM).config["schedulers"][name]
    kind = FlowMatchHeunDiscreteScheduler if setting.get("heun") else FlowMatchEulerDiscreteScheduler
    scheduler = kind(**setting["config"])
    before = {
        "train_timesteps": scheduler.timesteps[TRAIN_INDICES],
        "train_sigmas": scheduler.sigmas[TRAIN_INDICES],
    }
    scheduler.set_timesteps(setting["steps"], **setting.get("args", {}))
    return before | {"timesteps": scheduler.timesteps, "sigmas": scheduler.sigmas}


@cache
@torch.no_grad()
def training():
    """The training script of diffusers: draws index its list of times, which descends."""
    setting, given = read_case(SYSTEM).config["train"], inputs("sd3.train.")
    u = logit_normal_sigmas(given["normal"], setting["logit_mean"], setting["logit_std"])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=setting["shift"])
    indices = (u * scheduler.config.num_train_timesteps).long()
    timesteps, sigmas = scheduler.timesteps[indices], scheduler.sigmas[indices]
    x, noise, network = given["x"], given["noise"], inputs("sd3.")
    noisy = flow_interpolate(x, noise, sigmas)
    pred = sd3()(noisy, network["context"], network["pooled"], timesteps).sample
    results = {"u": u, "u_mode": mode_sigmas(given["uniform"]), "timesteps": timesteps, "sigmas": sigmas, "pred": pred}
    for name, weighting in {"logit_normal": "none", "sigma_sqrt": "sigma_sqrt", "cosmap": "cosmap"}.items():
        weights = flow_weights(weighting, sigmas)
        results[f"loss_{name}"] = flow_loss(pred, x, noise, weights)
        results[f"loss_{name}_precond"] = preconditioned_flow_loss(pred, noisy, x, sigmas, weights)
    return results


@cache
@torch.no_grad()
def converted():
    case, given = read_case(SYSTEM), inputs("mmdit.")
    model = load_original("sd3", case.states["mmdit"], original_config=case.config["mmdit"])
    return model(given["latents"], given["context"], given["pooled"], given["timestep"]).sample


def path(name):
    """The case counts from noise at 0 to data at 1."""
    given = inputs("fm.")
    coefficients = path_coefficients(PATHS[name], 1 - given["t"])
    at = path_coefficients(PATHS[name], 1 - given["t"].unsqueeze(1))
    derivatives = [-coefficients.alpha_derivative, -coefficients.sigma_derivative]
    return {
        "coeffs": torch.stack([coefficients.alpha, coefficients.sigma, *derivatives]),
        "x_t": at.interpolate(given["x1"], given["x0"]),
        "dx_t": -at.velocity(given["x1"], given["x0"]),
        "snr_inverse": 1 - time_of_ratio(PATHS[name], RATIOS),
    }


def solved(method):
    steps = SOLVER_STEPS[method]
    times = [step / steps for step in range(steps + 1)]
    return solve_ode(lambda x, t: torch.sin(x) + t * x, inputs("fm.")["x0"], times, method)


CHECKS = {
    r"sd3\.sample_(\w+?)(|\.step0)": lambda solver, step: sampled(solver)[step],
    r"sd3\.train\.(\w+)": lambda name: training()[name],
    r"sd3\.([\w.]+)": lambda name: forward()[name],
    r"mmdit\.forward": lambda: converted(),
    r"sched\.(\w+)\.(\w+)": lambda name, what: scheduled(name)[what],
    r"fm\.skewed_t": lambda: (1 - logit_normal_sigmas(inputs("fm.")["normal"], -1.2, 1.2)).clamp(1e-4, 1),
    r"fm\.solver_(\w+)": lambda method: solved(method),
    r"fm\.(\w+)\.(\w+)": lambda name, what: path(name)[what],
}


@pytest.mark.parametrize("name", names())
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    assert_matches(check(*found.groups()), read_case(SYSTEM).outputs[name])


def test_case_has_outputs():
    assert names(), f"there is no golden case at {case_path(SYSTEM)}"
