"""How a Transfusion run noises images, what the network then predicts, and the scheduler that samples it."""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hfgen.losses.flow import flow_interpolate, flow_velocity, sample_sigmas
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler

NUM_TIMESTEPS = 1000


class Noising(Protocol):
    """A path between images and noise. Times are floats in [0, 1], 1 is noise.

    Attributes:
        scheduler: samples a network that learned on this path.
    """

    scheduler: SchedulerMixin

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times (count,) of a training step, on the device of the generator."""

    def noised(self, x0: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, C, H, W), standard normal noise and times (N,) -> noisy images, timesteps (N,), targets."""


class DiffusionNoise:
    """Diffusion on the cosine schedule (arXiv 2102.09672) in 1000 timesteps, the paper's.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        clip: clip predicted images to [-1, 1] in sampling, for pixels.
        algorithm: of the scheduler, "ddpm" or "ddim".
        num_inference_steps: of the scheduler.
    """

    def __init__(self, prediction_type: str, *, clip: bool, algorithm: str, num_inference_steps: int) -> None:
        self.scheduler = RespacedDDPMScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=prediction_type,
            reverse_variance="fixed_small",
            clip_sample=clip,
            algorithm=algorithm,
            respacing=str(num_inference_steps),
        )

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device)

    def noised(self, x0: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        timesteps = (NUM_TIMESTEPS * times).long().clamp(max=NUM_TIMESTEPS - 1)
        noisy = self.scheduler.add_noise(x0, noise, timesteps)
        return noisy, timesteps, self.scheduler.target(x0, noise, timesteps)


class FlowNoise:
    """The straight path, of which the network predicts the velocity (arXiv 2209.03003).

    Args:
        density: of the times, as of :func:`hfgen.losses.flow.sample_sigmas`.
    """

    def __init__(self, density: str) -> None:
        self.density = density
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        return sample_sigmas(count, self.density, generator)

    def noised(self, x0: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flow_interpolate(x0, noise, times), NUM_TIMESTEPS * times, flow_velocity(x0, noise)
