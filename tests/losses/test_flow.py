"""Flow matching: the velocity that training finds, conversions between predictions, time densities, weights."""

import math

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling

from hfgen.losses.flow import (
    TIME_DENSITIES,
    eps_to_velocity,
    flow_interpolate,
    flow_loss,
    flow_velocity,
    flow_weights,
    preconditioned_flow_loss,
    sample_sigmas,
    shift_sigmas,
    velocity_to_eps,
    velocity_to_x0,
    x0_to_velocity,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def test_velocity_of_a_two_point_problem():
    """Data -1 or 1: the best velocity is (x - m) / sigma with the posterior mean m = tanh((1 - sigma) x / sigma^2).

    A table over x is trained by gradient descent on the loss; it must find the closed form.
    """
    count, bins, sigma = 400_000, 24, torch.tensor(0.6)
    x0 = torch.randint(2, (count,), generator=generator()).float() * 2 - 1
    eps = draws(count, seed=1)
    x = flow_interpolate(x0, eps, sigma.expand(count))
    edges = torch.linspace(-1.2, 1.2, bins + 1)
    index = torch.bucketize(x, edges) - 1
    inside = (index >= 0) & (index < bins)
    x0, eps, x, index = x0[inside], eps[inside], x[inside], index[inside]
    table = torch.zeros(bins, requires_grad=True)
    share = torch.bincount(index, minlength=bins) / len(index)
    for _ in range(2):  # quadratic in each entry: one step of Newton's method arrives, the second stays
        loss = flow_loss(table[index][:, None], x0[:, None], eps[:, None]).mean()
        (gradient,) = torch.autograd.grad(loss, table)
        with torch.no_grad():
            table -= gradient / (2 * share)
    closed_form = (x - torch.tanh((1 - sigma) * x / sigma**2)) / sigma
    expected = torch.zeros(bins).index_add(0, index, closed_form) / torch.bincount(index, minlength=bins)
    assert (table.detach() - expected).abs().max() < 0.03  # 5 standard errors of a mean over one bin


def test_the_regression_optimum_is_the_conditional_mean():
    """On a finite set of equally likely pairs the loss is least at E[eps - x0 | x]."""
    x0 = torch.tensor([0.0, 1.0, 2.0, 0.0])
    eps = torch.tensor([2.0, 1.0, 0.0, 4.0])  # halfway the first three pairs meet in x = 1
    x = flow_interpolate(x0, eps, torch.full((4,), 0.5))
    points, index = x.unique(return_inverse=True)
    assert points.tolist() == [1.0, 2.0]
    prediction = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([prediction], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        flow_loss(prediction[index][:, None], x0[:, None], eps[:, None]).mean().backward()
        optimizer.step()
    expected = torch.stack([(eps - x0)[index == point].mean() for point in range(2)])
    torch.testing.assert_close(prediction.detach(), expected, rtol=0, atol=1e-3)


def test_conversions_agree():
    x0, eps, sigma = draws(5, 3, 2, seed=1), draws(5, 3, 2, seed=2), torch.linspace(0.1, 0.9, 5)
    x, velocity = flow_interpolate(x0, eps, sigma), flow_velocity(x0, eps)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(velocity_to_x0(velocity, x, sigma), x0, **close)
    torch.testing.assert_close(velocity_to_eps(velocity, x, sigma), eps, **close)
    torch.testing.assert_close(x0_to_velocity(x0, x, sigma), velocity, **close)
    torch.testing.assert_close(eps_to_velocity(eps, x, sigma), velocity, **close)
    step = 1e-3
    slope = (flow_interpolate(x0, eps, sigma + step) - flow_interpolate(x0, eps, sigma - step)) / (2 * step)
    torch.testing.assert_close(slope, velocity, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"sigma has shape \(\), expected one value for each of 5"):
        flow_interpolate(x0, eps, torch.tensor(0.5))


def test_the_preconditioned_loss_weighs_by_sigma_squared():
    x0, eps, sigma, prediction = draws(3, 8, seed=1), draws(3, 8, seed=2), torch.rand(3), draws(3, 8, seed=3)
    x = flow_interpolate(x0, eps, sigma)
    weights = flow_weights("cosmap", sigma)
    expected = flow_loss(prediction, x0, eps, weights * sigma**2)
    torch.testing.assert_close(preconditioned_flow_loss(prediction, x, x0, sigma, weights), expected)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_draws_are_those_of_diffusers(density):
    arguments = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": 1.1}
    expected = compute_density_for_timestep_sampling(density, 100, **arguments, generator=generator())
    torch.testing.assert_close(sample_sigmas(100, density, generator(), **arguments), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("density", TIME_DENSITIES)
def test_densities(density, shift):
    """In [0, 1], and distributed as the formula says: the share below the median of the unshifted draws is half."""
    sigmas = sample_sigmas(20_000, density, generator(), shift=shift)
    assert sigmas.dtype == torch.float32 and sigmas.min() >= 0 and sigmas.max() <= 1
    middle = shift_sigmas(torch.tensor(0.5), shift)
    assert abs((sigmas < middle).float().mean() - 0.5) < 0.02


def test_cosmap_density():
    """Its distribution function is 1/2 + atan(2 sigma - 1) * 2 / pi, whose derivative is the weighting."""
    sigmas = sample_sigmas(50_000, "cosmap", generator())
    for sigma in (0.1, 0.3, 0.8):
        expected = 0.5 + math.atan(2 * sigma - 1) * 2 / math.pi
        assert abs((sigmas < sigma).float().mean().item() - expected) < 0.01


def test_more_noise_for_a_positive_mean_and_a_shift():
    middle = sample_sigmas(5000, "logit_normal", generator()).mean()
    assert sample_sigmas(5000, "logit_normal", generator(), logit_mean=1.0).mean() > middle + 0.1
    assert sample_sigmas(5000, "logit_normal", generator(), shift=3.0).mean() > middle + 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": "normal"}, "'normal'.*logit_normal"),
        ({"shift": 0.0}, "shift must be above 0"),
        ({"logit_std": 0.0}, "logit_std"),
        ({"density": "mode", "mode_scale": 2.0}, r"mode_scale must be in \[-1, 1.752\]"),
    ],
)
def test_bad_densities(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_sigmas(4, **arguments)


def test_unknown_weighting():
    with pytest.raises(ValueError, match="'snr'.*sigma_sqrt"):
        flow_weights("snr", torch.rand(2))
