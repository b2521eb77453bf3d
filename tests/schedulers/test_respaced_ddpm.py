"""The respaced diffusion: its timesteps and tables, its steps, and how it gets on with the schedulers of diffusers."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from hfgen.counters import generator
from hfgen.sampling.gaussian_diffusion import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    GaussianDiffusion,
    diffusion_betas,
    respaced_timesteps,
    spaced_timesteps,
)
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler

SHAPE = (2, 4, 3, 3)
T = torch.tensor([3, 700])


def normal(*counters, shape=SHAPE):
    return torch.randn(shape, generator=generator(*counters))


def fixed(**arguments):
    return RespacedDDPMScheduler(**{"reverse_variance": "fixed_small", **arguments})


def run(scheduler, predict, noise=None):
    """All steps from the noise ``normal(0)``."""
    x = normal(0)
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x, timestep), timestep, x, variance_noise=normal(1, index)).prev_sample
    return x


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_betas_are_those_of_diffusers(schedule):
    ours = RespacedDDPMScheduler(beta_schedule=schedule)
    theirs = DDPMScheduler(beta_schedule=schedule)
    torch.testing.assert_close(ours.process.betas.float(), theirs.betas, rtol=2e-6, atol=0)


def test_tables_are_float64():
    # The last 1 / sqrt(abar) of the cosine schedule is 2e4; float32 sums would be off in the fourth digit there.
    betas = diffusion_betas("squaredcos_cap_v2", 1000, 0, 0)
    abar = GaussianDiffusion(betas).alphas_cumprod
    assert abar.dtype == torch.float64
    exact = [
        math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 999)
    ]  # the cap acts in the last step
    assert abar[998].item() == pytest.approx(exact[1] / exact[0], rel=1e-9)


def test_respacing_keeps_the_marginals():
    process = GaussianDiffusion(diffusion_betas("linear", 1000, 1e-4, 0.02))
    kept = respaced_timesteps("7", 1000)
    torch.testing.assert_close(process.respaced(kept).alphas_cumprod, process.alphas_cumprod[kept], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("respacing", "expected"),
    [
        ("4", [0, 4, 9, 13]),  # 13 / 3 = 4.33
        ("3", [0, 6, 13]),  # 6.5 is rounded to the even number
        ("2,0", [0, 6]),
        ("0,2", [7, 13]),
        ("2, 3", [0, 6, 7, 10, 13]),
        ("1", [0]),
        ("ddim7", [0, 2, 4, 6, 8, 10, 12]),
        ("ddim1", [0]),
        ("14", list(range(14))),
    ],
)
def test_respaced_timesteps(respacing, expected):
    assert respaced_timesteps(respacing, 14) == expected


def test_sections_of_unequal_length():
    assert respaced_timesteps("1,1,1", 8) == [0, 3, 6]


@pytest.mark.parametrize("respacing", ["", "ten", "-4", "4,-1", "0", "0,0", "ddim", "ddimten", "1.5", "DDIM5", "5,"])
def test_unknown_respacing(respacing):
    with pytest.raises(ValueError, match="Unknown respacing.*'250'.*'ddim50'"):
        RespacedDDPMScheduler(respacing=respacing)


def test_impossible_respacing():
    with pytest.raises(ValueError, match="takes 15 of 14 timesteps in section 0"):
        respaced_timesteps("15", 14)
    with pytest.raises(ValueError, match="takes 8 of 7 timesteps in section 1"):
        respaced_timesteps("1,8", 14)
    with pytest.raises(ValueError, match="No integer stride through 14 timesteps makes 6.*'ddim6'"):
        respaced_timesteps("ddim6", 14)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 250, 1000])
def test_spacings_are_those_of_diffusers(spacing, steps):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    ours = RespacedDDPMScheduler(timestep_spacing=spacing)
    ours.set_timesteps(steps)
    assert len(ours.timesteps) == ours.num_inference_steps == steps
    if (spacing, steps) == ("linspace", 1):
        assert ours.timesteps.tolist() == [999]  # theirs is 0, from where noise does not become an image
    else:
        assert torch.equal(ours.timesteps, theirs.timesteps)


def test_number_of_steps():
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match=f"between 1 and the 1000 training timesteps, got {steps}"):
            RespacedDDPMScheduler().set_timesteps(steps)
    with pytest.raises(ValueError, match=r"num_inference_steps \(4\) or respacing \('8'\), not both"):
        RespacedDDPMScheduler().set_timesteps(4, respacing="8")
    assert spaced_timesteps("trailing", 4, 8) == [1, 3, 5, 7]


def test_timesteps_come_from_the_call_or_the_configuration():
    scheduler = RespacedDDPMScheduler(respacing="10")
    assert len(scheduler.timesteps) == 10
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 666, 333, 0]
    scheduler.set_timesteps(respacing="2,0")
    assert scheduler.timesteps.tolist() == [499, 0]
    scheduler.set_timesteps()
    assert len(scheduler.timesteps) == 10
    assert len(RespacedDDPMScheduler().timesteps) == 1000


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_predictions_agree(prediction_type, schedule):
    """The target at x_t leads back to the same x_0 and noise, and to the same step, whatever is predicted."""
    scheduler = fixed(prediction_type=prediction_type, beta_schedule=schedule)
    x0, noise = normal(0), normal(1)
    noisy = scheduler.add_noise(x0, noise, T)
    target = scheduler.target(x0, noise, T)
    process = scheduler.process
    torch.testing.assert_close(process.to_x0(prediction_type, target, noisy, T), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.to_epsilon(x0, noisy, T), noise, rtol=1e-4, atol=1e-4)
    reverse = scheduler.reverse(target, noisy, T)
    mean, log_variance = scheduler.posterior(x0, noisy, T)
    torch.testing.assert_close(reverse.mean, mean, rtol=1e-4, atol=1e-4)
    assert torch.equal(reverse.log_variance, log_variance)


def test_velocity_is_the_derivative_along_the_arc():
    """With sqrt(abar) = cos(phi), x_phi = cos(phi) x_0 + sin(phi) eps and v = dx / dphi (arXiv 2202.00512)."""
    scheduler = fixed(prediction_type="v_prediction")
    x0, noise = normal(0).double(), normal(1).double()
    phi = scheduler.process.alphas_cumprod[T].sqrt().arccos()[:, None, None, None]

    def at(angle):
        return angle.cos() * x0 + angle.sin() * noise

    derivative = (at(phi + 1e-5) - at(phi - 1e-5)) / 2e-5
    torch.testing.assert_close(scheduler.target(x0, noise, T), derivative, rtol=1e-5, atol=1e-6)


def test_closed_form_is_that_of_single_steps():
    """x_t of the iterated kernel q(x_t | x_{t-1}) has the mean and variance of q(x_t | x_0)."""
    scheduler = RespacedDDPMScheduler(num_train_timesteps=10, beta_start=0.05, beta_end=0.3)
    scale, variance = 1.0, 0.0
    for t, beta in enumerate(scheduler.process.betas.tolist()):
        scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
        one, zero, time = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([t])
        assert scheduler.add_noise(one, zero, time).item() == pytest.approx(scale, rel=1e-6)
        assert scheduler.add_noise(zero, one, time).item() == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_posterior_is_bayes_rule():
    scheduler = RespacedDDPMScheduler(num_train_timesteps=10, beta_start=0.05, beta_end=0.3)
    beta, abar = scheduler.process.betas[6].item(), scheduler.process.alphas_cumprod
    before = abar[5].item()
    x0, x = 0.7, -0.4
    # N(x_{t-1}; sqrt(abar) x_0, 1 - abar) times N(x_t; sqrt(1 - beta) x_{t-1}, beta)
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(1 - beta) * x / beta) / precision
    found, log_variance = scheduler.posterior(torch.full((1, 1), x0), torch.full((1, 1), x), torch.tensor([6]))
    assert found.item() == pytest.approx(mean, rel=1e-5)
    assert log_variance.exp().item() == pytest.approx(1 / precision, rel=1e-5)


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_steps_are_those_of_diffusers(clip):
    """Up to their float32 tables."""
    ours = fixed(clip_sample=clip, timestep_spacing="leading")
    theirs = DDPMScheduler(clip_sample=clip, timestep_spacing="leading")
    x, output = normal(0), normal(1)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for t in ours.timesteps:
        found, expected = (scheduler.step(output, t, x, generator=generator(7)) for scheduler in (ours, theirs))
        torch.testing.assert_close(found.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_steps_are_those_of_diffusers(clip):
    ours = fixed(algorithm="ddim", clip_sample=clip, timestep_spacing="leading")
    theirs = DDIMScheduler(clip_sample=clip)
    x, output, noise = normal(0), normal(1), normal(2)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for t in ours.timesteps:
        found = ours.step(output, t, x, eta=0.5, variance_noise=noise)
        # Theirs keeps the noise of the unclipped sample unless told.
        expected = theirs.step(output, t, x, eta=0.5, variance_noise=noise, use_clipped_model_output=True)
        torch.testing.assert_close(found.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_perfect_network_samples_the_data(variance):
    """For data N(0, 0.5^2) the best prediction is known; samples of many dimensions then have that deviation."""
    scheduler = RespacedDDPMScheduler(prediction_type="sample", reverse_variance=variance)
    scheduler.set_timesteps(1000)
    x = torch.randn(1, 20_000, generator=generator(0))
    for timestep in scheduler.timesteps:
        abar = scheduler.process.alphas_cumprod[timestep].item()
        best = math.sqrt(abar) * 0.25 / (abar * 0.25 + 1 - abar) * x
        x = scheduler.step(best, timestep, x, generator=generator(1, int(timestep))).prev_sample
    assert x.std().item() == pytest.approx(0.5, rel=0.05)


def test_ddim_noise_of_eta_one_is_that_of_ddpm():
    ddpm, ddim = fixed(respacing="6"), fixed(respacing="6", algorithm="ddim", eta=1.0)
    predict = lambda x, t: 0.1 * x  # noqa: E731
    torch.testing.assert_close(run(ddim, predict), run(ddpm, predict), rtol=1e-4, atol=1e-4)


def test_ddim_inverts_a_known_noise():
    """If the network knows the noise, DDIM goes straight back to the clean sample."""
    scheduler = fixed(algorithm="ddim", respacing="5")
    x0, noise = normal(0), normal(1)
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[:1].expand(2))
    for timestep in scheduler.timesteps:
        x = scheduler.step(noise, timestep, x).prev_sample
    torch.testing.assert_close(x, x0, rtol=1e-4, atol=1e-4)


def test_learned_range_lies_between_the_fixed_variances():
    learned, x, eps = RespacedDDPMScheduler(), normal(0), normal(1)
    for value, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        expected = RespacedDDPMScheduler(reverse_variance=variance).reverse(eps, x, T)
        found = learned.reverse(torch.cat([eps, torch.full_like(eps, value)], dim=1), x, T)
        torch.testing.assert_close(found.log_variance, expected.log_variance)
        assert torch.equal(found.mean, expected.mean)


def test_the_last_step_has_no_noise_and_temperature_scales_it_before():
    scheduler, x, output = fixed(respacing="3"), normal(0), normal(1)
    last = scheduler.timesteps[-1]
    assert torch.equal(
        scheduler.step(output, last, x, variance_noise=normal(2)).prev_sample,
        scheduler.step(output, last, x, variance_noise=normal(3)).prev_sample,
    )
    first = scheduler.timesteps[0]
    mean, half, full = (
        scheduler.step(output, first, x, variance_noise=normal(2), temperature=temperature).prev_sample
        for temperature in (0.0, 0.5, 1.0)
    )
    torch.testing.assert_close(half, (mean + full) / 2)
    assert not torch.allclose(mean, full, atol=1e-3)


def test_clipping():
    x, output = normal(0), normal(1)
    found = fixed(clip_sample=True, clip_sample_range=0.5).step(output, 900, x, generator=generator(0))
    assert found.pred_original_sample.abs().max() == 0.5
    assert fixed().step(output, 900, x, generator=generator(0)).pred_original_sample.abs().max() > 1


def test_dtype_and_generators():
    scheduler, x, output = fixed(), normal(0), normal(1)
    half = scheduler.step(output.bfloat16(), 500, x.bfloat16(), generator=generator(0)).prev_sample
    assert half.dtype == torch.bfloat16
    together = scheduler.step(output, 500, x, generator=[generator(0), generator(1)]).prev_sample
    alone = scheduler.step(output[1:], 500, x[1:], generator=generator(1)).prev_sample
    assert torch.equal(together[1:], alone)


def test_wrong_calls():
    scheduler, x = RespacedDDPMScheduler(respacing="4"), normal(0)
    with pytest.raises(ValueError, match=r"must have shape \(2, 8, 3, 3\), got \(2, 4, 3, 3\)"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="'fixed_small'.*leave out variance channels"):
        fixed().step(torch.cat([x, x], dim=1), 999, x)
    with pytest.raises(ValueError, match="Timestep 5 is not among the 4"):
        scheduler.step(torch.cat([x, x], dim=1), 5, x)
    with pytest.raises(ValueError, match="eta is 0.5.*algorithm='ddim'"):
        fixed().step(x, 999, x, eta=0.5)
    with pytest.raises(ValueError, match="eta must be between 0"):
        fixed(algorithm="ddim").step(x, 999, x, eta=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_schedule": "cosine"}, "Unknown beta schedule 'cosine'.*squaredcos_cap_v2"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"reverse_variance": "learned"}, "reverse_variance is 'learned'"),
        ({"algorithm": "euler"}, "algorithm is 'euler'"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be between 1"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps must be between 1"),
        ({"beta_start": 0.0}, "0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.0}, "0 < beta_start <= beta_end < 1"),
        ({"clip_sample_range": 0.0}, "clip_sample_range must be above 0"),
        ({"eta": -1.0}, "eta must be between 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RespacedDDPMScheduler(**arguments)


@pytest.mark.parametrize("name", RespacedDDPMScheduler.presets)
def test_save_and_load(name, tmp_path):
    scheduler = RespacedDDPMScheduler.from_preset(name)
    scheduler.save_pretrained(tmp_path)
    loaded = RespacedDDPMScheduler.from_pretrained(tmp_path)
    arguments = inspect.signature(RespacedDDPMScheduler.__init__).parameters.keys() - {"self"}
    assert all(loaded.config[argument] == scheduler.config[argument] for argument in arguments)
    assert torch.equal(loaded.timesteps, scheduler.timesteps)


def test_hostile_configurations(tmp_path):
    RespacedDDPMScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    config = json.loads(path.read_text())
    for name, value in (("num_train_timesteps", "1000"), ("beta_end", [1]), ("respacing", 5), ("eta", float("nan"))):
        path.write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match=name):
            RespacedDDPMScheduler.from_pretrained(tmp_path)


def test_configurations_are_exchanged_with_diffusers():
    ours = RespacedDDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=True)
    for other in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler):
        theirs = other.from_config(ours.config)
        np.testing.assert_allclose(theirs.alphas_cumprod, ours.process.alphas_cumprod, rtol=1e-4)
        assert theirs.config.prediction_type == "v_prediction"
        assert theirs.config.get("variance_type") not in ("learned", "learned_range")
        back = RespacedDDPMScheduler.from_config(theirs.config, reverse_variance="fixed_small")
        assert back.config.beta_schedule == "scaled_linear" and back.config.prediction_type == "v_prediction"


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset 'sd'; known are: dit, mar"):
        RespacedDDPMScheduler.from_preset("sd")
