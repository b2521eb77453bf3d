"""The MeanFlow objective: its identity, what the gradient passes, guidance, times; the trajectory-matching loss."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hfgen.counters import generator
from hfgen.losses.mean_flow import (
    drop_first,
    guided_velocity,
    mean_flow_loss,
    order_times,
    sample_interval,
    total_derivative,
    trajectory_matching_loss,
)
from support.instances import build_model, draws, labels


class LinearFlow(nn.Module):
    """The exact average velocity of the flow dz/dt = rate z; (z, t) -> z exp(rate (s - t)) at the time s."""

    config = SimpleNamespace(num_classes=5)

    def __init__(self, rate=1.5):
        super().__init__()
        self.rate = rate

    def forward(self, z, timestep, class_labels, duration, return_dict=True):
        duration = duration.view(-1, 1, 1, 1)
        return (z * -torch.expm1(-self.rate * duration) / duration,)


class Refuses(nn.Module):
    config = SimpleNamespace(num_classes=5)

    def forward(self, *_, **__):
        raise AssertionError("the network was called")


def batch(size=4):
    """x0, eps, t, r and labels."""
    eps = draws(2 * size, 3, 8, 8)
    t, r = torch.tensor([0.9, 0.7, 0.6, 0.5]), torch.tensor([0.9, 0.1, 0.3, 0.2])
    return eps[:size], eps[size:], t[:size], r[:size], labels(size, 5)


def test_the_identity_holds_for_an_exact_average_velocity():
    """u = v - (t - r) du/dt for the flow whose trajectories are known."""
    z, t, r = (
        draws(3, 2, 4, 4).double(),
        torch.tensor([0.9, 0.5, 1.0]).double(),
        torch.tensor([0.1, 0.4, 0.0]).double(),
    )
    network = LinearFlow()
    velocity = network.rate * z
    u = network(z, t, None, t - r)[0]
    derivative = total_derivative(network, z, t, r, None, velocity)
    torch.testing.assert_close(u, velocity - (t - r).view(-1, 1, 1, 1) * derivative)
    # It is the mean velocity: one step along it ends where the trajectory does.
    end = z * torch.exp(network.rate * (r - t)).view(-1, 1, 1, 1)
    torch.testing.assert_close(z - (t - r).view(-1, 1, 1, 1) * u, end)


def test_the_derivative_is_that_along_the_path():
    """Finite differences of u along (z + h v, t + h) at fixed r."""
    network = build_model("DiT").double()
    z, velocity, t, r, y = batch()
    z, velocity = z.double(), velocity.double()

    def run(h):
        return network(z + h * velocity, t + h, y, t + h - r).sample

    with torch.no_grad():
        differences = (run(5e-4) - run(-5e-4)) / 1e-3  # times are float32 inside
    derivative = total_derivative(network, z, t, r, y, velocity)
    torch.testing.assert_close(derivative, differences, rtol=0, atol=5e-3 * derivative.abs().max().item())
    assert derivative.abs().max() > 0.1 and not derivative.requires_grad


@pytest.mark.parametrize("power", [0.0, 1.0, 0.75])
def test_no_gradient_flows_through_the_target(power):
    model = build_model("DiT")
    x0, eps, t, r, y = batch()
    output = mean_flow_loss(model, x0, eps, t, r, y, omega=0.5, kappa=0.4, norm_power=power)
    logged = {name: value for name, value in vars(output).items() if name != "loss"}
    assert not any(value.requires_grad for value in logged.values())

    z = x0 + t.view(-1, 1, 1, 1) * (eps - x0)
    error = (model(z, t, y, t - r).sample - output.target).square().flatten(1).sum(1)
    weights = 1 / (error.detach() + 0.01) ** power
    parameters = list(model.parameters())
    expected = torch.autograd.grad((weights * error).mean(), parameters)
    actual = torch.autograd.grad(output.loss, parameters)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_weights_make_the_loss_one():
    model, inputs = build_model("DiT"), batch()
    plain = mean_flow_loss(model, *inputs, norm_power=0.0)
    torch.testing.assert_close(plain.loss.detach(), plain.squared_error.mean())
    assert mean_flow_loss(model, *inputs).loss.item() == pytest.approx(1, abs=1e-3)


def test_where_both_times_are_equal_it_is_flow_matching():
    x0, eps, t, _, y = batch()
    output = mean_flow_loss(build_model("DiT"), x0, eps, t, t, y)
    torch.testing.assert_close(output.target, eps - x0)
    torch.testing.assert_close(output.squared_error, output.velocity_error)


def test_a_wrapped_model_is_called_once_and_its_network_gives_the_target():
    network, calls = build_model("DiT"), []

    def wrapped(*arguments, **options):
        calls.append(torch.is_grad_enabled())
        return network(*arguments, **options)

    output = mean_flow_loss(wrapped, *batch(), network=network, omega=2.0)
    assert calls == [True]
    torch.testing.assert_close(output.loss, mean_flow_loss(network, *batch(), omega=2.0).loss)


def test_dropped_items_have_no_class_and_no_guidance():
    model, (x0, eps, t, r, y) = build_model("DiT"), batch()
    dropped = torch.tensor([True, False, True, False])
    output = mean_flow_loss(model, x0, eps, t, r, y, dropped=dropped, omega=2.0)
    without = mean_flow_loss(model, x0, eps, t, r, torch.full_like(y, 5))
    torch.testing.assert_close(output.prediction[dropped], without.prediction[dropped])
    torch.testing.assert_close(output.target[dropped], without.target[dropped], rtol=1e-4, atol=1e-4)
    with_class = mean_flow_loss(model, x0, eps, t, r, y, omega=2.0)
    torch.testing.assert_close(output.target[~dropped], with_class.target[~dropped])
    assert not torch.allclose(output.target[dropped], with_class.target[dropped], atol=1e-2)


def test_times_that_are_no_interval():
    x0, eps, t, r, y = batch()
    for times in ((r, t), (t + 1, r), (t, r - 1)):
        with pytest.raises(ValueError, match="0 <= r <= t <= 1"):
            mean_flow_loss(Refuses(), x0, eps, *times, y)


def test_guided_velocity():
    network, (z, velocity, t, _, y) = build_model("DiT"), batch()
    zero = torch.zeros_like(t)
    with torch.no_grad():
        conditional = network(z, t, y, zero).sample
        unconditional = network(z, t, torch.full_like(y, 5), zero).sample
    expected = 0.2 * velocity + 0.6 * conditional + 0.2 * unconditional
    torch.testing.assert_close(guided_velocity(network, z, velocity, t, y, omega=0.2, kappa=0.6), expected)
    # Without the predictions with a class it is guidance of the velocity itself.
    expected = unconditional + 3 * (velocity - unconditional)
    torch.testing.assert_close(guided_velocity(network, z, velocity, t, y, omega=3.0), expected, rtol=1e-4, atol=1e-4)
    some = guided_velocity(network, z, velocity, t, y, omega=3.0, interval=(0.6, 0.8))
    torch.testing.assert_close(some[1:3], expected[1:3], rtol=1e-4, atol=1e-4)
    assert torch.equal(some[[0, 3]], velocity[[0, 3]])


def test_no_guidance_costs_nothing():
    z, velocity, t, _, y = batch()
    assert guided_velocity(Refuses(), z, velocity, t, y, omega=1.0) is velocity


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
def test_times_of_a_batch(density):
    t, r = sample_interval(4000, density=density, generator=generator(1))
    again = sample_interval(4000, density=density, generator=generator(1))
    assert torch.equal(t, again[0]) and torch.equal(r, again[1])
    assert t.dtype == torch.float32 and 0 <= r.min() and (r <= t).all() and t.max() <= 1
    assert torch.equal(r[:3000], t[:3000]) and (r[3000:] < t[3000:]).all()
    # Of two independent draws, the larger and the smaller together have the distribution of a draw.
    middle = torch.cat([t[3000:], r[3000:]]).median().item()
    assert middle == pytest.approx(1 / (1 + math.exp(0.4)) if density == "logit_normal" else 0.5, abs=0.03)


def test_share_of_equal_times():
    first, second = torch.tensor([0.1, 0.8, 0.3]), torch.tensor([0.5, 0.2, 0.9])
    t, r = order_times(first, second, 0.4)
    assert torch.equal(t, torch.tensor([0.5, 0.8, 0.9])) and torch.equal(r, torch.tensor([0.5, 0.2, 0.3]))
    with pytest.raises(ValueError, match=r"equal_share must lie in \[0, 1\], got 1.5"):
        order_times(first, second, 1.5)
    with pytest.raises(ValueError, match="Unknown time density 'normal'"):
        sample_interval(3, density="normal")


def test_labels_are_dropped_from_the_first_items():
    assert drop_first(torch.tensor([0.5, 0.05, 0.9, 0.01]), 0.1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_gradient_of_trajectory_matching_is_that_of_finite_differences(num_steps):
    weight = torch.randn(4, 4, generator=generator(3), dtype=torch.float64, requires_grad=True)
    x0, eps = draws(2, 1, 2, 4).double(), draws(4, 1, 2, 4)[2:].double()

    def loss(weight):
        return trajectory_matching_loss(lambda x, s: torch.tanh(x @ weight) * s.view(-1, 1, 1, 1), x0, eps, num_steps)

    torch.autograd.gradcheck(loss, (weight,))


def test_one_step_of_trajectory_matching_is_regression():
    x0, eps = draws(3, 2, 4, 4), draws(6, 2, 4, 4)[3:]
    loss = trajectory_matching_loss(lambda x, sigma: 0.3 * x + sigma.view(-1, 1, 1, 1), x0, eps, 1)
    torch.testing.assert_close(loss, (eps - (0.3 * eps + 1) - x0).square().flatten(1).mean(1))
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        trajectory_matching_loss(None, x0, eps, 0)


def test_trajectory_matching_collapses_with_independent_pairs_and_not_with_coupled_ones():
    """Data are -1 and 1. The map to their signs makes them from noise; the other one makes their mean only."""
    eps = draws(4000, 1, 1, 1)
    coupled = eps.sign()
    independent = coupled[torch.randperm(len(eps), generator=generator(0))]

    def loss(x0, velocity):
        return trajectory_matching_loss(lambda x, sigma: velocity, x0, eps, 1).mean().item()

    to_signs, to_mean = eps - eps.sign(), eps
    assert loss(coupled, to_signs) < 1e-6 and loss(coupled, to_mean) == pytest.approx(1)
    assert loss(independent, to_mean) == pytest.approx(1, abs=0.01)
    assert loss(independent, to_signs) == pytest.approx(2, abs=0.1)
