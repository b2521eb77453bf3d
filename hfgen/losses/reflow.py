"""Reflow and distillation (Liu et al., arXiv 2209.03003): training on noise and the images that a flow made of it.

A k-rectified flow is trained with :func:`hfgen.losses.flow.flow_loss` on such pairs at uniform times; its paths are
straighter than those of the flow that made the pairs. Distillation looks at the few times only at which a sampler of
few steps will. Flow time and velocity are those of :mod:`hfgen.losses.flow`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from hfgen.losses.flow import flow_loss

DISTANCES = ("l2", "lpips", "lpips+l2")


def reflow_sigmas(uniform: Tensor, num_steps: int | None = None, *, margin: float = 1e-3) -> Tensor:
    """Flow times of a training step on pairs.

    Args:
        uniform: (B,) uniform draws in [0, 1).
        num_steps: None for reflow, where all times are trained; N for distillation to N Euler steps, where only their
            first points are, 1 for those that start from noise; 0 for the reverse, one step from data to noise.
        margin: the network is not trained closer to the noise than this.

    Returns:
        (B,) in [0, 1 - margin].

    Raises:
        ValueError: a negative number of steps.
    """
    if num_steps is None:
        progress = uniform
    elif num_steps == 0:
        progress = torch.ones_like(uniform)
    elif num_steps > 0:
        progress = (uniform * num_steps).floor() / num_steps
    else:
        raise ValueError(f"num_steps must be None, 0 or above, got {num_steps}.")
    return (1 - margin) * (1 - progress)


def one_step_loss(
    velocity: Tensor,
    images: Tensor,
    noise: Tensor,
    *,
    distance: Literal["l2", "lpips", "lpips+l2"] = "l2",
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How far the image that one step from the noise reaches is from the image of the pair.

    Args:
        velocity: prediction (B, C, H, W) at the noise.
        images, noise: the pairs, of that shape.
        distance: "l2" is the mean square, "lpips" the perceptual distance, which the paper prefers, or their sum.
        perceptual: distance (B,) of two batches of pixels in [-1, 1]; needed unless the distance is "l2".
        decode: latents to pixels for the perceptual distance; None if the images are pixels.

    Returns:
        (B,) float32.

    Raises:
        ValueError: an unknown distance, or one without ``perceptual``.
    """
    if distance not in DISTANCES:
        raise ValueError(f"Unknown distance {distance!r}; choose one of {', '.join(DISTANCES)}.")
    if distance == "l2":
        return flow_loss(velocity, images, noise)
    if perceptual is None:
        raise ValueError(f"The distance {distance!r} needs a perceptual loss, such as hfgen.losses.perceptual.LPIPS.")
    reached, goal = (noise - velocity).float(), images.float()
    if decode is not None:
        reached, goal = decode(reached), decode(goal)
    loss = perceptual(reached, goal)
    return loss + flow_loss(velocity, images, noise) if distance == "lpips+l2" else loss


@torch.no_grad()
def straightness(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int, *, margin: float = 1e-3
) -> Tensor:
    """How bent the paths of a flow are: the mean of ``|(Z_1 - Z_0) - v(Z_t)|^2`` along each path; 0 if it is straight.

    Args:
        velocity: of points (B, ...) and one sigma for all of them.
        noise: (B, ...), where the paths begin.
        num_steps: Euler steps that follow them and over which the mean is taken.
        margin: the velocity is taken at ``(1 - margin) (1 - i / num_steps)``.

    Returns:
        (B,) the sum over the elements of an image; divide by their number to compare images of different sizes.
    """
    points, velocities = noise, []
    for step in range(num_steps):
        velocities.append(velocity(points, (1 - margin) * (1 - step / num_steps)))
        points = points - velocities[-1] / num_steps
    way = noise - points
    return torch.stack([(way - each).square().flatten(1).sum(dim=1) for each in velocities]).mean(dim=0)
