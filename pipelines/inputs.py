"""Arguments of image pipelines in the form that they work with: images, masks, and what all check alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

Images = PIL.Image.Image | Sequence[PIL.Image.Image] | Tensor


def to_pixels(image: Images) -> Tensor:
    """(B, 3, H, W) float in [-1, 1].

    Raises:
        ValueError: neither pictures of one size nor a tensor, or a tensor of another shape or range.
    """
    if isinstance(image, Tensor):
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"An image tensor must be (B, 3, H, W) in [-1, 1], got shape {tuple(image.shape)}.")
        if not image.is_floating_point() or not (image.min() >= -1.001 and image.max() <= 1.001):  # NaN neither
            raise ValueError(
                f"An image tensor must be float in [-1, 1], got {image.dtype} from {image.min():g} to "
                f"{image.max():g}; from uint8 use image / 127.5 - 1."
            )
        return image
    images = [image] if isinstance(image, PIL.Image.Image) else image
    if not isinstance(images, Sequence) or not images or not all(isinstance(one, PIL.Image.Image) for one in images):
        raise ValueError(
            f"Expected a PIL image, a list of at least one, or a tensor (B, 3, H, W) in [-1, 1], got {_kind(images)}."
        )
    sizes = {one.size for one in images}
    if len(sizes) > 1:
        raise ValueError(f"Images of one batch must have one size, got {sorted(sizes)}; resize them.")
    arrays = [np.asarray(one.convert("RGB"), dtype=np.float32) / 127.5 - 1 for one in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _kind(value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        return f"a {type(value).__name__}"
    return f"a {type(value).__name__} of {type(value[0]).__name__}" if value else f"an empty {type(value).__name__}"


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


def check_count(name: str, count: int, least: int) -> None:
    """Raise a ``ValueError`` for a number below the least."""
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}.")


def check_common(num_images_per_prompt: int, guidance_scale: float | None, *, published: str = "") -> None:
    """Raise a ``ValueError`` for numbers out of range, which says how the scale was ``published`` elsewhere."""
    check_count("num_images_per_prompt", num_images_per_prompt, 1)
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


def callback_inputs(callback: Callable | None, names: Sequence[str]) -> Sequence[str]:
    """The tensors that a callback gets: those that one of diffusers' classes asks for itself, else ``names``."""
    return callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else names


def after_callback(returned: Mapping[str, Any] | None, name: str, value: Any) -> Any:
    """The tensor to go on with: what a callback returned under ``name``, else ``value``, also if it returned None."""
    return value if returned is None else returned.get(name, value)


def check_callback_inputs(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise a ``ValueError`` for tensors that a callback asks for and does not get."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}; choose from {known}.")
