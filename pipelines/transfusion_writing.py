"""How a mixed-modal transformer writes: texts about images, and sequences of text and images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hfgen.pipelines.transfusion_painting import Context
from hfgen.pipelines.transfusion_sequence import MixedSequence
from hfgen.pipelines.transfusion_text import GrowingText, TransfusionVocabulary
from hfgen.sampling.logits import exponential_draws
from hfgen.sampling.transfusion import text_tokens


@dataclass(frozen=True)
class TextSettings:
    """How tokens are drawn: the arguments of a call. ``generator`` is one for the batch, or one per row."""

    temperature: float
    top_k: int
    top_p: float
    generator: torch.Generator | Sequence[torch.Generator] | None


def draw_tokens(sequence: MixedSequence, blocked: Tensor, settings: TextSettings) -> Iterator[Tensor]:
    """The next tokens (R,) int64 of the rows, without end; see :func:`hfgen.sampling.transfusion.text_tokens`."""
    return text_tokens(
        sequence.transformer,
        sequence.cache,
        sequence.read(),
        blocked,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        draws=partial(exponential_draws, generator=settings.generator, device=sequence.device),
    )


def write_texts(
    sequence: MixedSequence,
    vocabulary: TransfusionVocabulary,
    settings: TextSettings,
    max_new_tokens: int,
    on_token: Callable[[], None],
) -> tuple[list[str], int]:
    """Go on with text alone until every row has ended.

    Args:
        sequence: of R rows.
        vocabulary: of the text.
        settings: of the draws.
        max_new_tokens: of each row.
        on_token: called after each token.

    Returns:
        R texts, and how many tokens the longest has, with its end.
    """
    config, device = sequence.transformer.config, sequence.device
    blocked = vocabulary.blocked(config.boi_token_id, device=device)
    drawn, ended = [], torch.zeros(len(sequence.cache.padding), dtype=torch.bool, device=device)
    for tokens in itertools.islice(draw_tokens(sequence, blocked, settings), max_new_tokens):
        drawn.append(tokens)
        on_token()
        if config.eos_token_id is not None:
            ended |= tokens == config.eos_token_id
            if ended.all():
                break
    rows = torch.stack(drawn, dim=1).tolist()
    rows = [row[: row.index(config.eos_token_id)] if config.eos_token_id in row else row for row in rows]
    return [vocabulary.decode(row) for row in rows], len(drawn)


def write_mixed(
    sequence: MixedSequence,
    vocabulary: TransfusionVocabulary,
    settings: TextSettings,
    *,
    paint: Callable[[Context], Tensor],
    num_image_tokens: int,
    max_new_tokens: int,
    max_images: int,
    begin_with_image: bool,
    on_token: Callable[[str], None],
) -> Iterator[str | Tensor]:
    """Go on with text and images as the transformer decides.

    Args:
        sequence: of one row.
        vocabulary: of the text.
        settings: of the draws of text.
        paint: draws an image after a context: latents (1, C, h, w) or codes (1, n).
        num_image_tokens: of an image.
        max_new_tokens: of text.
        max_images: after so many the transformer begins no more, nor where an image does not fit into the sequence.
        begin_with_image: draw an image first, without asking the transformer.
        on_token: called with what each token adds to the text.

    Yields:
        Texts and images, in order and complete.
    """
    config = sequence.transformer.config
    blocked = vocabulary.blocked(device=sequence.device)
    draw_image = begin_with_image
    while True:
        if draw_image:
            image = paint(Context(sequence.cache, [0], sequence.open_image()))
            yield image
            max_images -= 1
            if not max_new_tokens:
                return
            sequence.close_image(image)
        text, token, stream = GrowingText(vocabulary), None, draw_tokens(sequence, blocked, settings)
        while max_new_tokens and sequence.room and token not in (config.boi_token_id, config.eos_token_id):
            # The last token has not run yet; an image takes its tokens and two markers.
            blocked[config.boi_token_id] = not max_images or sequence.room < num_image_tokens + 3
            token = next(stream).item()
            max_new_tokens -= 1
            on_token(text.add(token))
        if text.text:
            yield text.text
        draw_image = token == config.boi_token_id
        if not draw_image:
            return
