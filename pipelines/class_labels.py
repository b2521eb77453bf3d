"""Classes of image pipelines: labels by index or name, and the names as a pipeline saves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ClassLabels = int | str | Sequence[int | str] | Tensor


def class_ids(
    class_labels: ClassLabels, names: Sequence[str] | None, num_classes: int, *, unconditional: bool
) -> list[int]:
    """Class labels, given by index or name, as a list of indices.

    Args:
        class_labels: one or several.
        names: name of each class, None if there are none.
        num_classes: how many there are.
        unconditional: whether ``num_classes`` itself stands for no class.

    Raises:
        ValueError: an unknown name, an index that is no class, or no labels at all.
    """
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.flatten().tolist()
    elif isinstance(class_labels, (int, str)):
        class_labels = [class_labels]
    names = list(names or ())
    ids = []
    for label in class_labels:
        if isinstance(label, str):
            if label not in names:
                known = ", ".join(names) if names else "none, this pipeline stores no class names"
                raise ValueError(f"Unknown class name {label!r}; known are: {known}.")
            label = names.index(label)
        if not 0 <= label < num_classes + unconditional:
            more = f", and {num_classes} (or None) is unconditional" if unconditional else ""
            raise ValueError(
                f"Class label {label} is out of range; the transformer has the classes 0 to {num_classes - 1}{more}."
            )
        ids.append(label)
    if not ids:
        raise ValueError("class_labels is empty; give at least one label.")
    return ids


def label_rows(
    class_labels: ClassLabels | None,
    names: Sequence[str] | None,
    num_classes: int,
    num_images_per_prompt: int,
    device: torch.device | str,
) -> Tensor:
    """Labels as (B,) int64, each repeated ``num_images_per_prompt`` times; None is ``num_classes``, no class.

    Raises:
        ValueError: as :func:`class_ids`.
    """
    labels = num_classes if class_labels is None else class_labels
    ids = class_ids(labels, names, num_classes, unconditional=True)
    return torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt)


def ordered_class_names(class_names: Sequence[str] | Mapping[str, str] | None) -> list[str] | None:
    """Class names in order, of a list or of the map from labels to names that a pipeline saves."""
    if isinstance(class_names, Mapping):
        return [class_names[str(label)] for label in range(len(class_names))]
    return None if class_names is None else list(class_names)


def saved_class_names(class_names: Sequence[str] | None) -> dict[str, str] | None:
    """Class names in order as the map from labels to names that a pipeline saves.

    No list: loading from the Hub takes every list in model_index.json for a component.
    """
    return None if class_names is None else {str(label): name for label, name in enumerate(class_names)}


class ClassNamesMixin:
    """A pipeline that keeps the names of its classes in its configuration, as of :func:`saved_class_names`."""

    @property
    def class_names(self) -> list[str] | None:
        """The name of each class in order, None if the pipeline has none."""
        names = self.config.class_names
        return None if names is None else list(names.values())
