"""The losses of the open implementation of Transfusion, github.com/lucidrains/transfusion-pytorch.

Text and images are weighted by their share of the sequence, where the paper has a constant (arXiv 2408.11039, eq. 4).

Legend: B sequences, L + 1 ids, V ids of the vocabulary, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen.models.layers.mixed_sequence import PADDING_ID, slot_id
from hfgen.models.layers.sequence_mask import image_runs

_IGNORED = -1


@dataclass
class TransfusionFlowLosses:
    """``total``, the weighted sum of ``text`` and of ``flow``, the mean squared error of each modality that occurs."""

    total: Tensor
    text: Tensor
    flow: list[Tensor]


def next_token_labels(input_ids: Tensor, null_id: int) -> Tensor:
    """Targets of the tokens but the last.

    Args:
        input_ids: (B, L + 1) int64 with slots and padding, see :mod:`hfgen.models.layers.mixed_sequence`.
        null_id: what stands for text that was dropped; it is no target.

    Returns:
        (B, L) int64; -1, which the loss ignores, after a place of an image and where its place, padding or the null id
        would be the target. So the id that closes an image is never learned: it is appended by rule.
    """
    current, target = input_ids[:, :-1], input_ids[:, 1:]
    ignored = (current < PADDING_ID) | (target < 0) | (target == null_id)
    return target.masked_fill(ignored, _IGNORED)


def text_loss(logits: Tensor, labels: Tensor, num_text_tokens: int | None = None) -> Tensor:
    """Mean cross-entropy; 0 if all labels are ignored.

    Args:
        logits: (B, L, V).
        labels: (B, L) int64, -1 is ignored.
        num_text_tokens: only the first so many ids compete, as where sequences are text alone.
    """
    logits = logits[..., :num_text_tokens].float().flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten(), ignore_index=_IGNORED, reduction="sum")
    return losses / (labels != _IGNORED).sum().clamp(min=1)


def transfusion_flow_loss(
    logits: Tensor,
    input_ids: Tensor,
    null_id: int,
    sample: Sequence[Tensor] = (),
    targets: Sequence[Tensor] = (),
    *,
    text_weight: float = 1.0,
    flow_weight: float = 1.0,
) -> TransfusionFlowLosses:
    """The loss of mixed sequences.

    Args:
        logits: (B, L, V) of the tokens but the last.
        input_ids: (B, L + 1) int64.
        null_id: see :func:`next_token_labels`.
        sample: what the network predicts for the N images, in order of appearance over the flattened batch.
        targets: noise minus data of the same images.
        text_weight, flow_weight: factors beside the shares.

    Raises:
        ValueError: predictions, targets and slots are not as many.
    """
    labels = next_token_labels(input_ids, null_id)
    is_image = input_ids < PADDING_ID
    runs = image_runs(is_image)
    starts = is_image & F.pad(runs[:, 1:] != runs[:, :-1], (1, 0), value=True)
    modalities = [slot_id(0) - slot for slot in input_ids[starts].tolist()]
    if not len(sample) == len(targets) == len(modalities):
        raise ValueError(
            f"{len(sample)} predictions, {len(targets)} targets and {len(modalities)} images in the ids; they must be "
            "as many."
        )
    num_tokens = (input_ids != PADDING_ID).sum()
    text = text_loss(logits, labels)
    total = text_weight * text * (labels != _IGNORED).sum() / num_tokens
    flow = []
    for modality in sorted(set(modalities)):
        errors = [
            (one - target).float().square().flatten()
            for one, target, kind in zip(sample, targets, modalities)
            if kind == modality
        ]
        flow.append(torch.cat(errors).mean())
        total = total + flow_weight * flow[-1] * (input_ids == slot_id(modality)).sum() / num_tokens
    return TransfusionFlowLosses(total, text, flow)
