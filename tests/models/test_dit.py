"""The network of DiT, SiT and MeanFlow, and the layers of patches and positions."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfgen import DiT
from hfgen.counters import generator
from hfgen.models.layers.embeddings import SinCosPositionEmbed, sincos_positions
from hfgen.models.layers.patch import PatchEmbed, patchify, unpatchify

# Millions of parameters as published: with learned variance, and with the position table.
PUBLISHED_SIZES = {"S/8": 33.1, "B/4": 130.5, "L/2": 458.1, "XL/2": 675.1}


def tiny(**arguments):
    """Weights large enough that every part matters."""
    sizes = {"sample_size": 8, "num_classes": 5, "num_layers": 2, "width": 16, "num_heads": 2, "mlp_ratio": 2.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiT(**{**sizes, **arguments}).eval()
    draws = generator(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return model


def inputs(batch=2, size=(8, 8)):
    draws = generator(5)
    latents = torch.randn(batch, 4, *size, generator=draws)
    return latents, torch.linspace(0.9, 0.3, batch), torch.arange(batch) % 6


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_presets_have_the_published_size(name):
    with torch.device("meta"):
        model = DiT(**DiT.presets[name], out_channels=8)
    millions = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) / 1e6
    assert millions == pytest.approx(PUBLISHED_SIZES[name], abs=0.06)


def test_patch_embedding_is_a_linear_layer_of_each_patch():
    embed, images = PatchEmbed(3, 10, 4), torch.randn(2, 3, 8, 12, generator=generator(0))
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as in a patch
    expected = F.linear(patchify(images, 4), weight, embed.proj.bias)
    torch.testing.assert_close(embed(images), expected, rtol=1e-5, atol=1e-6)
    assert embed(images).shape == (2, 6, 10)
    with pytest.raises(ValueError, match="8x10, which patches of 4x4 do not divide; use multiples of 4"):
        embed(torch.zeros(1, 3, 8, 10))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpatchify_is_the_inverse_of_patchify(patch_size):
    images = torch.randn(2, 3, 8, 12, generator=generator(0))
    patches = patchify(images, patch_size)
    assert torch.equal(patches[:, 1].unflatten(1, (patch_size, patch_size, 3))[:, 0, 0], images[..., 0, patch_size])
    assert torch.equal(unpatchify(patches, patch_size, (8 // patch_size, 12 // patch_size)), images)


def test_positions_tell_the_column_first():
    positions = sincos_positions((3, 5), 8, 4).unflatten(0, (3, 5))
    columns, rows = positions.chunk(2, dim=-1)
    assert torch.equal(columns, columns[:1].expand_as(columns)) and torch.equal(rows, rows[:, :1].expand_as(rows))
    assert len(columns[0].unique(dim=0)) == 5 and len(rows[:, 0].unique(dim=0)) == 3


def test_positions_of_another_grid_span_the_same_range():
    embed = SinCosPositionEmbed(16, base_size=4)
    base, larger = embed((4, 4)).unflatten(0, (4, 4)), embed((8, 12)).unflatten(0, (8, 12))
    torch.testing.assert_close(larger[::2, ::3], base)
    smaller = embed((2, 4)).unflatten(0, (2, 4))
    torch.testing.assert_close(smaller, base[::2])
    # Between two places lies the wave at the middle.
    half = torch.cat([torch.sin(torch.tensor([1.5])), torch.cos(torch.tensor([1.5]))])
    torch.testing.assert_close(larger[3, 0, [8, 12]], half)
    assert torch.equal(base.flatten(0, 1), embed.table) and not embed.state_dict()


@pytest.mark.parametrize("size", [(16, 16), (4, 12), (4, 4)])
def test_other_sizes_than_that_of_training(size):
    latents, timestep, labels = inputs(size=size)
    model, other = tiny(), tiny(sample_size=max(size))
    with torch.no_grad():
        sample = model(latents, timestep, labels).sample
        # The same weights, with positions that do not span the range of training.
        assert sample.shape == latents.shape
        assert not torch.allclose(sample, other(latents, timestep, labels).sample, atol=1e-3)


def test_a_fresh_model_predicts_zero_and_its_blocks_do_nothing():
    model = DiT(sample_size=8, num_layers=2, width=16, num_heads=2, num_classes=5)
    tokens, condition = torch.randn(2, 16, 16, generator=generator(0)), torch.randn(2, 16, generator=generator(1))
    assert torch.equal(model(*inputs()).sample, torch.zeros(2, 4, 8, 8))
    assert all(torch.equal(block(tokens, condition), tokens) for block in model.blocks)


def test_each_image_depends_on_its_time_and_class():
    model, (latents, timestep, labels) = tiny(), inputs()
    with torch.no_grad():
        sample = model(latents, timestep, labels).sample
        later = model(latents, timestep + torch.tensor([0.1, 0.0]), labels).sample
        other = model(latents, timestep, torch.tensor([0, 5])).sample
    assert not torch.allclose(later[0], sample[0], atol=1e-3) and torch.equal(later[1], sample[1])
    assert not torch.allclose(other[1], sample[1], atol=1e-3) and torch.equal(other[0], sample[0])


def test_whole_steps_and_floats_are_the_same_times():
    model, (latents, _, labels) = tiny(out_channels=8), inputs()
    with torch.no_grad():
        whole = model(latents, torch.tensor([999, 3]), labels).sample
        assert torch.equal(whole, model(latents, torch.tensor([999.0, 3.0]), labels).sample)
    assert whole.shape == (2, 8, 8, 8)


def test_reversed_time_turns_time_and_output():
    """SiT's weights know t from noise at 0 to data at 1; the class is called with 1000 sigma."""
    plain, reversed_ = tiny(), tiny(timestep_scale=1e-3, reverse_time=True)
    latents, time, labels = inputs()
    with torch.no_grad():
        expected = -plain(latents, time, labels).sample
        actual = reversed_(latents, 1000 * (1 - time), labels).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_derivative_in_forward_mode():
    """MeanFlow's total derivative: equal to finite differences along the path."""
    model, (latents, time, labels) = tiny(has_duration=True).double(), inputs()
    velocity, duration = torch.randn(latents.shape, generator=generator(9)), torch.tensor([0.2, 0.3])
    latents, velocity = latents.double(), velocity.double()

    def run(shift):
        return model(latents + shift * velocity, time + shift, labels, duration + shift).sample

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        value, derivative = torch.func.jvp(run, (torch.tensor(0.0),), (torch.tensor(1.0),))
        torch.testing.assert_close(value, run(0.0))
        differences = (run(5e-4) - run(-5e-4)) / 1e-3  # times are float32 inside
    torch.testing.assert_close(derivative, differences, rtol=0, atol=5e-3 * derivative.abs().max().item())


