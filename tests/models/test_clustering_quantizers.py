"""The entropy term and the clustering of codebooks: bounds, updates, and several processes."""

import math

import pytest
import torch

from hfgen import ClusteringVectorQuantizer, EntropyVectorQuantizer
from hfgen.models.quantizers.entropy import codebook_entropy_loss
from support.clustering_runs import step
from support.torchrun import ROOT, torchrun


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("assignment", ["softmax", "argmax"])
def test_bounds_of_the_entropy(assignment):
    num_codes = 8
    sure_and_spread = 1.0 - torch.eye(num_codes)
    sure_of_one = sure_and_spread[:1].expand(num_codes, -1)
    unsure = torch.zeros(num_codes, num_codes)
    losses = [codebook_entropy_loss(d, 0.01, assignment).item() for d in (sure_and_spread, sure_of_one, unsure)]
    # E[H(p)] - H(E[p]): best where every vector is sure of a code of its own. One-hot choices of vectors without any
    # preference are all the first code, whose cross-entropy is the logarithm of the number of codes.
    unsure_value = 0.0 if assignment == "softmax" else math.log(num_codes)
    assert losses == pytest.approx([-math.log(num_codes), 0.0, unsure_value], abs=1e-3)
    assert codebook_entropy_loss(draws(3, 5, num_codes).abs(), 1.0, assignment).item() > -math.log(num_codes)


@pytest.mark.parametrize("assignment", ["softmax", "argmax"])
def test_entropy_trains_latents_and_codes(assignment):
    quantizer = EntropyVectorQuantizer(8, 4, entropy_temperature=1.0, entropy_assignment=assignment)
    plain = EntropyVectorQuantizer(8, 4, entropy_weight=0)
    plain.load_state_dict(quantizer.state_dict())
    latents = draws(2, 6, 4).requires_grad_()
    output = quantizer(latents)
    assert output.losses.keys() == {"commitment", "codebook", "entropy"}
    torch.testing.assert_close(output.loss.detach(), sum(output.losses.values()))
    entropy = output.loss - plain(latents).loss
    for gradient in torch.autograd.grad(entropy, [latents, quantizer.embedding.weight]):
        assert gradient.abs().max() > 0
    assert quantizer.encode(latents).equal(quantizer.distances(latents).argmin(-1))
    probabilities = quantizer.soft_codes(latents, temperature=0.5)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 6))


def test_entropy_arguments():
    with pytest.raises(ValueError, match="entropy_assignment='hard' must be 'softmax' or 'argmax'"):
        EntropyVectorQuantizer(8, 4, entropy_assignment="hard")
    with pytest.raises(ValueError, match="entropy_temperature=0 must be above 0"):
        EntropyVectorQuantizer(8, 4, entropy_temperature=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_clustering_follows_the_published_rule(normalize):
    quantizer = ClusteringVectorQuantizer(6, 3, normalize=normalize).train()
    latents = draws(2, 5, 3)
    codebook, rows = quantizer.embedding.weight.detach().clone(), latents.flatten(0, 1)
    with torch.no_grad():
        codes = quantizer(latents).codes
    unit = torch.nn.functional.normalize if normalize else lambda x, dim: x
    nearest = torch.cdist(unit(codebook, dim=-1), unit(rows, dim=-1)).argmin(1)
    usage = 0.01 * codes.flatten().bincount(minlength=6) / 10
    pull = torch.exp(-usage * 6 * 10 / 0.01 - 1e-3)[:, None]
    torch.testing.assert_close(quantizer.usage, usage)
    torch.testing.assert_close(quantizer.embedding.weight.detach(), codebook * (1 - pull) + rows[nearest] * pull)


def test_clustering_of_grids_is_that_of_sequences():
    grid, sequence = (ClusteringVectorQuantizer(6, 3) for _ in range(2))
    sequence.load_state_dict(grid.state_dict())
    latents = draws(2, 3, 2, 4)
    with torch.no_grad():
        grid(latents)
        sequence(latents.flatten(2).transpose(1, 2))
    assert torch.equal(grid.embedding.weight, sequence.embedding.weight)


def test_two_processes_are_one(tmp_path):
    torchrun(ROOT / "tests" / "support" / "clustering_runs.py", tmp_path)
    expected = step(rank=0, world_size=1)
    assert expected["usage"].sum() > 0 and expected["real"] > 0
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value)
