"""Affine paths between data and noise, ``x = alpha x0 + sigma eps``, and what a network on them may predict.

Time is flow time: 0 is data, 1 is noise. (Papers on flow matching and interpolants often count the other way round:
their time is 1 minus ours, and their velocity the negative of ours.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOW_PATHS = ("straight", "polynomial", "vp", "linear-vp", "cosine")

_BETA_MIN, _BETA_MAX = 0.1, 20.0  # of "vp", the variance-preserving diffusion of score SDE (arXiv 2011.13456)


def even_sigmas(num_steps: int) -> list[float]:
    """The times at which steps of equal length from noise to data begin; the last of diffusers begins at 0.001."""
    return [1 - step / num_steps for step in range(num_steps)]


@dataclass(frozen=True)
class PathCoefficients:
    """``alpha`` and ``sigma`` of a path and their derivatives by time; tensors of the shape of the times."""

    alpha: Tensor
    sigma: Tensor
    alpha_derivative: Tensor
    sigma_derivative: Tensor

    def interpolate(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The point of the path between data and noise, which broadcast with the coefficients."""
        return self.alpha * x0 + self.sigma * eps

    def velocity(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The derivative of :meth:`interpolate` by time."""
        return self.alpha_derivative * x0 + self.sigma_derivative * eps

    def velocity_to_x0(self, velocity: Tensor, x: Tensor) -> Tensor:
        """The data that a velocity at ``x`` points to."""
        return (self.sigma * velocity - self.sigma_derivative * x) / self._wronskian

    def velocity_to_eps(self, velocity: Tensor, x: Tensor) -> Tensor:
        """The noise that a velocity at ``x`` comes from."""
        return (self.alpha_derivative * x - self.alpha * velocity) / self._wronskian

    @property
    def _wronskian(self) -> Tensor:
        return self.sigma * self.alpha_derivative - self.alpha * self.sigma_derivative


def path_coefficients(path: str, time: Tensor, *, power: float = 3.0) -> PathCoefficients:
    """The coefficients of a path at some times.

    With s = 1 - time:

    - ``straight``: alpha = s, sigma = 1 - s (rectified flow; conditional optimal transport)
    - ``polynomial``: alpha = s^power, sigma = 1 - s^power
    - ``vp``: alpha = exp(-T / 2), sigma = sqrt(1 - exp(-T)), T = (1 - s)^2 (20 - 0.1) / 2 + (1 - s) 0.1
    - ``linear-vp``: alpha = s, sigma = sqrt(1 - s^2)
    - ``cosine``: alpha = sin(pi s / 2), sigma = cos(pi s / 2)

    Args:
        path: its name.
        time: float tensor in [0, 1], of any shape; 0 is data. The derivatives of ``vp`` and ``linear-vp`` are infinite
            there.
        power: of ``polynomial``.

    Raises:
        ValueError: unknown path.
    """
    _check_path(path)
    s = 1 - time
    if path == "straight":
        alpha, sigma, rise = s, time, torch.ones_like(s)
        fall = -rise
    elif path == "polynomial":
        alpha, sigma = s**power, 1 - s**power
        rise = power * s ** (power - 1)
        fall = -rise
    elif path == "vp":
        exponent = 0.5 * time**2 * (_BETA_MAX - _BETA_MIN) + time * _BETA_MIN
        slope = time * (_BETA_MAX - _BETA_MIN) + _BETA_MIN
        alpha, sigma = torch.exp(-0.5 * exponent), torch.sqrt(-torch.expm1(-exponent))
        rise = 0.5 * slope * alpha
        fall = -0.5 * slope * torch.exp(-exponent) / sigma
    elif path == "linear-vp":
        alpha, sigma = s, torch.sqrt(1 - s**2)
        rise, fall = torch.ones_like(s), -s / sigma
    else:
        angle = s * (math.pi / 2)
        alpha, sigma = torch.sin(angle), torch.cos(angle)
        rise, fall = (math.pi / 2) * sigma, -(math.pi / 2) * alpha
    return PathCoefficients(alpha, sigma, -rise, -fall)  # by s so far, and time runs against it


def time_of_ratio(path: str, ratio: Tensor, *, power: float = 3.0) -> Tensor:
    """The time at which ``alpha / sigma`` of a path is ``ratio``, to sample with another path than in training.

    Raises:
        ValueError: unknown path.
    """
    _check_path(path)
    share = ratio.square() / (1 + ratio.square())  # alpha^2, where alpha^2 + sigma^2 = 1
    if path == "straight":
        return 1 / (1 + ratio)
    if path == "polynomial":
        return 1 - (ratio / (1 + ratio)) ** (1 / power)
    if path == "vp":
        difference = _BETA_MAX - _BETA_MIN
        return (torch.sqrt(_BETA_MIN**2 - 2 * difference * torch.log(share)) - _BETA_MIN) / difference
    if path == "linear-vp":
        return 1 - torch.sqrt(share)
    return 1 - torch.atan(ratio) * (2 / math.pi)


def _check_path(path: str) -> None:
    if path not in FLOW_PATHS:
        raise ValueError(f"Unknown path {path!r}; choose one of {', '.join(FLOW_PATHS)}.")