def test_duration_matters():
    model, (latents, time, labels) = tiny(has_duration=True), inputs()
    with torch.no_grad():
        short, long = (model(latents, time, labels, torch.full((2,), value)).sample for value in (0.0, 0.3))
    assert not torch.allclose(short, long, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(2, 3, 8, 8)}, r"shape \(2, 3, 8, 8\), expected \(batch, 4, height, width\)"),
        ({"hidden_states": torch.zeros(2, 4, 8, 7)}, "patches of 2x2 do not divide"),
        ({"timestep": torch.tensor(3)}, r"timestep has shape \(\), expected one value for each of the 2 rows"),
        ({"class_labels": torch.zeros(3, dtype=torch.long)}, r"class_labels has shape \(3,\), expected one value"),
        ({"duration": torch.zeros(2)}, "no second time: leave duration out"),
    ],
)
def test_bad_inputs(changes, message):
    names = ("hidden_states", "timestep", "class_labels")
    with pytest.raises(ValueError, match=message):
        tiny()(**{**dict(zip(names, inputs())), **changes})


def test_missing_duration():
    with pytest.raises(ValueError, match="give its length as duration"):
        tiny(has_duration=True)(*inputs())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 18, "num_heads": 2}, "width=18 must be a multiple of num_heads=2 and of 4"),
        ({"num_heads": 3}, "width=16 must be a multiple of num_heads=3"),
        ({"sample_size": 9}, "sample_size=9 must be a multiple of patch_size=2"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
