"""Stochastic depth (Huang et al., arXiv 1603.09382)."""

from __future__ import annotations

from torch import Tensor


def drop_path(branch: Tensor, probability: float, training: bool) -> Tensor:
    """Zero the residual branch of a sample with ``probability`` and rescale the others so that the mean stays."""
    if probability == 0.0 or not training:
        return branch
    keep = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(1.0 - probability)
    return branch * (keep / (1.0 - probability))
