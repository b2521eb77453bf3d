"""Arguments of image pipelines in the form that they work with: class labels, images and masks to edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import torch
from torch import Tensor

ClassLabels = int | str | Sequence[int | str] | Tensor
Images = PIL.Image.Image | Sequence[PIL.Image.Image] | Tensor


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


def to_pixels(image: Images) -> Tensor:
    """(B, 3, H, W) float in [-1, 1].

    Raises:
        ValueError: a tensor of another shape or range.
    """
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"An image tensor must be (B, 3, H, W) in [-1, 1], got shape {tuple(image.shape)}.")
        if not image.is_floating_point() or image.min() < -1.001 or image.max() > 1.001:
            raise ValueError(
                f"An image tensor must be float in [-1, 1], got {image.dtype} from {image.min():g} to "
                f"{image.max():g}; from uint8 use image / 127.5 - 1."
            )
        return image
    images = [image] if isinstance(image, PIL.Image.Image) else list(image)
    arrays = [np.asarray(one.convert("RGB"), dtype=np.float32) / 127.5 - 1 for one in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def to_mask(mask_image: PIL.Image.Image | Tensor) -> Tensor:
    """(B, 1, H, W) float in [0, 1].

    Raises:
        ValueError: a tensor of another shape or range.
    """
    if not isinstance(mask_image, Tensor):
        mask_image = torch.from_numpy(np.asarray(mask_image.convert("L"), dtype=np.float32) / 255)
    if not 2 <= mask_image.ndim <= 4 or (mask_image.ndim == 4 and mask_image.shape[1] != 1):
        raise ValueError(f"mask_image must be (H, W), (B, H, W) or (B, 1, H, W), got shape {tuple(mask_image.shape)}.")
    mask = mask_image.float().reshape(-1, 1, *mask_image.shape[-2:])
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"mask_image must lie in [0, 1] (1 is painted anew), got {mask.min():g} to {mask.max():g}.")
    return mask


def check_common(num_images_per_prompt: int, guidance_scale: float | None, *, published: str = "") -> None:
    """Raise a ``ValueError`` for numbers out of range, which says how the scale was ``published`` elsewhere."""
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}.")
    if guidance_scale is not None and not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        hint = f" {published}" if published else ""
        raise ValueError(
            f"guidance_scale must be a finite number of at least 0 (1 is off), got {guidance_scale}.{hint}"
        )


def check_generators(generator: torch.Generator | Sequence[torch.Generator] | None, batch_size: int) -> None:
    """Raise a ``ValueError`` for a list of generators that is not as long as the batch."""
    if isinstance(generator, Sequence) and len(generator) != batch_size:
        raise ValueError(
            f"Got {len(generator)} generators for {batch_size} images; give one generator, or one per image."
        )


def check_callback_inputs(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ``ValueError`` for tensors that a callback asks for and does not get."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}; choose from {known}.")
