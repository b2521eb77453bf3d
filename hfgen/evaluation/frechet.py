"""The Frechet distance between the Gaussians that fit two sets of features (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, features: Tensor) -> GaussianStatistics:
        """Those of features (N, D); the covariance is divided by N - 1.

        Raises:
            ValueError: fewer than two rows, another shape, or values that are not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features have shape {tuple(features.shape)}, expected (N, D) with at least 2 rows.")
        if not features.isfinite().all():
            raise ValueError("features have values that are not finite: look at the images or the extractor.")
        features = features.double()
        return cls(features.mean(dim=0), features.T.cov().reshape(features.shape[1], features.shape[1]))


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, the squared 2-Wasserstein distance of the Gaussians.

    The trace of the root is the sum of the square roots of the eigenvalues of ``C1 C2``, which are those of the
    symmetric ``R C2 R`` with ``R R = C1``: real, also for fewer samples than features. With N samples the distance of
    two equal distributions is above 0 and falls with N, so compare distances of equal N only.

    Raises:
        ValueError: different numbers of features.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"{len(first.mean)} and {len(second.mean)} features cannot be compared: use one extractor.")
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    shared = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp_min(0).sqrt().sum()
    distance = (first.mean - second.mean).square().sum()
    distance = distance + first.covariance.trace() + second.covariance.trace() - 2 * shared
    return distance.clamp_min(0).item()


def whitened_frechet_distance(
    statistics: GaussianStatistics, reference: GaussianStatistics, *, smallest: float = 1e-4
) -> float:
    """The Frechet distance after the linear map that makes the covariance of ``reference`` the identity.

    Every direction then counts by how it differs from the reference, not by its variance, and linear changes of the
    features change nothing.

    Args:
        statistics, reference: the second is of as many images as there are.
        smallest: added to the variances of the reference, as a share of the largest, so that directions in which it
            hardly varies do not decide.

    Raises:
        ValueError: different numbers of features.
    """
    if statistics.mean.shape != reference.mean.shape:
        raise ValueError(
            f"{len(statistics.mean)} and {len(reference.mean)} features cannot be compared: use one extractor."
        )
    values, vectors = torch.linalg.eigh(reference.covariance)
    whitening = vectors / (values.clamp_min(0) + smallest * values.max()).sqrt()
    return frechet_distance(
        *(
            GaussianStatistics(each.mean @ whitening, whitening.T @ each.covariance @ whitening)
            for each in (statistics, reference)
        )
    )
