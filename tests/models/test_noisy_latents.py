"""Noise of one fixed step on latents, and their codes."""

import pytest
import torch

from hfgen import LinearQuantizer, NoisyLatentQuantizer
from hfgen.counters import generator


def tiny(**arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        quantizer = NoisyLatentQuantizer(**{"num_codes": 16, "latent_channels": 4, **arguments})
    draws = generator(1)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    return quantizer.eval()


def latents(batch=2, size=(3, 5)):
    return torch.randn(batch, 4, *size, generator=generator(2))


def test_the_worked_example():
    z = torch.tensor([0.2, 0.3, 0.1, -0.1]).view(1, 4, 1, 1)
    eps = torch.tensor([-0.5, 0.7, 0.0, 0.2]).view(1, 4, 1, 1)
    noisy = tiny(sigma=0.1).add_noise(z, eps).flatten()
    assert [round(value, 6) for value in noisy.tolist()] == [0.15, 0.37, 0.1, -0.08]
    whole = tiny(sigma=1.0).add_noise(z, eps)  # the other form, z + eps
    torch.testing.assert_close(whole, z + eps)


def test_noise_of_a_diffusion_keeps_the_variance():
    z, eps = latents(64), torch.randn(64, 4, 3, 5, generator=generator(3))
    noisy = tiny(noise_type="variance_preserving", sigma=0.6).add_noise(z, eps)
    torch.testing.assert_close(noisy, 0.8 * z + 0.6 * eps)
    assert noisy.std().item() == pytest.approx(z.std().item(), rel=0.05)


def test_codes_are_the_nearest_rows():
    quantizer, z = tiny(), latents()
    table = quantizer.codebook.embedding.weight
    distances = (z.permute(0, 2, 3, 1)[..., None, :] - table).square().sum(-1)
    codes = quantizer.encode(z)
    assert torch.equal(codes, distances.argmin(-1).flatten(1))  # raster order
    assert torch.equal(quantizer.decode(codes.view(2, 3, 5)).permute(0, 2, 3, 1), table[codes.view(2, 3, 5)])
    assert quantizer(z).codes.equal(codes) and quantizer.codebook_size == 16


@pytest.mark.parametrize("quantizer_type", ["nearest", "linear"])
def test_rows_of_the_codebook_come_back(quantizer_type):
    quantizer = tiny(quantizer_type=quantizer_type)
    if quantizer_type == "linear":  # scores that are largest for the nearest row
        table = quantizer.codebook.embedding.weight.data
        quantizer.codebook.projection.weight.data = 2 * table
        quantizer.codebook.projection.bias.data = -table.square().sum(1)
    codes = torch.arange(16).view(1, 16)
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


def test_linear_codes_are_the_likeliest_classes():
    quantizer, z = tiny(quantizer_type="linear"), latents()
    projection = quantizer.codebook.projection
    scores = z.flatten(2).transpose(1, 2) @ projection.weight.T + projection.bias
    probabilities = quantizer.probabilities(z)
    torch.testing.assert_close(probabilities, scores.softmax(-1))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 15))
    assert torch.equal(quantizer.encode(z), probabilities.argmax(-1))


def test_gumbel_noise_draws_from_the_distribution():
    quantizer = LinearQuantizer(4, 2)
    z = torch.zeros(1, 4000, 2)
    with torch.no_grad():
        quantizer.projection.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]).log())
    codes = quantizer(z, generator(0)).codes
    shares = codes.flatten().bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.03)
    assert torch.equal(quantizer(z, generator(0)).codes, codes)
    assert (quantizer(z).codes == 3).all()


@pytest.mark.parametrize(
    "arguments", [{"codebook_update": "ema", "ema_decay": 0.8}, {}, {"quantizer_type": "linear"}], ids=str
)
def test_training_brings_the_codes_to_the_latents(arguments):
    quantizer = tiny(**arguments).train()
    centres = 3 * torch.randn(8, 4, generator=generator(4))
    parameters = [parameter for parameter in quantizer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.1) if parameters else None
    errors = []
    for step in range(60):
        draws = generator(5, step)
        z = centres[torch.randint(8, (64,), generator=draws)].view(4, 16, 4)
        z = quantizer.add_noise(z, torch.randn(z.shape, generator=draws))
        output = quantizer(z)
        if optimizer is not None:
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        errors.append((output.latents - z).square().mean().item())
    assert errors[-1] < 0.3 * errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_type": "pink"}, "noise_type 'pink'; choose one of additive, variance_preserving"),
        ({"quantizer_type": "fsq"}, "quantizer_type 'fsq'; choose one of nearest, linear"),
        ({"sigma": -0.1}, "sigma=-0.1"),
        ({"sigma": 1.5, "noise_type": "variance_preserving"}, r"sigma=1.5 must lie in \[0, 1.0\]"),
    ],
)
def test_impossible_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_bad_inputs():
    quantizer = tiny()
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 3, 5\).*\(2, 4, 3, 5\)"):
        quantizer.add_noise(latents(2), latents(1))
    with pytest.raises(ValueError, match=r"expected \(B, 4, h, w\)"):
        quantizer.encode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match=r"codes lie in \[0, 16\]"):
        quantizer.decode(torch.tensor([[0, 16]]))
    with pytest.raises(ValueError, match="leave the generator out"):
        quantizer(latents(), generator(0))
    with pytest.raises(ValueError, match="the nearest code is certain"):
        quantizer.probabilities(latents())
