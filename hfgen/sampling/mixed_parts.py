"""Texts and images as one sequence of ids, for the open implementation of Transfusion.

Legend: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

MixedPart = Tensor | tuple[int, Tensor]

PADDING_ID = -1


class MixedFlowModel(Protocol):
    """What sampling asks of the transformer."""

    config: Any
    vocabulary: Any
    device: torch.device
    dtype: torch.dtype

    def new_cache(self, batch_size: int, max_length: int) -> Any: ...

    def layout(self, input_ids: Tensor, cache: Any = None) -> Any: ...

    def extend(
        self, layout: Any, cache: Any, latents: Any = None, timesteps: Any = None, num_logits: int | None = None
    ) -> Any: ...

    def grid_of(self, latents: Tensor, modality: int) -> tuple[int, ...]: ...

    def slots(self, modality: int, grid: tuple[int, ...]) -> list[int]: ...


def assemble(
    transformer: MixedFlowModel, parts: Sequence[MixedPart], *, end: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """A sequence of ids and its images in order of appearance.

    Args:
        transformer: for its vocabulary and modalities.
        parts: texts, (L,) int64 ids, and images, ``(modality, latents)`` or latents of modality 0 as a float tensor.
        end: close the sequence, as in training.

    Returns:
        (L,) int64: begin, texts, and for each image its opening, slots and closing id.

    Raises:
        ValueError: a part that is neither; latents that do not fit their modality.
    """
    vocabulary = transformer.vocabulary
    ids: list[int] = [vocabulary.bos_id]
    images: list[Tensor] = []
    for part in parts:
        modality, latents = part if isinstance(part, tuple) else (0, part)
        if latents.is_floating_point():
            grid = transformer.grid_of(latents, modality)
            ids += vocabulary.opening(modality, grid) + transformer.slots(modality, grid)
            ids.append(vocabulary.eom_id(modality))
            images.append(latents)
        elif isinstance(part, tuple) or latents.ndim != 1:
            raise ValueError(
                f"A part of the sequence is {latents.dtype} of shape {tuple(latents.shape)}; expected one-dimensional "
                "integer ids, or the float latents of an image."
            )
        else:
            ids += latents.tolist()
    if end:
        ids.append(vocabulary.eos_id)
    return torch.tensor(ids, device=transformer.device), images


def stack_sequences(sequences: Sequence[Tensor], *, left: bool = False) -> Tensor:
    """Sequences (L_b,) as one (B, L) with padding on the right, for training, or on the ``left``, for sampling."""
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(list(sequences), True, PADDING_ID, padding_side=side)
