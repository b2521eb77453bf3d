"""Losses of Gaussian diffusion: the simple one, its weights, and the variational bound of a learned variance.

DDPM (arXiv 2006.11239), improved DDPM (arXiv 2102.09672, whose code DiT, guided diffusion and MAR share), min-SNR
weights (arXiv 2303.09556).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
_BIN = 1 / 255  # half the distance of 8-bit pixels in [-1, 1]
_TINY = 1e-12


class DiffusionProcess(Protocol):
    """What a loss asks of a scheduler, with timesteps (B,) int64; ``RespacedDDPMScheduler`` has it."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def posterior(self, original_samples: Tensor, samples: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]: ...

    def reverse(self, model_output: Tensor, samples: Tensor, timesteps: Tensor, clip: bool | None = None) -> Any: ...


@dataclass(frozen=True)
class DiffusionLoss:
    """Terms for each sample, (B,) float32.

    Attributes:
        loss: what is trained, ``weights * mse + vb``.
        mse: mean squared error of the prediction, not weighted.
        vb: the bound's term of the timestep in bits per dimension; None if no variance is learned.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor | None


def diffusion_loss(
    process: DiffusionProcess,
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weights: Tensor | None = None,
) -> DiffusionLoss:
    """The loss of a network's output at ``process.add_noise(x0, noise, timesteps)``.

    If the output has twice the channels of the samples, the second half is a variance within the learned range. It
    learns by the variational bound, whose gradient does not reach the prediction; the term has weight 1 whatever T is.

    Args:
        process: the scheduler that added the noise.
        model_output: (B, C or 2C, ...) float.
        x0: (B, C, ...) float, clean samples.
        noise: like ``x0``, standard normal.
        timesteps: (B,) int64.
        weights: (B,) of the squared errors, such as those of :func:`min_snr_weights`; None is 1, L_simple.

    Raises:
        ValueError: the output has other channels.
    """
    channels = x0.shape[1]
    if model_output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"The samples have {channels} channels, so the network's output must have {channels}, or {2 * channels} "
            f"with a learned variance; got {model_output.shape[1]}."
        )
    model_output, x0, noise = model_output.float(), x0.float(), noise.float()
    prediction = model_output[:, :channels]
    mse = _mean((prediction - process.target(x0, noise, timesteps)) ** 2)
    loss = mse if weights is None else weights * mse
    if model_output.shape[1] == channels:
        return DiffusionLoss(loss, mse, None)
    frozen = torch.cat([prediction.detach(), model_output[:, channels:]], dim=1)
    vb = variational_bound(process, frozen, x0, process.add_noise(x0, noise, timesteps), timesteps)
    return DiffusionLoss(loss + vb, mse, vb)


def variational_bound(
    process: DiffusionProcess, model_output: Tensor, x0: Tensor, samples: Tensor, timesteps: Tensor
) -> Tensor:
    """(B,) float32, the term L_t of the bound in bits per dimension, x_0 not clipped.

    It is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and for t = 0 minus the log likelihood of ``x0`` in bins of
    8-bit pixels, which the published code also takes for latents.

    Args:
        process: the scheduler.
        model_output: (B, C or 2C, ...) float32.
        x0: (B, C, ...) float32.
        samples: like ``x0``, x_t.
        timesteps: (B,) int64.
    """
    true_mean, true_log_variance = process.posterior(x0, samples, timesteps)
    reverse = process.reverse(model_output, samples, timesteps, clip=False)
    divergence = normal_kl(true_mean, true_log_variance, reverse.mean, reverse.log_variance)
    decoder = -discretized_log_likelihood(x0, reverse.mean, 0.5 * reverse.log_variance)
    return torch.where(timesteps == 0, _mean(decoder), _mean(divergence)) / math.log(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of each element, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2) ** 2 * (-log_variance2).exp())


def discretized_log_likelihood(pixels: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log probability, in nats, of the 8-bit bin around each pixel in [-1, 1]; the outer bins are open.

    The normal distribution function is the published approximation by a hyperbolic tangent.
    """
    scale = (-log_deviation).exp()
    upper = _normal_cdf(scale * (pixels - mean + _BIN))
    lower = _normal_cdf(scale * (pixels - mean - _BIN))
    inner = (upper - lower).clamp(min=_TINY).log()
    below, above = upper.clamp(min=_TINY).log(), (1 - lower).clamp(min=_TINY).log()
    return torch.where(pixels < -0.999, below, torch.where(pixels > 0.999, above, inner))


def prediction_weights(x0_weights: Tensor, snr: Tensor, prediction_type: str) -> Tensor:
    """The weights of a network's squared errors that weigh the errors of x_0 by ``x0_weights``.

    The same w(t) for any parametrisation: an error of x_0 is one of the noise divided by the square root of the
    signal-to-noise ratio, or one of v divided by that of the ratio plus one.

    Args:
        x0_weights: (B,) float.
        snr: (B,) float, abar / (1 - abar), such as ``RespacedDDPMScheduler.snr``.
        prediction_type: ``epsilon``, ``sample`` or ``v_prediction``.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}.")
    if prediction_type == "sample":
        return x0_weights
    return x0_weights / (snr if prediction_type == "epsilon" else snr + 1)


def min_snr_weights(snr: Tensor, prediction_type: str, gamma: float = 5.0) -> Tensor:
    """(B,) weights min(snr, gamma) of the errors of x_0, for the parametrisation of the network (arXiv 2303.09556).

    With ``gamma`` infinite they are 1 for a network that predicts the noise, which is L_simple.
    """
    return prediction_weights(snr.clamp(max=gamma), snr, prediction_type)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _mean(errors: Tensor) -> Tensor:
    """Over all but the first dimension."""
    return errors.flatten(1).mean(dim=1)
