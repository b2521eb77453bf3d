"""The stochastic sampler of flows: its grid, its diffusions, and that it samples the data."""

import json
import math

import pytest
import torch

from hfgen.counters import generator
from hfgen.schedulers.interpolant_sde import DIFFUSIONS, InterpolantSDEScheduler

STEPS = 200


def gaussian_velocity(x, sigma, deviation):
    """E[eps - x_0 | x_sigma] for data N(0, deviation^2)."""
    variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
    return (sigma - (1 - sigma) * deviation**2) / variance * x


def sample(scheduler, steps, deviation=0.5, dimensions=20_000):
    scheduler.set_timesteps(steps)
    x = torch.randn(1, dimensions, generator=generator(0))
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = gaussian_velocity(x, timestep.item() / 1000, deviation)
        x = scheduler.step(velocity, timestep, x, generator=generator(1, index)).prev_sample
    return x


@pytest.mark.parametrize("last_step", ["mean", "euler", "none"])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_any_diffusion_samples_the_data(diffusion, last_step):
    scheduler = InterpolantSDEScheduler(diffusion=diffusion, last_step=last_step, last_step_size=0.02)
    expected = 0.5
    if last_step == "none":  # the noise of the last sigma stays
        expected = math.hypot(0.98 * 0.5, 0.02)
    if (diffusion, last_step) == ("constant", "mean"):  # the last step has all of the drift without its noise
        expected *= 1 - 0.02 / ((0.98 * 0.5) ** 2 + 0.02**2)
    assert sample(scheduler, STEPS).std().item() == pytest.approx(expected, rel=0.05)


def test_without_diffusion_it_is_euler():
    scheduler = InterpolantSDEScheduler(diffusion_norm=0.0, last_step_size=0.25)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]
    x = expected = torch.randn(2, 3, generator=generator(0))
    for timestep in scheduler.timesteps:
        velocity = gaussian_velocity(x, timestep.item() / 1000, 0.5)
        expected = expected - 0.25 * velocity
        x = scheduler.step(velocity, timestep, x, generator=generator(1)).prev_sample
        torch.testing.assert_close(x, expected)


def test_the_last_step():
    x, velocity = (torch.randn(2, 3, generator=generator(seed)) for seed in range(2))
    found = {}
    for last_step in ("mean", "euler"):
        scheduler = InterpolantSDEScheduler(last_step=last_step, num_inference_steps=5)
        last = scheduler.timesteps[-1]
        assert last.item() == pytest.approx(40.0)
        found[last_step] = scheduler.step(velocity, last, x)
    assert torch.equal(found["euler"].prev_sample, found["euler"].pred_original_sample)
    score = -(x + 0.96 * velocity) / 0.04
    torch.testing.assert_close(found["mean"].prev_sample, x + 0.04 * (0.04 * score - velocity))


def test_generators_noise_and_dtype():
    scheduler = InterpolantSDEScheduler(num_inference_steps=5)
    x, velocity = (torch.randn(2, 3, generator=generator(seed)) for seed in range(2))
    together = scheduler.step(velocity, 1000.0, x, generator=[generator(0), generator(1)]).prev_sample
    alone = scheduler.step(velocity[1:], 1000.0, x[1:], generator=generator(1)).prev_sample
    assert torch.equal(together[1:], alone)
    noise = torch.randn(1, 3, generator=generator(1))
    given, x0 = scheduler.step(velocity[1:], 1000.0, x[1:], variance_noise=noise, return_dict=False)
    assert torch.equal(given, alone) and x0.shape == x[1:].shape
    assert scheduler.step(velocity.half(), 1000.0, x.half(), generator=generator(0)).prev_sample.dtype == torch.half


def test_scale_noise_is_the_interpolant():
    x0, noise = torch.ones(2), torch.full((2,), 3.0)
    torch.testing.assert_close(InterpolantSDEScheduler().scale_noise(x0, 250.0, noise), torch.full((2,), 1.5))


def test_wrong_calls():
    scheduler, x = InterpolantSDEScheduler(num_inference_steps=5), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="Timestep 900.0 is not among the 5"):
        scheduler.step(x, 900.0, x)
    with pytest.raises(ValueError, match=r"the shape of the sample, \(1, 3\), got \(1, 6\)"):
        scheduler.step(torch.zeros(1, 6), 1000.0, x)
    for steps in (1, 0, 10**9):
        with pytest.raises(ValueError, match=f"at least 2.*got {steps}"):
            scheduler.set_timesteps(steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"diffusion": "linear"}, "diffusion is 'linear'.*SBDM"),
        ({"last_step": "heun"}, "last_step is 'heun'"),
        ({"last_step_size": 0.0}, "last_step_size must be between 0 and 1"),
        ({"diffusion_norm": -1.0}, "diffusion_norm must be at least 0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        InterpolantSDEScheduler(**arguments)


def test_save_and_load(tmp_path):
    scheduler = InterpolantSDEScheduler(diffusion="SBDM", num_inference_steps=7)
    scheduler.save_pretrained(tmp_path)
    loaded = InterpolantSDEScheduler.from_pretrained(tmp_path)
    assert torch.equal(loaded.timesteps, scheduler.timesteps) and len(loaded.timesteps) == 7
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "last_step_size": "big"}))
    with pytest.raises(ValueError, match="last_step_size"):
        InterpolantSDEScheduler.from_pretrained(tmp_path)
