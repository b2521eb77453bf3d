"""Solvers show their order, also backwards, and count their passes."""

import math

import pytest
import torch

from hfgen.sampling.ode import ODE_METHODS, ode_step, passes_per_step, solve_ode

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3}


def times(start, end, steps):
    return [start + (end - start) * step / steps for step in range(steps + 1)]


@pytest.mark.parametrize("method", ODE_METHODS)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0)])
def test_convergence_order(method, start, end):
    """dx / dt = cos(t) x has the solution x exp(sin t)."""
    x, errors, calls = torch.ones(1, dtype=torch.float64), [], []

    def velocity(x, t):
        calls.append(t)
        return math.cos(t) * x

    for steps in (16, 32):
        actual = solve_ode(velocity, x, times(start, end, steps), method)
        errors.append(abs(actual.item() - math.exp(math.sin(end) - math.sin(start))))
    assert 0.8 < errors[0] / errors[1] / 2 ** ORDERS[method] < 1.25
    assert len(calls) == 48 * passes_per_step(method)


@pytest.mark.parametrize("method", ODE_METHODS)
def test_a_straight_flow_needs_one_step(method):
    x, velocity = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.arange(3.0)
    torch.testing.assert_close(ode_step(lambda x, t: velocity, x, 1.0, 0.0, method), x - velocity)


def test_unknown_method():
    with pytest.raises(ValueError, match="'rk45'.*midpoint"):
        ode_step(lambda x, t: x, torch.ones(1), 0.0, 1.0, "rk45")
