"""The stochastic sampler of SiT (arXiv 2401.08740): Euler-Maruyama on the velocity of a flow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hfgen.schedulers.base import HFGenScheduler

DIFFUSIONS = ("constant", "SBDM", "sigma", "decreasing", "increasing-decreasing")
LAST_STEPS = ("mean", "euler", "none")
# The diffusion of the form SBDM is infinite at pure noise, so that it starts this much later.
_SBDM_MARGIN = 1e-3


@dataclass
class InterpolantSDESchedulerOutput(SchedulerOutput):
    """What a step returns.

    Attributes:
        prev_sample: like the sample, the input of the next step.
        pred_original_sample: like the sample, the data at the end of the straight line along the velocity.
    """

    pred_original_sample: Tensor


class InterpolantSDEScheduler(HFGenScheduler):
    """Samples a flow with noise that keeps its marginals, in place of ``FlowMatchEulerDiscreteScheduler``.

    For x_sigma = (1 - sigma) x_0 + sigma eps with velocity v = eps - x_0, and any w(sigma) >= 0, from sigma to
    sigma - h::

        score = -(x + (1 - sigma) v) / sigma
        x     = x + h (-v + w score) + sqrt(2 w h) noise

    The sigmas are even from 1 to ``last_step_size``; the last step from there to 0 has no noise. S steps are S passes
    of the network, which it is called in with ``num_train_timesteps`` * sigma. The published ``num_steps`` is S, or
    S + 1 without a last step.

    Args:
        num_train_timesteps: scale of the timesteps; not used otherwise.
        diffusion: w(sigma) by its published name: ``constant`` c, ``sigma`` c sigma (which ``linear`` is too),
            ``SBDM`` c sigma / (1 - sigma), ``decreasing`` (c cos(pi (1 - sigma)) + 1)^2 / 4, or
            ``increasing-decreasing`` c sin(pi sigma)^2.
        diffusion_norm: c.
        last_step: ``mean``, the drift of the stochastic equation; ``euler``, that of the deterministic one, which is
            the published ``Tweedie`` too; or ``none``: the last noisy sample is the result.
        last_step_size: sigma where the last step begins.
        num_inference_steps: default S.

    Raises:
        ValueError: an unknown name or a number out of range.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType({"sit": {}})

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        diffusion: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str = "mean",
        last_step_size: float = 0.04,
        num_inference_steps: int = 250,
    ):
        for name, value, known in (("diffusion", diffusion, DIFFUSIONS), ("last_step", last_step, LAST_STEPS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}.")
        if diffusion_norm < 0:
            raise ValueError(f"diffusion_norm must be at least 0 (no noise), got {diffusion_norm}.")
        if not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size must be between 0 and 1, got {last_step_size}.")
        self.set_timesteps(num_inference_steps)

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Choose the number of passes S; ``timesteps`` (S,) float32 and ``sigmas`` (S + 1,) descend.

        Raises:
            ValueError: less than two passes, one noisy and the last.
        """
        config = self.config
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if not 2 <= steps <= 100_000:
            raise ValueError(
                f"num_inference_steps must be at least 2, noisy ones and the last (and at most 100000), got {steps}."
            )
        start = 1 - _SBDM_MARGIN if config.diffusion == "SBDM" else 1.0
        points = steps + (config.last_step == "none")
        sigmas = torch.linspace(start, config.last_step_size, points, dtype=torch.float64, device="cpu").float()
        self.num_inference_steps = steps
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])[: steps + 1]
        self.timesteps = (config.num_train_timesteps * self.sigmas[:-1]).to(device)
        # Looked up on the CPU: the index of a timestep costs no wait for the device.
        self._timesteps = self.timesteps.cpu()

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is; other schedulers of diffusers scale it."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """x_sigma of clean samples and standard normal noise, sigma being that of ``timestep``."""
        sigma = float(timestep) / self.config.num_train_timesteps
        return (1 - sigma) * sample + sigma * noise

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> InterpolantSDESchedulerOutput | tuple[Tensor, Tensor]:
        """From the sigma of ``timestep`` to the next one.

        Args:
            model_output: like the sample, the velocity eps - x_0.
            timestep: one of ``timesteps``.
            sample: (B, ...) float, x_sigma.
            generator: of the noise; a list has one for each sample.
            variance_noise: like the sample, standard normal noise to use instead.
            return_dict: return an :class:`InterpolantSDESchedulerOutput` instead of a tuple.

        Raises:
            ValueError: not such a timestep, or shapes that differ.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"A velocity has the shape of the sample, {tuple(sample.shape)}, got {tuple(model_output.shape)}."
            )
        index = self._index_of(float(timestep))
        dtype, sample, velocity = sample.dtype, sample.float(), model_output.float()
        sigma, following = self.sigmas[index].item(), self.sigmas[index + 1].item()
        size = sigma - following
        x0 = sample - sigma * velocity
        score = -(sample + (1 - sigma) * velocity) / sigma
        if following > 0:
            diffusion = self._diffusion(sigma)
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
            previous = sample + size * (diffusion * score - velocity)
            previous = previous + math.sqrt(2 * diffusion * size) * variance_noise
        else:
            previous = self._last_step(sample, velocity, score, sigma)
        previous, x0 = previous.to(dtype), x0.to(dtype)
        if not return_dict:
            return (previous, x0)
        return InterpolantSDESchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _index_of(self, timestep: float) -> int:
        index = int((self._timesteps - timestep).abs().argmin())
        if abs(self._timesteps[index].item() - timestep) > 1e-4 * self.config.num_train_timesteps:
            raise ValueError(f"Timestep {timestep} is not among the {len(self._timesteps)} that set_timesteps chose.")
        return index

    def _diffusion(self, sigma: float) -> float:
        """w(sigma)."""
        norm = self.config.diffusion_norm
        return {
            "constant": lambda: norm,
            "SBDM": lambda: norm * sigma / (1 - sigma),
            "sigma": lambda: norm * sigma,
            "decreasing": lambda: 0.25 * (norm * math.cos(math.pi * (1 - sigma)) + 1) ** 2,
            "increasing-decreasing": lambda: norm * math.sin(math.pi * sigma) ** 2,
        }[self.config.diffusion]()

    def _last_step(self, sample: Tensor, velocity: Tensor, score: Tensor, sigma: float) -> Tensor:
        drift = -velocity
        if self.config.last_step == "mean":
            drift = drift + self._diffusion(sigma) * score
        return sample + sigma * drift
