"""Flow matching: the straight path between data and noise, the velocity on it, time densities and losses.

Flow time sigma runs from data at 0 to noise at 1, as in SD3 and the flow schedulers of diffusers (Liu et al., arXiv
2209.03003; Lipman et al., arXiv 2210.02747; Esser et al., arXiv 2403.03206). A network that is trained with these
functions is called with ``timestep = 1000 sigma``.
"""

from __future__ import annotations

import math

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

TIME_DENSITIES = ("uniform", "logit_normal", "mode", "cosmap")
LOSS_WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


def flow_interpolate(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """``(1 - sigma) x0 + sigma eps``, the point of the straight path; data and noise (B, ...), sigma (B,)."""
    sigma = _per_image(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def flow_velocity(x0: Tensor, eps: Tensor) -> Tensor:
    """``eps - x0``, the derivative of :func:`flow_interpolate` by sigma, which the network is trained to predict."""
    return eps - x0


def velocity_to_x0(velocity: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The data that a velocity (B, ...) at ``x_sigma`` and sigma (B,) points to."""
    return x_sigma - _per_image(sigma, x_sigma) * velocity


def velocity_to_eps(velocity: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a velocity (B, ...) at ``x_sigma`` and sigma (B,) comes from."""
    return x_sigma + (1 - _per_image(sigma, x_sigma)) * velocity


def x0_to_velocity(x0: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of a predicted x0; sigma (B,) above 0."""
    return (x_sigma - x0) / _per_image(sigma, x_sigma)


def eps_to_velocity(eps: Tensor, x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of a predicted eps; sigma (B,) below 1."""
    return (eps - x_sigma) / (1 - _per_image(sigma, x_sigma))


def logit_normal_sigmas(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """``sigmoid(mean + std n)`` of standard normal draws; a mean above 0 favours noise.

    Mean -1.2 and standard deviation 1.2 are EDM's noise levels (Karras et al., arXiv 2206.00364), which the flow
    matching library calls skewed times.
    """
    return torch.sigmoid(mean + std * normal)


def mode_sigmas(uniform: Tensor, scale: float = 1.29) -> Tensor:
    """The density of SD3 with a mode at 1/2 (its equation 20): ``1 - u - scale (cos(pi u / 2)^2 - 1 + u)``."""
    return 1 - uniform - scale * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)


def cosmap_sigmas(uniform: Tensor) -> Tensor:
    """The density ``2 / (pi (1 - 2 sigma + 2 sigma^2))``, uniform in the angle of a cosine schedule (SD3, eq. 21)."""
    angle = uniform * (math.pi / 2)
    return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """``shift sigma / (1 + (shift - 1) sigma)``: more noise for larger images (SD3, equation 23); 1 is off."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigmas(
    batch_size: int,
    density: str = "logit_normal",
    generator: torch.Generator | None = None,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    shift: float = 1.0,
) -> Tensor:
    """Flow times of a training step.

    Args:
        batch_size: B.
        density: "uniform"; "logit_normal", see :func:`logit_normal_sigmas`; "mode", see :func:`mode_sigmas`; "cosmap",
            see :func:`cosmap_sigmas`. The draw is sigma itself, as in the papers; the training scripts of diffusers
            turn it around and count from the noise.
        generator: of the draws; the result is on its device.
        logit_mean, logit_std: of "logit_normal".
        mode_scale: of "mode", in [-1, 1.752], where the map is monotonic.
        shift: applied to the draws, see :func:`shift_sigmas`.

    Returns:
        (B,) float32 in [0, 1].

    Raises:
        ValueError: an unknown density, or a parameter out of range.
    """
    if density not in TIME_DENSITIES:
        raise ValueError(f"Unknown time density {density!r}; choose one of {', '.join(TIME_DENSITIES)}.")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be above 0 (1 is off), got {shift}.")
    if logit_std <= 0:
        raise ValueError(f"logit_std must be above 0, got {logit_std}.")
    if not -1 <= mode_scale <= 2 / (math.pi - 2):
        raise ValueError(f"mode_scale must be in [-1, {2 / (math.pi - 2):.3f}], got {mode_scale}.")
    device = None if generator is None else generator.device
    draw = torch.randn if density == "logit_normal" else torch.rand
    draws = draw(batch_size, generator=generator, device=device)
    sigmas = {
        "uniform": lambda: draws,
        "logit_normal": lambda: logit_normal_sigmas(draws, logit_mean, logit_std),
        "mode": lambda: mode_sigmas(draws, mode_scale),
        "cosmap": lambda: cosmap_sigmas(draws),
    }[density]()
    return shift_sigmas(sigmas, shift)


def flow_weights(weighting: str, sigma: Tensor) -> Tensor:
    """The weight of each image in the loss, (B,) float32.

    Args:
        weighting: "none"; "sigma_sqrt": ``sigma^-2``; "cosmap": ``2 / (pi (1 - 2 sigma + 2 sigma^2))``.
        sigma: (B,) in (0, 1].

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting not in LOSS_WEIGHTINGS:
        raise ValueError(f"Unknown loss weighting {weighting!r}; choose one of {', '.join(LOSS_WEIGHTINGS)}.")
    return compute_loss_weighting_for_sd3(weighting, sigma.float())


def flow_loss(prediction: Tensor, x0: Tensor, eps: Tensor, weights: Tensor | None = None) -> Tensor:
    """The flow matching loss: mean squared error of the velocity.

    Args:
        prediction: velocity (B, ...).
        x0, eps: data and noise of that shape.
        weights: (B,), such as those of :func:`flow_weights`.

    Returns:
        (B,) float32: the weighted mean over the elements of each image.
    """
    error = (prediction.float() - flow_velocity(x0.float(), eps.float())).square().flatten(1).mean(dim=1)
    return error if weights is None else weights * error


def preconditioned_flow_loss(
    prediction: Tensor, x_sigma: Tensor, x0: Tensor, sigma: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean squared error of the data that the predicted velocity points to: :func:`flow_loss` times ``sigma^2``.

    Args:
        prediction: velocity (B, ...).
        x_sigma, x0: noisy and clean data of that shape.
        sigma: (B,).
        weights: (B,), such as those of :func:`flow_weights`.

    Returns:
        (B,) float32.
    """
    denoised = velocity_to_x0(prediction.float(), x_sigma.float(), sigma.float())
    error = (denoised - x0.float()).square().flatten(1).mean(dim=1)
    return error if weights is None else weights * error


def _per_image(sigma: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to be multiplied with ``like`` (B, ...)."""
    if sigma.shape != like.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}, expected one value for each of {len(like)} images.")
    return sigma.reshape(-1, *(1 for _ in like.shape[1:]))
