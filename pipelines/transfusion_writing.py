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
    on_text: Callable[[list[str]], None] | None = None,
) -> tuple[list[str], int]:
    """Go on with text alone until every row has ended.

    Args:
        sequence: of R rows.
        vocabulary: of the text.
        settings: of the draws.
        max_new_tokens: of each row.
        on_token: called after each token.
        on_text: called after each token with what it adds to each text, also nothing.

    Returns:
        R texts, and how many tokens the longest has, with its end.
    """
    config = sequence.transformer.config
    blocked = vocabulary.blocked(config.boi_token_id, device=sequence.device)
    texts, count = [GrowingText(vocabulary, sequence.text) for _ in sequence.cache.padding], 0
    for tokens in itertools.islice(draw_tokens(sequence, blocked, settings), max_new_tokens):
        count += 1
        for text, token in zip(texts, tokens.tolist()):
            text.add(token, ends=token == config.eos_token_id)
        on_token()
        if on_text is not None:
            on_text([text.piece() for text in texts])
        if all(text.ended for text in texts):
            break
    if on_text is not None and any(rest := [text.piece(last=True) for text in texts]):
        on_text(rest)
    return [text.text for text in texts], count


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
    on_token: Callable[[str, int], None],
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
        on_token: called with what each token adds to the text, and with 1; with 0 for what had to wait for the end.

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
        text, stream = GrowingText(vocabulary, sequence.text), draw_tokens(sequence, blocked, settings)
        draw_image = text_ended = False
        waiting = 0  # the last token, which has not run yet
        while max_new_tokens and sequence.room >= waiting and not draw_image and not text_ended:
            # An image takes its tokens and two markers.
            blocked[config.boi_token_id] = not max_images or sequence.room < waiting + num_image_tokens + 2
            token = next(stream).item()
            waiting = 1
            max_new_tokens -= 1
            draw_image, text_ended = token == config.boi_token_id, token == config.eos_token_id
            text.add(token, ends=text_ended)
            on_token(text.piece(), 1)
        if rest := text.piece(last=True):
            on_token(rest, 0)
        if text.text:
            yield text.text
        if not draw_image:
            return
