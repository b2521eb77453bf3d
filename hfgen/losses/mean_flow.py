"""MeanFlow (Geng et al., arXiv 2505.13447): the average velocity of an interval, learned from its own derivative.

Time t is 1 for noise and 0 for data, z_t = (1 - t) x0 + t eps, and v = eps - x0. The network u(z, r, t) stands for the
mean of the velocity over [r, t]. Differentiating (t - r) u by t at fixed r gives the MeanFlow identity (eq. 6)

    u = v - (t - r) du/dt,    du/dt = (d_z u) v + d_t u,

whose right side, with the gradient stopped, is the target. Batches are (B, C, H, W); times are (B,) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TIME_DENSITIES = ("logit_normal", "uniform")


@dataclass
class MeanFlowOutput:
    """What :func:`mean_flow_loss` returns; all but ``loss`` are without gradient, for the log.

    Attributes:
        loss: a scalar. With ``norm_power`` 1 its value is always near 1: watch ``squared_error``.
        squared_error: (B,), of the prediction against the target, summed over elements.
        velocity_error: (B,), of the prediction against eps - x0.
        prediction, target, velocity, derivative: u, its target, the guided velocity and du/dt, each (B, C, H, W); the
            last one is 0 where r = t.
    """

    loss: Tensor
    squared_error: Tensor
    velocity_error: Tensor
    prediction: Tensor
    target: Tensor
    velocity: Tensor
    derivative: Tensor


def mean_flow_loss(
    model: Callable[..., object],
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    r: Tensor,
    class_labels: Tensor,
    *,
    network: nn.Module | None = None,
    dropped: Tensor | None = None,
    omega: float = 1.0,
    kappa: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    norm_power: float = 1.0,
    norm_eps: float = 0.01,
) -> MeanFlowOutput:
    """The objective of the official code: algorithm 1 of the paper, guidance in training, adaptive weights.

    The prediction is one ordinary call of ``model``; its derivative comes from a second pass of ``network`` without
    gradients, which costs less memory than one pass with both.

    Args:
        model: a :class:`~hfgen.models.generators.dit.DiT` with ``has_duration``, also wrapped for training.
        x0: clean latents or pixels.
        eps: standard normal noise.
        t, r: the interval, 0 <= r <= t <= 1, see :func:`sample_interval`.
        class_labels: (B,) int64.
        network: the same model without its wrapper, which forward-mode derivatives cannot pass; ``model`` by default.
        dropped: (B,) boolean, the items that are trained without class and guidance, see :func:`drop_first`.
        omega, kappa: guidance in training, of effective scale omega / (1 - kappa); see :func:`guided_velocity`.
        guidance_interval: times t for which there is guidance.
        norm_power, norm_eps: p and c of the weights 1 / (squared error + c)^p; p = 0 is the plain squared error.

    Returns:
        The mean loss over the batch and its parts.

    Raises:
        ValueError: times that are no intervals in [0, 1].
    """
    network = model if network is None else network
    if ((r < 0) | (t < r) | (t > 1)).any():
        raise ValueError("Each interval must satisfy 0 <= r <= t <= 1; sample_interval draws such t and r.")
    null_label = network.config.num_classes
    z, velocity = x0 + _like(t, x0) * (eps - x0), eps - x0
    guided = guided_velocity(
        network, z, velocity, t, class_labels, omega=omega, kappa=kappa, interval=guidance_interval
    )
    if dropped is not None:
        guided = torch.where(_like(dropped, x0), velocity, guided)
        class_labels = torch.where(dropped, null_label, class_labels)
    # Where the interval is a point the target does not contain the derivative, which is the costly part of the step.
    moves, derivative = t > r, torch.zeros_like(guided)
    if moves.any():
        part = total_derivative(network, z[moves], t[moves], r[moves], class_labels[moves], guided[moves])
        derivative[moves] = part.to(derivative.dtype)
    target = guided - _like((t - r).clamp(0, 1), x0) * derivative
    prediction = model(z, t, class_labels, t - r, return_dict=False)[0]

    squared_error = _sum((prediction - target).square())
    loss = (squared_error / (squared_error.detach() + norm_eps) ** norm_power).mean()
    prediction = prediction.detach()
    return MeanFlowOutput(
        loss=loss,
        squared_error=squared_error.detach(),
        velocity_error=_sum((prediction - velocity).square()),
        prediction=prediction,
        target=target,
        velocity=guided,
        derivative=derivative,
    )


@torch.no_grad()
def guided_velocity(
    network: nn.Module,
    z: Tensor,
    velocity: Tensor,
    t: Tensor,
    class_labels: Tensor,
    *,
    omega: float,
    kappa: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """The velocity field with guidance that the network is to learn (section 4.2 and appendix B.1).

    ``omega v + kappa u(z, t, t | class) + (1 - omega - kappa) u(z, t, t | no class)``, and ``v`` for times outside of
    ``interval``. The network's own predictions are taken as they are, without gradient.

    Args:
        network: the unwrapped network.
        z: (B, C, H, W), noisy at the times ``t``.
        velocity: v.
        t: (B,).
        class_labels: (B,) int64.
        omega, kappa: 1 and 0 are no guidance.
        interval: first and last time with guidance.

    Returns:
        (B, C, H, W).
    """
    weights = {"class": kappa, "none": 1 - omega - kappa}
    labels = {"class": class_labels, "none": torch.full_like(class_labels, network.config.num_classes)}
    used = [name for name, weight in weights.items() if weight]
    if not used:
        return velocity
    repeats = len(used)
    zero = torch.zeros_like(t)
    predictions = network(
        z.repeat(repeats, 1, 1, 1),
        t.repeat(repeats),
        torch.cat([labels[name] for name in used]),
        zero.repeat(repeats),
        return_dict=False,
    )[0].chunk(repeats)
    guided = omega * velocity + sum(weights[name] * prediction for name, prediction in zip(used, predictions))
    inside = (interval[0] <= t) & (t <= interval[1])
    return torch.where(_like(inside, z), guided, velocity)


@torch.no_grad()
def total_derivative(
    network: nn.Module, z: Tensor, t: Tensor, r: Tensor, class_labels: Tensor, velocity: Tensor
) -> Tensor:
    """``du/dt = (d_z u) velocity + d_t u`` at fixed r, as one Jacobian-vector product in forward mode.

    Args:
        network: the unwrapped network.
        z: (B, C, H, W).
        t, r: (B,).
        class_labels: (B,) int64.
        velocity: dz/dt, (B, C, H, W).

    Returns:
        (B, C, H, W), without gradient.
    """

    def average_velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(z, t, class_labels, t - r, return_dict=False)[0]

    # The fused attention kernels have no forward-mode derivative.
    # Nor do compiled blocks; the same weights run as they were written.
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
        tangents = (velocity.to(z.dtype), torch.ones_like(t), torch.zeros_like(r))
        return torch.func.jvp(average_velocity, (z, t, r), tangents)[1]


def sample_interval(
    batch_size: int,
    *,
    density: str = "logit_normal",
    logit_mean: float = -0.4,
    logit_std: float = 1.0,
    equal_share: float = 0.75,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The times t and r of a batch.

    Args:
        batch_size: B.
        density: of both times before they are ordered: ``logit_normal`` or ``uniform``.
        logit_mean, logit_std: of the normal distribution whose sigmoid is ``logit_normal``.
        equal_share: share of the batch with r = t, which is trained on the velocity itself.
        generator: where the draws come from.
        device: of the result.

    Returns:
        t and r, (B,) float32 with 0 <= r <= t <= 1.

    Raises:
        ValueError: an unknown density or a share outside of [0, 1].
    """
    if density not in TIME_DENSITIES:
        raise ValueError(f"Unknown time density {density!r}; choose one of {', '.join(TIME_DENSITIES)}.")
    where = device if generator is None else generator.device
    if density == "uniform":
        draws = torch.rand(2, batch_size, generator=generator, device=where)
    else:
        draws = torch.randn(2, batch_size, generator=generator, device=where)
        draws = (logit_mean + logit_std * draws).sigmoid()
    return order_times(*draws.to(device=device), equal_share)


