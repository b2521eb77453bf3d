"""Losses of diffusion: the bound in bits, where gradients go, and weights that agree over parametrisations."""

import math

import pytest
import torch

from hfgen.counters import generator
from hfgen.losses.diffusion import (
    diffusion_loss,
    discretized_log_likelihood,
    min_snr_weights,
    normal_kl,
    prediction_weights,
    variational_bound,
)
from hfgen.sampling.gaussian_diffusion import PREDICTION_TYPES
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler

SHAPE = (3, 2, 4, 4)
T = torch.tensor([0, 40, 999])


def normal(seed, *shape):
    return torch.randn(*(shape or SHAPE), generator=generator(seed))


def batch():
    """Pixels of 8 bits and noise."""
    x0 = torch.randint(256, SHAPE, generator=generator(0)) / 127.5 - 1
    return x0, normal(1)


def test_normal_kl_is_that_of_torch():
    mean1, mean2, log1, log2 = (normal(seed, 50) for seed in range(4))
    ours = normal_kl(mean1, log1, mean2, log2)
    first, second = (
        torch.distributions.Normal(mean, (0.5 * log).exp()) for mean, log in ((mean1, log1), (mean2, log2))
    )
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(first, second), rtol=1e-4, atol=1e-5)
    assert normal_kl(mean1, log1, mean1, log1).abs().max() == 0


@pytest.mark.parametrize("deviation", [0.02, 0.3, 2.0])
def test_bins_of_pixels_add_up_to_one(deviation):
    pixels = torch.arange(256) / 127.5 - 1
    log_likelihood = discretized_log_likelihood(pixels, torch.tensor(0.3), torch.tensor(math.log(deviation)))
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-4)
    exact = torch.distributions.Normal(0.3, deviation)
    inner = exact.cdf(pixels[160] + 1 / 255) - exact.cdf(pixels[160] - 1 / 255)
    assert log_likelihood[160].exp().item() == pytest.approx(inner.item(), rel=0.02)


def test_simple_loss():
    scheduler = RespacedDDPMScheduler(reverse_variance="fixed_small")
    x0, noise = batch()
    output = normal(2)
    found = diffusion_loss(scheduler, output, x0, noise, T)
    expected = ((output - noise) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.mse, expected)
    assert torch.equal(found.loss, found.mse) and found.vb is None
    ones = diffusion_loss(scheduler, output, x0, noise, T, weights=torch.ones(3))
    assert torch.equal(ones.loss, found.loss)
    weighted = diffusion_loss(scheduler, output, x0, noise, T, weights=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(weighted.loss, expected * torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(weighted.mse, found.mse)


def test_the_bound_is_in_bits():
    """A mean that is off by d standard deviations of the posterior costs d^2 / 2 nats."""
    scheduler = RespacedDDPMScheduler(prediction_type="sample")
    x0, noise = batch()
    x0, noise, time = x0[1:], noise[1:], torch.tensor([300, 300])
    noisy = scheduler.add_noise(x0, noise, time)
    lowest = -torch.ones_like(x0)  # of the learned range, that of the posterior
    assert variational_bound(scheduler, torch.cat([x0, lowest], 1), x0, noisy, time).abs().max() < 1e-6
    mean, log_variance = scheduler.posterior(x0, noisy, time)
    unit = scheduler.posterior(x0 + 1, noisy, time)[0] - mean
    shift = 0.7 * (0.5 * log_variance).exp() / unit
    found = variational_bound(scheduler, torch.cat([x0 + shift, lowest], 1), x0, noisy, time)
    torch.testing.assert_close(found, torch.full((2,), 0.7**2 / 2 / math.log(2)), rtol=1e-4, atol=1e-5)


def test_the_first_timestep_is_a_likelihood_of_bins():
    """Nobody can know an 8-bit pixel with less than no bits, and a good network needs few."""
    scheduler = RespacedDDPMScheduler(prediction_type="sample")
    x0, noise = batch()
    time = torch.zeros(3, dtype=torch.long)
    noisy = scheduler.add_noise(x0, noise, time)
    good = variational_bound(scheduler, torch.cat([x0, -torch.ones_like(x0)], 1), x0, noisy, time)
    bad = variational_bound(scheduler, torch.cat([x0 + 0.1, -torch.ones_like(x0)], 1), x0, noisy, time)
    assert (good > 0).all() and (good < 2.5).all() and (bad > good + 5).all()


def test_the_bound_trains_only_the_variance():
    scheduler = RespacedDDPMScheduler()
    x0, noise = batch()
    output = torch.cat([normal(2), normal(3)], dim=1).requires_grad_()
    found = diffusion_loss(scheduler, output, x0, noise, T)
    torch.testing.assert_close(found.loss, found.mse + found.vb)
    (gradient,) = torch.autograd.grad(found.vb.sum(), output, retain_graph=True)
    assert gradient[:, :2].abs().max() == 0 and gradient[:, 2:].abs().amin(dim=(1, 2, 3)).max() > 0
    (gradient,) = torch.autograd.grad(found.mse.sum(), output)
    assert gradient[:, 2:].abs().max() == 0 and gradient[:, :2].abs().max() > 0


def test_half_precision_outputs():
    scheduler = RespacedDDPMScheduler()
    x0, noise = batch()
    output = torch.cat([normal(2), normal(3)], dim=1)
    half = diffusion_loss(scheduler, output.bfloat16(), x0, noise, T)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, diffusion_loss(scheduler, output, x0, noise, T).loss, rtol=0.02, atol=0.02)


def test_wrong_channels():
    x0, noise = batch()
    with pytest.raises(ValueError, match="have 2 channels.*must have 2, or 4 with a learned variance; got 3"):
        diffusion_loss(RespacedDDPMScheduler(), normal(0, 3, 3, 4, 4), x0, noise, T)


def test_weights_are_the_same_for_every_parametrisation():
    """An error of the same x_0 costs the same, whether the network predicts the noise, x_0 or v."""
    x0, noise = batch()
    wrong, time = x0 + 0.1 * normal(5), torch.tensor([20, 300, 900])
    losses = []
    for prediction_type in PREDICTION_TYPES:
        scheduler = RespacedDDPMScheduler(prediction_type=prediction_type, reverse_variance="fixed_small")
        noisy = scheduler.add_noise(x0, noise, time)
        output = scheduler.target(wrong, scheduler.process.to_epsilon(wrong, noisy, time), time)
        weights = min_snr_weights(scheduler.snr(time), prediction_type)
        losses.append(diffusion_loss(scheduler, output, x0, noise, time, weights=weights).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-3, atol=0)


def test_min_snr_of_infinity_is_the_simple_loss():
    snr = RespacedDDPMScheduler().snr(torch.arange(1000))
    assert (snr.diff() < 0).all()
    assert torch.equal(min_snr_weights(snr, "epsilon", math.inf), torch.ones(1000))
    torch.testing.assert_close(min_snr_weights(snr, "epsilon"), (5 / snr).clamp(max=1))
    torch.testing.assert_close(min_snr_weights(snr, "v_prediction"), snr.clamp(max=5) / (snr + 1))
    with pytest.raises(ValueError, match="'flow'.*v_prediction"):
        prediction_weights(snr, snr, "flow")
