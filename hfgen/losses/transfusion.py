"""The loss of Transfusion: next tokens of text, and noise or velocity of images (arXiv 2408.11039, sections 3.1, 4.1).

Legend: B batch, L tokens of a sequence, V vocabulary; N images of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
IMAGE_WEIGHT = 5.0


@dataclass(frozen=True)
class TransfusionLoss:
    """Terms of a batch, float32.

    Attributes:
        loss: what is trained, ``text + image_weight * image``.
        text: mean cross-entropy of the labelled positions, in nats; 0 if there are none.
        image: mean over the images of their squared errors; 0 without images.
        per_image: (N,), the mean squared error of each image.
    """

    loss: Tensor
    text: Tensor
    image: Tensor
    per_image: Tensor


def text_labels(
    input_ids: Tensor,
    *,
    pad_token_id: int,
    image_token_id: int | None = None,
    boi_token_id: int | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """What each position has to predict.

    The label of position i is the id at i + 1. There is none where either of the two is padding or a slot of an image,
    where the input is the begin of an image, or where the next id belongs to another sequence. So "begin of image" is
    a target, from which a model learns when to draw, and "end of image", which is appended by rule, is not. For
    discrete images, whose codes and markers are predicted like words, leave ``image_token_id`` and ``boi_token_id``
    out.

    Args:
        input_ids: (B, L) int64.
        pad_token_id, image_token_id, boi_token_id: special ids.
        segment_ids: (B, L) int64 of packed sequences.

    Returns:
        (B, L) int64, -100 where there is no label, as at the last position.
    """
    now, following = input_ids[:, :-1], input_ids[:, 1:]
    ignored = (now == pad_token_id) | (following == pad_token_id)
    if image_token_id is not None:
        ignored |= (now == image_token_id) | (following == image_token_id)
    if boi_token_id is not None:
        ignored |= now == boi_token_id
    if segment_ids is not None:
        ignored |= segment_ids[:, :-1] != segment_ids[:, 1:]
    return F.pad(following.masked_fill(ignored, IGNORED), (0, 1), value=IGNORED)


def limit_times(times: Tensor, image_first: Tensor, limit: float = 0.5) -> Tensor:
    """Less noise for images that come before their text, which is then read off the noisy image.

    Args:
        times: (N,) float in [0, 1], 1 is noise: flow times, or the timesteps of a diffusion divided by their number.
        image_first: (N,) boolean.
        limit: the largest time of these images; 0.5 are the paper's 500 of 1000 steps.

    Returns:
        (N,) ``times``, scaled into [0, limit] where the image comes first.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit={limit} must lie in (0, 1].")
    return torch.where(image_first, limit * times, times)


def transfusion_loss(
    logits: Tensor,
    labels: Tensor,
    prediction: Tensor | None = None,
    target: Tensor | None = None,
    *,
    image_weight: float = IMAGE_WEIGHT,
) -> TransfusionLoss:
    """Cross-entropy of the text plus the weighted squared error of the images.

    Args:
        logits: (B, L, V) float.
        labels: (B, L) int64, -100 where there is none, such as those of :func:`text_labels`.
        prediction: (N, C, H, W) float, what the network says of the images; None without images.
        target: like ``prediction``: the noise, or the velocity that the scheduler defines.
        image_weight: lambda of the paper.

    Raises:
        ValueError: only one of prediction and target, or other shapes.
    """
    if (prediction is None) != (target is None) or (target is not None and target.shape != prediction.shape):
        shapes = [None if each is None else tuple(each.shape) for each in (prediction, target)]
        raise ValueError(f"prediction and target must have the same shape, got {shapes[0]} and {shapes[1]}.")
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])}.")
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    text = total / (labels != IGNORED).sum().clamp(min=1)
    per_image = text.new_zeros(0) if prediction is None else _image_errors(prediction, target)
    image = per_image.sum() / max(len(per_image), 1)
    return TransfusionLoss(text + image_weight * image, text, image, per_image)


def _image_errors(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
