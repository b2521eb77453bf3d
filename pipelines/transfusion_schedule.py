"""The schedulers of mixed-modal transformers: diffusion or a flow, as the transformer was trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hfgen.pipelines import flow_steps
from hfgen.sampling.flow_paths import even_sigmas
from hfgen.sampling.gaussian_diffusion import PREDICTION_TYPES
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler

DIFFUSION_STEPS, FLOW_STEPS = 250, 50  # of a call; 250 are the paper's


def default_scheduler() -> RespacedDDPMScheduler:
    """That of the paper: the cosine schedule, the noise as prediction, ancestral sampling in 250 steps."""
    return RespacedDDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="epsilon",
        reverse_variance="fixed_small",
        respacing=str(DIFFUSION_STEPS),
    )


def check_scheduler(scheduler: SchedulerMixin, *, latents: bool) -> None:
    """Check that a scheduler takes what the transformer predicts.

    Args:
        scheduler: of diffusers or hfgen.
        latents: whether images are latents and not pixels.

    Raises:
        ValueError: it is neither for diffusion nor for a flow, wants a variance, or clips latents.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if is_flow(scheduler):
        flow_steps.check_scheduler(scheduler)
        if config.get("use_dynamic_shifting"):
            raise ValueError(f"{name} shifts times by the size of the image, which the transformer has not learned.")
        return
    if config.get("prediction_type") not in PREDICTION_TYPES:
        raise ValueError(
            f"{name} with prediction_type={config.get('prediction_type')!r} fits neither diffusion "
            f"({', '.join(PREDICTION_TYPES)}) nor a flow (FlowMatchEulerDiscreteScheduler)."
        )
    learned = ("learned", "learned_range")
    if config.get("reverse_variance") in learned or config.get("variance_type") in learned:
        raise ValueError(f"{name} takes a learned variance, which the transformer does not predict; use fixed_small.")
    if latents and config.get("clip_sample"):
        raise ValueError(
            f"{name} clips every step to [-{config.clip_sample_range}, {config.clip_sample_range}], which latents "
            "exceed; make it with from_config(scheduler.config, clip_sample=False)."
        )


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether it takes velocities of a flow."""
    predicts_flow = scheduler.config.get("prediction_type") == "flow_prediction"
    return isinstance(scheduler, flow_steps.FlowScheduler) or predicts_flow


def set_timesteps(scheduler: SchedulerMixin, num_inference_steps: int | None, device: torch.device | str) -> None:
    """Set the timesteps of a call.

    Args:
        scheduler: its ``timesteps`` change.
        num_inference_steps: None is 50 for a flow, and for diffusion what a :class:`hfgen.RespacedDDPMScheduler`
            says, else 250.
        device: of the timesteps.

    Raises:
        ValueError: a number of steps that is not possible.
    """
    if num_inference_steps is None and not isinstance(scheduler, RespacedDDPMScheduler):
        num_inference_steps = FLOW_STEPS if is_flow(scheduler) else DIFFUSION_STEPS
    trained = scheduler.config.num_train_timesteps
    if num_inference_steps is not None and not 1 <= num_inference_steps <= trained:
        raise ValueError(f"num_inference_steps must be between 1 and {trained}, got {num_inference_steps}.")
    arguments: dict[str, Any] = {}
    if is_flow(scheduler) and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        arguments["sigmas"] = np.array(even_sigmas(num_inference_steps))  # some compute with them
    scheduler.set_timesteps(num_inference_steps, device=device, **arguments)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else the scheduler would look for each timestep on the device


def step_arguments(
    scheduler: SchedulerMixin, generator: torch.Generator | Sequence[torch.Generator] | None
) -> dict[str, Any]:
    """What the scheduler's ``step`` takes besides; deterministic ones take no generator."""
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return {}
    return {"generator": list(generator) if isinstance(generator, Sequence) else generator}


def denoised(scheduler: SchedulerMixin, i: int, timestep: float, inputs: Tensor, prediction: Tensor) -> Tensor:
    """The image that a prediction points to, like ``inputs``, which are what the network got at step i."""
    if is_flow(scheduler):
        return inputs - scheduler.sigmas[i].item() * prediction
    prediction_type = scheduler.config.prediction_type
    if isinstance(scheduler, RespacedDDPMScheduler):
        return scheduler.process.to_x0(prediction_type, prediction, inputs, int(timestep))
    alpha = scheduler.alphas_cumprod[int(timestep)].item()
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return signal * inputs - noise * prediction
    return (inputs - noise * prediction) / signal
