"""The samplers of the rectified flow repository (Liu et al., arXiv 2209.03003) for any flow network.

The flow time sigma runs from noise at 1 to data at 0, and a velocity is a function of points (B, ...) and one sigma
for all of them, a plain number. The official code never evaluates a network closer to the noise than ``margin``: its
Euler steps cover the whole way, but look at the velocity at ``(1 - margin) (1 - i / N)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]

MARGIN = 1e-3

# Dormand and Prince's method of order 5 with an error estimate of order 4.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
_WEIGHTS = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
_SAFETY, _SMALLEST_FACTOR, _LARGEST_FACTOR = 0.9, 0.2, 10.0


def euler_sigmas(num_steps: int, margin: float = MARGIN) -> list[float]:
    """Where the official Euler sampler evaluates the network, from ``1 - margin`` down.

    Raises:
        ValueError: ``num_steps`` below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    return [(1 - margin) * (1 - step / num_steps) for step in range(num_steps)]


def euler_sample(velocity: Velocity, noise: Tensor, num_steps: int, *, margin: float = MARGIN) -> Tensor:
    """Data (B, ...) of the noise by Euler steps of equal length; one step is the sampler of distilled networks."""
    points = noise
    for sigma in euler_sigmas(num_steps, margin):
        points = points - velocity(points, sigma) / num_steps
    return points


def sde_sample(
    velocity: Velocity, noise: Tensor, draws: Sequence[Tensor], strength: float, *, margin: float = MARGIN
) -> Tensor:
    """Data of the noise by Euler-Maruyama steps of a diffusion along the flow.

    The drift is that of the official code, under which the marginal distributions are only about those of the flow;
    with :class:`hfgen.InterpolantSDEScheduler` they are the same.

    Args:
        velocity: of the flow.
        noise: (B, ...) standard normal.
        draws: fresh standard normal noise for each step, of the shape of ``noise``.
        strength: diffusion coefficient over sigma, ``sigma_variance`` of the official code; 0 is the Euler sampler.
        margin: see above.
    """
    num_steps, points = len(draws), noise
    for sigma, draw in zip(euler_sigmas(num_steps, margin), draws, strict=True):
        forward = -velocity(points, sigma)  # towards the data
        time = 1 - sigma
        drift = 0.5 * time * sigma * forward - 0.5 * (1 + sigma) * points
        forward = forward + 0.5 * strength**2 * drift
        points = points + forward / num_steps + strength * sigma / math.sqrt(num_steps) * draw
    return points


def rk45_sample(
    velocity: Velocity,
    points: Tensor,
    *,
    start: float = 1 - MARGIN,
    end: float = 0.0,
    tolerance: float = 1e-5,
    max_evaluations: int = 10_000,
) -> tuple[Tensor, int]:
    """Follow the flow by Dormand and Prince's method with adaptive steps, those of ``scipy.integrate.solve_ivp``.

    All images take the same steps, whose error is the root mean square over the batch: within the tolerance an image
    depends on what else is in its batch.

    Args:
        velocity: of the flow.
        points: (B, ...) at the time ``start``.
        start, end: flow times; from 1 - margin to 0 noise becomes data, from 0 to 1 - margin data becomes noise.
        tolerance: relative and absolute tolerance of each step.
        max_evaluations: of the network.

    Returns:
        The points (B, ...) at the time ``end`` and the number of evaluations.

    Raises:
        RuntimeError: too many evaluations, or a velocity that is not finite.
    """
    dtype, direction = points.dtype, math.copysign(1.0, end - start)
    # The sum of many short steps, and differences of about the tolerance, need more digits than the network.
    points = points.to(torch.float32 if points.device.type == "mps" else torch.float64)

    def derivative(points: Tensor, time: float) -> Tensor:
        return velocity(points.to(dtype), time).to(points.dtype)

    time, slope = start, derivative(points, start)
    length = _first_step(derivative, points, slope, start, end, tolerance)
    evaluations, rejected = 2, False
    while direction * (end - time) > 0:
        length = min(length, direction * (end - time))
        step = direction * length
        slopes = [slope]
        for node, stage in zip(_NODES[1:], _STAGES[1:]):
            slopes.append(derivative(points + step * _combine(stage, slopes), time + node * step))
        proposal = points + step * _combine(_WEIGHTS, slopes)
        after = end if length == direction * (end - time) else time + step
        slopes.append(derivative(proposal, after))
        evaluations += len(_NODES)
        scale = tolerance * (1 + torch.maximum(points.abs(), proposal.abs()))
        error = _norm(length * _combine(_ERROR, slopes) / scale)
        if not math.isfinite(error) or evaluations > max_evaluations:
            reason = "is not finite" if not math.isfinite(error) else f"needs more than {max_evaluations} evaluations"
            raise RuntimeError(f"The flow {reason} near sigma = {time:.4g}; check the network or raise tolerance.")
        factor = _SAFETY * error**-0.2 if error > 0 else _LARGEST_FACTOR
        if error < 1:
            points, slope, time = proposal, slopes[-1], after
            length *= min(1.0 if rejected else _LARGEST_FACTOR, factor)
        else:
            length *= max(_SMALLEST_FACTOR, factor)
        rejected = error >= 1
    return points.to(dtype), evaluations


def _first_step(
    velocity: Velocity, points: Tensor, slope: Tensor, start: float, end: float, tolerance: float
) -> float:
    """Hairer, Norsett and Wanner's estimate (Solving Ordinary Differential Equations I, section II.4)."""
    direction, longest = math.copysign(1.0, end - start), abs(end - start)
    scale = tolerance * (1 + points.abs())
    size, speed = _norm(points / scale), _norm(slope / scale)
    if not math.isfinite(speed):
        return longest  # its error is not finite either
    guess = min(1e-6 if min(size, speed) < 1e-5 else 0.01 * size / speed, longest)
    trial = velocity(points + direction * guess * slope, start + direction * guess)
    bend = _norm((trial - slope) / scale) / guess
    fastest = max(speed, bend)
    refined = max(1e-6, guess * 1e-3) if fastest <= 1e-15 else (0.01 / fastest) ** 0.2
    return min(100 * guess, refined, longest)


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return sum(weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)


def _norm(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
