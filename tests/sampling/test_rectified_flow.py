"""The samplers of rectified flow on flows whose paths are known."""

import math

import pytest
import torch

from hfgen.sampling.rectified_flow import euler_sample, euler_sigmas, rk45_sample, sde_sample

MEAN, STD = 0.5, 0.25


def gaussian_velocity(points, sigma):
    """The velocity between standard normal noise and data that is normal with MEAN and STD."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    noise = sigma * (points - (1 - sigma) * MEAN) / variance  # expected, given the point
    data = MEAN + (1 - sigma) * STD**2 * (points - (1 - sigma) * MEAN) / variance
    return noise - data


def noise(count):
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_adaptive_steps_reach_the_known_end_and_return():
    start = noise(64)
    end, evaluations = rk45_sample(gaussian_velocity, start, start=1.0)
    torch.testing.assert_close(end, MEAN + STD * start, rtol=0, atol=1e-4)
    back, _ = rk45_sample(gaussian_velocity, end, start=0.0, end=1.0)
    torch.testing.assert_close(back, start, rtol=0, atol=1e-4)
    assert 20 < evaluations < 200
    loose, fewer = rk45_sample(gaussian_velocity, start, start=1.0, tolerance=1e-2)
    assert fewer < evaluations and (loose - end).abs().max() < 0.2


def test_adaptive_steps_give_up_with_a_reason():
    with pytest.raises(RuntimeError, match="not finite"):
        rk45_sample(lambda points, sigma: points / 0, noise(2))
    with pytest.raises(RuntimeError, match="more than 30"):
        rk45_sample(lambda points, sigma: 1e3 * torch.sin(1e3 * points), noise(2), max_evaluations=30)


def test_euler_is_of_first_order():
    start = noise(64)
    errors = [
        (euler_sample(gaussian_velocity, start, steps, margin=0) - (MEAN + STD * start)).abs().max()
        for steps in (50, 100, 200)
    ]
    ratios = [float(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert all(1.8 < ratio < 2.2 for ratio in ratios), ratios


def test_one_step_is_the_velocity_at_the_margin():
    assert euler_sigmas(1) == [0.999]
    start = noise(4)
    torch.testing.assert_close(euler_sample(gaussian_velocity, start, 1), start - gaussian_velocity(start, 0.999))
    with pytest.raises(ValueError, match="got 0"):
        euler_sigmas(0)


def test_the_diffusion_has_about_the_marginals_of_the_flow():
    start, steps = noise(4000), 200
    draws = torch.randn(steps, 4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    still = sde_sample(gaussian_velocity, start, draws, 0.0)
    torch.testing.assert_close(still, euler_sample(gaussian_velocity, start, steps))
    moved = sde_sample(gaussian_velocity, start, draws, 1.0)
    assert (moved - still).abs().mean() > 0.05  # other samples
    assert math.isclose(moved.mean(), MEAN, abs_tol=0.1) and math.isclose(moved.std(), STD, abs_tol=0.1)
