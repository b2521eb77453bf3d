"""Affine paths: ends, derivatives by finite differences, conversions, and the time of a signal-to-noise ratio."""

import pytest
import torch

from hfgen.losses.flow import flow_interpolate, flow_velocity
from hfgen.sampling.flow_paths import FLOW_PATHS, path_coefficients, time_of_ratio

TIMES = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)


@pytest.mark.parametrize("path", FLOW_PATHS)
def test_from_data_to_noise(path):
    ends = path_coefficients(path, torch.tensor([0.0, 1.0], dtype=torch.float64))
    noise = 0.01 if path == "vp" else 0.0  # of the data, this share is left at the end of a diffusion
    torch.testing.assert_close(ends.alpha, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=max(noise, 1e-12))
    torch.testing.assert_close(ends.sigma, torch.tensor([0.0, 1.0]).double(), rtol=0, atol=max(noise, 1e-12))


@pytest.mark.parametrize("path", FLOW_PATHS)
def test_derivatives(path):
    step = 1e-6
    before, after = path_coefficients(path, TIMES - step), path_coefficients(path, TIMES + step)
    at = path_coefficients(path, TIMES)
    torch.testing.assert_close((after.alpha - before.alpha) / (2 * step), at.alpha_derivative, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((after.sigma - before.sigma) / (2 * step), at.sigma_derivative, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", FLOW_PATHS)
def test_conversions_and_ratio(path):
    x0, eps = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = path_coefficients(path, TIMES)
    x, velocity = at.interpolate(x0, eps), at.velocity(x0, eps)
    torch.testing.assert_close(at.velocity_to_x0(velocity, x), x0)
    torch.testing.assert_close(at.velocity_to_eps(velocity, x), eps)
    torch.testing.assert_close(time_of_ratio(path, at.alpha / at.sigma), TIMES)


def test_the_straight_path_is_that_of_the_loss():
    x0, eps = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = path_coefficients("straight", TIMES)
    torch.testing.assert_close(at.interpolate(x0, eps), flow_interpolate(x0, eps, TIMES))
    torch.testing.assert_close(at.velocity(x0, eps), flow_velocity(x0, eps))


def test_unknown_path():
    for call in (path_coefficients, time_of_ratio):
        with pytest.raises(ValueError, match="'gvp'.*cosine"):
            call("gvp", TIMES)
