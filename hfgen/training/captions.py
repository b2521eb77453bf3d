"""The captions of a run, and the tokenizer that reads them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice

from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfgen.data.text import make_tokenizer, read_captions, train_sentencepiece
from hfgen.data.token_cache import TokenCache

logger = logging.getLogger(__name__)

MAX_CAPTIONS = 100_000  # that are looked at before the training


def first_captions(data: Dataset) -> list[str]:
    """The captions of the first images of a data set or cache, at most ``MAX_CAPTIONS``."""
    if isinstance(data, TokenCache):
        return [data.caption(index) for index in range(min(len(data), MAX_CAPTIONS))]
    return list(islice(read_captions(data), MAX_CAPTIONS))


def caption_tokenizer(
    source: str | None, captions: Sequence[str], *, vocab_size: int, max_length: int
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or one that is learned from the captions: every process learns the same one.

    Args:
        source: folder or Hub id of a tokenizer, None to learn one.
        captions: to learn from.
        vocab_size: tokens of a learned one.
        max_length: ``model_max_length`` of a learned one.

    Raises:
        ValueError: the vocabulary does not fit the captions.
    """
    if source is not None:
        return AutoTokenizer.from_pretrained(source)
    model = train_sentencepiece(captions, vocab_size=vocab_size, model_type="bpe")
    logger.info("Learned %d tokens from the captions.", vocab_size)
    return make_tokenizer(model, model_type="bpe", max_length=max_length)


def caption_length(longest: int, wanted: int | None, most: int) -> int:
    """Tokens of a caption to train with: what ``--text_tokens`` says, or the longest up to a limit.

    Args:
        longest: tokens of the longest caption.
        wanted: the flag, None if it is not given.
        most: the limit.
    """
    length = wanted or min(longest, most)
    if longest > length:
        logger.warning("Captions have up to %d tokens and are cut to %d, see --text_tokens.", longest, length)
    return length
