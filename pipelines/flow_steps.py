"""The steps of a flow pipeline: which schedulers fit, their times, and the guidance scale of each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from hfgen.pipelines.flow_networks import FlowNetwork
from hfgen.pipelines.inputs import check_common
from hfgen.sampling.guidance import resolve_guidance
from hfgen.schedulers.interpolant_sde import InterpolantSDEScheduler

FlowScheduler = FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler | InterpolantSDEScheduler


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raise a ``ValueError`` unless the scheduler takes velocities of a flow."""
    config = scheduler.config
    predicts_flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas", False)
    if not isinstance(scheduler, FlowScheduler) and not predicts_flow:
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type={config.get('prediction_type')!r} takes no velocities "
            "of a flow: use FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, "
            "InterpolantSDEScheduler, or a solver with "
            "prediction_type='flow_prediction' and use_flow_sigmas=True."
        )
    if config.get("num_train_timesteps") != 1000 or config.get("invert_sigmas", False):
        raise ValueError("The networks take the timesteps 1000 sigma: num_train_timesteps=1000, invert_sigmas=False.")


def check_numbers(
    num_images_per_prompt: int, num_inference_steps: int, guidance_scale: float | None, strength: float
) -> None:
    """Raise a ``ValueError`` for numbers out of range."""
    check_common(num_images_per_prompt, guidance_scale)
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], the share of the way back to noise, got {strength}.")


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    sigmas: Sequence[float] | None,
    *,
    default_sigmas: Sequence[float] | None,
    num_tokens: int,
    device: torch.device | str,
) -> None:
    """Set the times of a scheduler.

    Args:
        scheduler: its ``timesteps`` and ``sigmas`` change.
        num_inference_steps: n.
        sigmas: the n flow times at which steps begin, or None.
        default_sigmas: those of the network, for schedulers that can be given any; None is the scheduler's own choice.
        num_tokens: of an image, for a scheduler that shifts by it (``use_dynamic_shifting``).
        device: of the times.

    Raises:
        ValueError: ``sigmas`` that do not fall within (0, 1], or for a scheduler that takes none.
    """
    arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps, "device": device}
    config = scheduler.config
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if sigmas is not None:
        if not takes_sigmas:
            raise ValueError(f"{type(scheduler).__name__} takes no sigmas; use num_inference_steps.")
        if sigmas[0] > 1 or any(high <= low for high, low in zip(sigmas, [*sigmas[1:], 0.0])):
            raise ValueError(f"sigmas must fall from at most 1 and stay above 0, got {list(sigmas)}.")
    elif takes_sigmas:
        sigmas = default_sigmas
    if sigmas is not None:
        arguments["sigmas"] = np.array(sigmas)  # some compute with them
    if config.get("use_dynamic_shifting"):
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        arguments["mu"] = config.base_shift + (num_tokens - config.base_image_seq_len) * slope
    scheduler.set_timesteps(**arguments)


def set_network_timesteps(
    scheduler: SchedulerMixin,
    network: FlowNetwork,
    num_inference_steps: int,
    sigmas: Sequence[float] | None,
    shape: Sequence[int],
    device: torch.device | str,
) -> None:
    """:func:`set_timesteps` for a network and latents of the ``shape`` (C, h, w)."""
    set_timesteps(
        scheduler,
        num_inference_steps,
        sigmas,
        default_sigmas=network.default_sigmas(num_inference_steps),
        num_tokens=shape[1] * shape[2] // network.multiple**2,
        device=device,
    )


def first_step(scheduler: SchedulerMixin, num_inference_steps: int, strength: float) -> int:
    """The index in ``scheduler.timesteps`` at which an image-to-image call with this strength begins."""
    skipped = int(num_inference_steps - num_inference_steps * strength)
    return skipped * scheduler.order  # Heun lists all but the first time twice


def guidance_scales(
    schedule: str | Sequence[float], scale: float, interval: tuple[float, float], sigmas: Sequence[float]
) -> list[float]:
    """The guidance scale of each pass of the network: that of the schedule inside ``interval`` of sigma, else 1.

    Raises:
        ValueError: an unknown schedule, a list of another length, or an interval that is not ordered within [0, 1].
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval is (low, high) with 0 <= low <= high <= 1, got {interval}.")
    scales = resolve_guidance(schedule, scale, len(sigmas))
    return [each if low <= sigma <= high else 1.0 for each, sigma in zip(scales, sigmas)]
