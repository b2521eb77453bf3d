"""Sequences of texts and images that grow while a pipeline reads and writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hfgen.models.generators.transfusion import TransfusionTransformer
from hfgen.pipelines.transfusion_images import ImageForm
from hfgen.pipelines.transfusion_text import TransfusionVocabulary
from hfgen.sampling.transfusion import extend_images, extend_text
from hfgen.sampling.transfusion_cache import TransfusionCache


class MixedSequence:
    """One sequence per row; the rows have the same ids but can have different images.

    Ids wait until an image or :meth:`read` needs them, so that the markers around images cost no passes of their own.

    Args:
        transformer: that goes through the sequences.
        num_rows: R.
        max_length: tokens of a sequence.
        device: of the transformer's inputs.

    Attributes:
        cache: what the sequences have gone through.
        text: ids of the text after the last image, or of all if there is none.
    """

    def __init__(self, transformer: TransfusionTransformer, num_rows: int, max_length: int, device: torch.device):
        self.transformer, self.device = transformer, device
        self.cache = TransfusionCache(transformer.config.num_layers, max_length, [0] * num_rows)
        self.text: list[int] = []
        self._waiting: list[int] = []
        self._hidden_states: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of a sequence so far."""
        return self.cache.length + len(self._waiting)

    @property
    def room(self) -> int:
        """Tokens for which there is place."""
        return self.cache.max_length - self.length

    def add_text(self, ids: Sequence[int]) -> None:
        """Text of all rows."""
        self.text += ids
        self._waiting += ids

    def add_marker(self, token: int) -> None:
        """The beginning of the sequences, or an edge of an image."""
        self.text = []
        self._waiting.append(token)

    def add_images(self, images: Tensor) -> None:
        """An image for each row, between its markers: latents (R, C, h, w) without noise, or codes (R, n)."""
        self.open_image()
        self.close_image(images)

    def open_image(self) -> Tensor:
        """Add the marker that begins an image; returns the states (R, D) of it."""
        self.add_marker(self.transformer.config.boi_token_id)
        return self.read()

    def close_image(self, images: Tensor) -> None:
        """Add the images after :meth:`open_image`, as of :meth:`add_images`, and the marker that ends them."""
        config = self.transformer.config
        if self.transformer.is_discrete:
            self._hidden_states = extend_text(self.transformer, self.cache, images + config.code_offset)[:, -1]
        else:
            clean = torch.zeros(len(images), dtype=torch.long, device=images.device)
            extend_images(self.transformer, self.cache, images, clean, causal=not config.bidirectional_images)
        if config.eoi_token_id is not None:
            self.add_marker(config.eoi_token_id)

    def read(self) -> Tensor:
        """Run the ids that wait; returns the states (R, D) of the last token."""
        if self._waiting:
            ids = torch.tensor(self._waiting, device=self.device).expand(len(self.cache.padding), -1)
            self._waiting = []
            self._hidden_states = extend_text(self.transformer, self.cache, ids)[:, -1]
        return self._hidden_states


def begin_sequence(
    transformer: TransfusionTransformer,
    vocabulary: TransfusionVocabulary,
    form: ImageForm,
    parts: Sequence[str | Tensor],
    room: int,
    device: torch.device,
) -> MixedSequence:
    """Sequences of texts and images, with ``room`` for more tokens as far as the context has.

    Args:
        transformer: that goes through them.
        vocabulary: of the texts.
        form: of the images.
        parts: texts, the same in all rows, and pixels (R, 3, H, W) in [-1, 1].
        room: for tokens after them.
        device: of the transformer's inputs.

    Raises:
        ValueError: they are longer than the context, or cannot be encoded.
    """
    contents: list[list[int] | Tensor] = []
    length, num_rows = 1, 1
    for part in parts:
        if isinstance(part, Tensor):
            contents.append(part)
            length += form.num_tokens(*part.shape[-2:]) + 2
            num_rows = len(part)
        elif part != "":
            contents.append(vocabulary.encode(part))
            length += len(contents[-1])
    check_length(transformer, length)
    max_length = min(length + room, transformer.config.context_length)
    sequence = MixedSequence(transformer, num_rows, max_length, device)
    sequence.add_marker(transformer.config.bos_token_id)
    for content in contents:
        if isinstance(content, Tensor):
            sequence.add_images(form.encode(content.to(device)))
        else:
            sequence.add_text(content)
    return sequence


def check_length(transformer: TransfusionTransformer, length: int) -> None:
    """Raise a ``ValueError`` for a sequence of ``length`` tokens that is longer than the context."""
    context = transformer.config.context_length
    if length > context:
        raise ValueError(
            f"The sequence needs {length} tokens with its images, but the transformer's context has {context}; "
            "use shorter texts, or fewer or smaller images."
        )
