"""The validation of generators of classes."""

from __future__ import annotations

from torch import Tensor

from hfgen.evaluation.judge import judge_labels
from hfgen.images import make_grid
from hfgen.training.task import Validation

_JUDGED = ("shapes", "shapes:single")  # data sets whose labels the judge knows


def class_validation(dataset: str, pixels: Tensor, labels: Tensor) -> Validation:
    """A grid of images that were made for classes, and how right they are.

    Args:
        dataset: that the generator learns from.
        pixels: (B, 3, H, W) in [-1, 1].
        labels: (B,) int64.

    Returns:
        The picture ``samples``. For the built-in shapes with one object the metrics ``judge_*`` of
        :func:`hfgen.evaluation.judge.judge_labels`.
    """
    metrics = judge_labels(pixels, labels) if dataset in _JUDGED else {}
    return Validation({"samples": make_grid(pixels)}, {f"judge_{name}": value for name, value in metrics.items()})