def order_times(first: Tensor, second: Tensor, equal_share: float) -> tuple[Tensor, Tensor]:
    """The later of two times (B,) as t and the earlier as r, which is t for the first int(B ``equal_share``) items.

    Raises:
        ValueError: a share outside of [0, 1].
    """
    if not 0 <= equal_share <= 1:
        raise ValueError(f"equal_share must lie in [0, 1], got {equal_share}.")
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    equal = torch.arange(len(t), device=t.device) < int(len(t) * equal_share)
    return t, torch.where(equal, t, r)


def drop_first(draws: Tensor, probability: float) -> Tensor:
    """(B,) boolean: as many of the first items as there are ``draws`` in [0, 1) below ``probability``.

    The official code drops labels in this way, so that they are dropped where r = t only. It is fair if the order of
    the items is random.
    """
    count = (draws < probability).sum()
    return torch.arange(len(draws), device=draws.device) < count


def trajectory_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, eps: Tensor, num_steps: int
) -> Tensor:
    """Squared error of the end of the whole trajectory, which Euler steps through the network reach from the noise.

    Not MeanFlow, but the naive way to a one-step model: ``|| x0 - (eps - integral of v dt) ||^2``. Warning: with noise
    and data paired at random its minimum is the mean of the data, whatever the noise, so all samples collapse to one
    image of each class. It is of use for coupled pairs only, such as noise and images of a trained flow (reflow).

    Args:
        velocity: (x, sigma) -> velocity, with x (B, C, H, W) and sigma (B,) from 1 down to 1 / ``num_steps``.
        x0: (B, C, H, W), the data that belong to ``eps``.
        eps: noise.
        num_steps: Euler steps, through all of which the gradient flows; 1 is regression on the noise.

    Returns:
        (B,), means over the elements.

    Raises:
        ValueError: less than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    x = eps
    for step in range(num_steps, 0, -1):
        sigma = torch.full((len(eps),), step / num_steps, device=eps.device)
        x = x - velocity(x, sigma) / num_steps
    return (x - x0).square().flatten(1).mean(dim=1)


def _like(values: Tensor, images: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.view(-1, *([1] * (images.ndim - 1)))


def _sum(errors: Tensor) -> Tensor:
    return errors.float().flatten(1).sum(dim=1)
