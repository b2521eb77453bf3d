"""DDPM and DDIM steps over a part of the training timesteps, in the arithmetic of the published samplers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hfgen.sampling.gaussian_diffusion import (
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    GaussianDiffusion,
    diffusion_betas,
    respaced_timesteps,
    spaced_timesteps,
)
from hfgen.schedulers.base import HFGenScheduler

ALGORITHMS = ("ddpm", "ddim")
REVERSE_VARIANCES = ("learned_range", "fixed_small", "fixed_large")
_MAX_TIMESTEPS = 100_000


@dataclass
class RespacedDDPMSchedulerOutput(SchedulerOutput):
    """What a step returns.

    Attributes:
        prev_sample: like the sample, the input of the next step.
        pred_original_sample: like the sample, x_0 as predicted, clipped if the scheduler clips.
    """

    pred_original_sample: Tensor


@dataclass(frozen=True)
class ReverseDistribution:
    """p(x_{t-1} | x_t), each tensor like the sample: ``mean``, ``log_variance`` and the ``x0`` that they stand on."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


class RespacedDDPMScheduler(HFGenScheduler):
    """The diffusion of guided diffusion (arXiv 2105.05233), DiT (arXiv 2212.09748) and MAR (arXiv 2406.11838).

    Unlike ``diffusers.DDPMScheduler`` it has float64 tables, the published respacings (a copy of the process with its
    own betas, which the learned variance is measured in) and the published variance of the last step. Configurations
    can be exchanged: ``DPMSolverMultistepScheduler.from_config(scheduler.config)`` samples the same network, without
    the learned variance.

    Networks are called with the timesteps of training, 0 to ``num_train_timesteps`` - 1. Their output has the channels
    of the sample, or twice as many with ``learned_range``: the prediction, then the variance.

    Args:
        num_train_timesteps: T.
        beta_start: first beta; the cosine schedule has none.
        beta_end: last beta.
        beta_schedule: ``linear``, ``scaled_linear`` or ``squaredcos_cap_v2``, see
            :func:`hfgen.sampling.gaussian_diffusion.diffusion_betas`.
        prediction_type: what the network predicts: ``epsilon``, ``sample`` (x_0) or ``v_prediction``.
        reverse_variance: ``learned_range``, ``fixed_small`` (that of the posterior) or ``fixed_large`` (beta). It is
            not called variance_type, so that solvers of diffusers that are made from this configuration do not take
            it for theirs: the pipeline gives them no variance channels.
        clip_sample: whether x_0 is clipped in sampling, for pixels.
        clip_sample_range: to plus or minus this.
        algorithm: ``ddpm`` (ancestral) or ``ddim`` (arXiv 2010.02502).
        eta: noise of DDIM, 0 is deterministic.
        timestep_spacing: ``linspace``, ``leading`` or ``trailing``: the timesteps of a number of steps, see
            :func:`hfgen.sampling.gaussian_diffusion.spaced_timesteps`.
        respacing: the timesteps if no number is given, see
            :func:`hfgen.sampling.gaussian_diffusion.respaced_timesteps`; None keeps all.

    Raises:
        ValueError: an unknown name or a number out of range.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            "dit": {"respacing": "250"},
            "mar": {"beta_schedule": "squaredcos_cap_v2", "respacing": "100"},
            "guided-diffusion": {"clip_sample": True, "respacing": "250"},
            "guided-diffusion-64": {
                "beta_schedule": "squaredcos_cap_v2",
                "clip_sample": True,
                "respacing": "250",
            },
        }
    )

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        reverse_variance: str = "learned_range",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        algorithm: str = "ddpm",
        eta: float = 0.0,
        timestep_spacing: str = "linspace",
        respacing: str | None = None,
    ):
        choices = (
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("reverse_variance", reverse_variance, REVERSE_VARIANCES),
            ("algorithm", algorithm, ALGORITHMS),
            ("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS),
        )
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
        if not 1 <= num_train_timesteps <= _MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps must be between 1 and {_MAX_TIMESTEPS}, got {num_train_timesteps}.")
        if clip_sample_range <= 0:
            raise ValueError(f"clip_sample_range must be above 0, got {clip_sample_range}.")
        _check_eta(eta)
        self.process = GaussianDiffusion(diffusion_betas(beta_schedule, num_train_timesteps, beta_start, beta_end))
        self.set_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        respacing: str | None = None,
    ) -> None:
        """Choose the timesteps of sampling; they are then in ``timesteps``, (S,) int64, descending.

        Args:
            num_inference_steps: so many, spaced as ``timestep_spacing`` says.
            device: of ``timesteps``.
            respacing: another way to say which; None takes that of the configuration if no number is given.

        Raises:
            ValueError: both are given, too many timesteps, or an unknown respacing.
        """
        num_train = self.config.num_train_timesteps
        if num_inference_steps is not None and respacing is not None:
            raise ValueError(
                f"Give num_inference_steps ({num_inference_steps}) or respacing ({respacing!r}), not both."
            )
        respacing = self.config.respacing if respacing is None else respacing
        if num_inference_steps is not None:
            kept = spaced_timesteps(self.config.timestep_spacing, num_inference_steps, num_train)
        elif respacing is not None:
            kept = respaced_timesteps(respacing, num_train)
        else:
            kept = list(range(num_train))
        self.num_inference_steps = len(kept)
        self.respaced = self.process.respaced(kept)
        self._index = {timestep: index for index, timestep in enumerate(kept)}
        # Built on the CPU also where models are made without memory, since they are looked at.
        self.timesteps = torch.tensor(kept[::-1], device="cpu").to(device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is; other schedulers of diffusers scale it."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean samples (B, ...) and standard normal noise, at ``timesteps`` (B,) int64 of training."""
        return self.process.add_noise(original_samples, noise, timesteps)

    def target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is trained to predict, like the samples."""
        return self.process.target(self.config.prediction_type, original_samples, noise, timesteps)

    def snr(self, timesteps: Tensor) -> Tensor:
        """The ratio abar / (1 - abar) of signal to noise of ``timesteps`` (B,), (B,) float32."""
        return self.process.snr(timesteps)

    def posterior(self, original_samples: Tensor, samples: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0) over all timesteps of training."""
        return self.process.posterior(original_samples, samples, timesteps)

    def reverse(
        self, model_output: Tensor, samples: Tensor, timesteps: Tensor, clip: bool | None = None
    ) -> ReverseDistribution:
        """p(x_{t-1} | x_t) over all timesteps of training, such as the variational bound compares.

        Args:
            model_output: (B, C or 2C, ...) float.
            samples: (B, C, ...) float, x_t.
            timesteps: (B,) int64.
            clip: instead of ``clip_sample``.
        """
        clip = self.config.clip_sample if clip is None else clip
        return self._reverse(self.process, model_output, samples, timesteps, clip)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        eta: float | None = None,
        temperature: float = 1.0,
        score: Tensor | None = None,
        return_dict: bool = True,
    ) -> RespacedDDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_t to the timestep before it among those of :meth:`set_timesteps`.

        Args:
            model_output: (B, C or 2C, ...) float.
            timestep: one of ``timesteps``.
            sample: (B, C, ...) float, x_t.
            generator: of the noise; a list has one for each sample.
            variance_noise: like the sample, standard normal noise to use instead.
            eta: of DDIM, instead of that of the configuration.
            temperature: the noise is multiplied by it (MAR).
            score: like the sample, the gradient of a classifier's log probability at x_t times its scale: DDPM adds it
                to the mean (arXiv 2105.05233, algorithm 1), DDIM takes it off the noise (algorithm 2). What is
                returned as x_0 is unguided for DDPM and guided, and not clipped again, for DDIM.
            return_dict: return a :class:`RespacedDDPMSchedulerOutput` instead of a tuple.

        Raises:
            ValueError: not such a timestep, wrong channels, or ``eta`` for DDPM.
        """
        timestep = int(timestep)
        if timestep not in self._index:
            raise ValueError(f"Timestep {timestep} is not among the {len(self._index)} that set_timesteps chose.")
        if eta is not None and self.config.algorithm != "ddim":
            raise ValueError(f"eta is {eta}, but the algorithm is ddpm, which has none; use algorithm='ddim'.")
        index, dtype = self._index[timestep], sample.dtype
        sample = sample.float()
        clip = self.config.clip_sample
        reverse = self._reverse(self.respaced, model_output, sample, index, clip)
        x0, score = reverse.x0, None if score is None else score.float()
        if self.config.algorithm == "ddim":
            mean, deviation, x0 = self._ddim(x0, sample, index, self.config.eta if eta is None else eta, score)
        else:
            mean, deviation = reverse.mean, (0.5 * reverse.log_variance).exp()
            if score is not None:
                mean = mean + reverse.log_variance.exp() * score
        # The last step has no noise, and DDIM without eta never has.
        if index > 0 and not (isinstance(deviation, float) and deviation == 0):
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
            mean = mean + temperature * deviation * variance_noise
        previous, x0 = mean.to(dtype), x0.to(dtype)
        if not return_dict:
            return (previous, x0)
        return RespacedDDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _reverse(
        self, process: GaussianDiffusion, model_output: Tensor, sample: Tensor, index: int | Tensor, clip: bool
    ) -> ReverseDistribution:
        prediction, variance = self._split(model_output.float(), sample)
        x0 = process.to_x0(self.config.prediction_type, prediction, sample, index)
        if clip:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        mean, log_variance = process.posterior(x0, sample, index)
        if variance is not None:
            log_variance = process.learned_log_variance(variance, index)
        elif self.config.reverse_variance == "fixed_large":
            log_variance = process.large_log_variance(sample, index)
        return ReverseDistribution(mean, log_variance, x0)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        learned = self.config.reverse_variance == "learned_range"
        channels = sample.shape[1]
        expected = (sample.shape[0], channels * (1 + learned), *sample.shape[2:])
        if model_output.shape != expected:
            raise ValueError(
                f"With reverse_variance={self.config.reverse_variance!r} and samples of shape {tuple(sample.shape)} "
                f"the network's output must have shape {expected}, got {tuple(model_output.shape)}: "
                + ("prediction and variance." if learned else "leave out variance channels, or use 'learned_range'.")
            )
        return (model_output[:, :channels], model_output[:, channels:]) if learned else (model_output, None)

    def _ddim(
        self, x0: Tensor, sample: Tensor, index: int, eta: float, score: Tensor | None
    ) -> tuple[Tensor, float, Tensor]:
        """Mean, standard deviation and x_0 of a DDIM step (arXiv 2010.02502, eq. 12 and 16)."""
        _check_eta(eta)
        process = self.respaced
        abar, previous = process.alphas_cumprod[index].item(), process.alphas_cumprod_prev[index].item()
        epsilon = process.to_epsilon(x0, sample, index)  # of the clipped x_0
        if score is not None:
            epsilon = epsilon - (1 - abar) ** 0.5 * score
            x0 = process.to_x0("epsilon", epsilon, sample, index)
            epsilon = process.to_epsilon(x0, sample, index)
        deviation = eta * ((1 - previous) / (1 - abar) * (1 - abar / previous)) ** 0.5
        mean = previous**0.5 * x0 + (1 - previous - deviation**2) ** 0.5 * epsilon
        return mean, deviation, x0


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (deterministic) and 1 (the noise of DDPM), got {eta}.")
