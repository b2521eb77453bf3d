"""The Frechet distance has its closed form, and the random features see what is wrong with images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hfgen.counters import generator
from hfgen.data.sources import load_images
from hfgen.evaluation.features import RandomFeatures, extract_features
from hfgen.evaluation.frechet import GaussianStatistics, frechet_distance, whitened_frechet_distance


def _gaussian(mean, covariance) -> GaussianStatistics:
    return GaussianStatistics(torch.tensor(mean).double(), torch.tensor(covariance).double())


def _images(split: str, count: int) -> torch.Tensor:
    data = load_images("shapes", resolution=16, split=split, limit=count)
    return torch.stack([data[index]["pixels"] for index in range(count)])


def test_closed_forms():
    one, other = _gaussian([0.0], [[4.0]]), _gaussian([3.0], [[25.0]])
    assert frechet_distance(one, other) == pytest.approx(3**2 + (2 - 5) ** 2)
    assert whitened_frechet_distance(one, other, smallest=0) == pytest.approx((3**2 + (2 - 5) ** 2) / 25)
    # Rotated together, Gaussians with independent axes keep the sum over the axes.
    angle = torch.tensor(0.7).double()
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    turned = [
        GaussianStatistics(turn @ torch.tensor(mean).double(), turn @ torch.tensor(deviation).double().square().diag()
                           @ turn.T)
        for mean, deviation in (([1.0, 0.0], [1.0, 2.0]), ([0.0, 2.0], [4.0, 0.0]))
    ]  # fmt: skip
    assert frechet_distance(*turned) == pytest.approx(1 + 4 + 9 + 4)
    assert frechet_distance(turned[0], turned[0]) == pytest.approx(0, abs=1e-9)


def test_statistics_are_those_of_the_samples():
    features = torch.randn(50, 3, generator=generator(1))
    statistics = GaussianStatistics.of(features)
    torch.testing.assert_close(statistics.mean, features.double().mean(dim=0))
    torch.testing.assert_close(statistics.covariance, features.double().T.cov())
    assert GaussianStatistics.of(features[:, :1]).covariance.shape == (1, 1)


def test_whitening_makes_linear_changes_of_the_features_irrelevant():
    draws = generator(2)
    one, other = (torch.randn(200, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    change = torch.randn(4, 4, generator=draws, dtype=torch.float64) * torch.tensor([1.0, 10.0, 100.0, 1.0])
    before, after = (
        whitened_frechet_distance(
            GaussianStatistics.of(1.5 * one @ matrix), GaussianStatistics.of(other @ matrix), smallest=0
        )
        for matrix in (torch.eye(4, dtype=torch.float64), change)
    )
    assert after == pytest.approx(before, rel=1e-6) and before > 0.5


def test_random_features_rank_damage():
    extractor, images = RandomFeatures(), _images("test", 240)
    reference = GaussianStatistics.of(extract_features(extractor, _images("train", 1200)))

    def distance(changed):
        features = extract_features(extractor, changed.clamp(0, 255).round().to(torch.uint8))
        return whitened_frechet_distance(GaussianStatistics.of(features), reference)

    floating = images.float()
    noise = torch.randn(images.shape, generator=generator(3))
    blurred = F.avg_pool2d(F.pad(floating, (1, 1, 1, 1), mode="replicate"), 3, 1)
    collapsed = floating.mean(dim=0) + 0.1 * (floating - floating.mean(dim=0))
    clean = distance(floating)
    assert clean < distance(floating + 8 * noise) < distance(floating + 30 * noise)
    assert distance(blurred) > 1.5 * clean
    assert distance(collapsed) > 5 * clean


def test_random_features_are_fixed():
    images = _images("test", 3)
    features = RandomFeatures()(images)
    assert features.shape == (3, RandomFeatures().num_features)
    torch.manual_seed(5)
    torch.testing.assert_close(RandomFeatures()(images), features, rtol=0, atol=0)
    torch.testing.assert_close(extract_features(RandomFeatures(), images, batch_size=2), features)
    assert not torch.equal(RandomFeatures(seed=1)(images), features)


def test_bad_input():
    with pytest.raises(ValueError, match="at least 2 rows"):
        GaussianStatistics.of(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        GaussianStatistics.of(torch.tensor([[0.0], [float("nan")]]))
    one, two = GaussianStatistics.of(torch.eye(2)), GaussianStatistics.of(torch.eye(3))
    for distance in (frechet_distance, whitened_frechet_distance):
        with pytest.raises(ValueError, match="2 and 3 features"):
            distance(one, two)
    with pytest.raises(ValueError, match="to_uint8"):
        RandomFeatures()(torch.zeros(1, 3, 8, 8))
