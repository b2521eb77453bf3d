"""NCSNpp: sizes, time, and the flow of images in [0, 1] seen as one of images in [-1, 1]."""

import pytest
import torch

from hfgen import NCSNpp
from support.instances import build_model, draws


@pytest.mark.parametrize(("preset", "millions"), [("cifar10", 61.80), ("ncsnpp-256", 65.57)])
def test_published_sizes(preset, millions):
    with torch.device("meta"):
        model = NCSNpp.from_preset(preset)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@torch.no_grad()
def test_pure_noise_counts_as_the_first_time_of_the_training():
    model, noise = build_model("NCSNpp"), draws(2, 3, 8, 8)
    at = {time: model(noise, torch.full((2,), time)).sample for time in (1000.0, 999.0, 900.0)}
    assert at[1000.0].isfinite().all() and torch.equal(at[1000.0], at[999.0])
    assert not torch.allclose(at[999.0], at[900.0])


def test_a_new_network_starts_almost_at_zero():
    model = NCSNpp(sample_size=8, base_channels=8, channel_multipliers=(1, 2), layers_per_block=1)
    with torch.no_grad():
        assert model.eval()(draws(2, 3, 8, 8), torch.full((2,), 500.0)).sample.abs().max() < 1e-3


@torch.no_grad()
def test_frequencies_are_never_rounded():
    model = build_model("NCSNpp")
    frequencies = model.time_proj.frequencies.clone()
    assert torch.equal(model.to(torch.float16).time_proj.frequencies, frequencies)


@torch.no_grad()
def test_images_in_the_unit_range_are_reached_by_the_same_flow():
    """Our flow of x to images 2 u - 1 is the official one of y = t u + (1 - t) noise to u, point by point."""
    ours = build_model("NCSNpp", unit_range=True).double()
    official = NCSNpp.from_config({**ours.config, "unit_range": False}).double().eval()
    official.load_state_dict(ours.state_dict())

    def point(x, sigma):  # from noise itself at sigma = 1 to the image in [0, 1] at sigma = 0
        return (x + 1 - sigma) / (2 - sigma)

    def time(sigma):
        return 2 * (1 - sigma) / (2 - sigma)

    x = draws(1, 3, 8, 8).double()
    for value in (0.05, 0.5, 0.9):
        sigma, one = torch.tensor(value, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        velocity = ours(x, 1000 * sigma[None]).sample
        _, moved = torch.func.jvp(point, (x, sigma), (velocity, one))
        t, rate = torch.func.jvp(time, (sigma,), (one,))
        forward = -official(2 * point(x, sigma) - 1, 1000 * (1 - t[None])).sample
        torch.testing.assert_close(moved, forward * rate, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_channels": 6}, "multiple of 4"),
        ({"time_embedding": "learned"}, "'learned'; choose 'positional' or 'fourier'"),
        ({"resampling": "bilinear"}, "'bilinear'; choose 'box' or 'fir'"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        NCSNpp(**changes)


def test_sides_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"\(9, 8\) must be multiples of 2"):
        build_model("NCSNpp")(draws(1, 3, 9, 8), torch.full((1,), 500.0))
