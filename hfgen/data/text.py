"""Text tokenizers learned from captions: sentencepiece trains them, transformers runs them.

The vocabulary begins with ``<pad>`` (0), ``<s>`` (1), ``</s>`` (2) and ``<unk>`` (3).
"""

from __future__ import annotations

import io
import re
import typing
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from hfgen.data.shapes import ShapesData
from hfgen.data.sources import ImageData
from hfgen.data.tar_stream import TarImages

ModelType = Literal["unigram", "bpe"]
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PAD, BOS, EOS, UNK = range(4)
SPACE = "\u2581"  # how sentencepiece writes the space before a word
_THREADS = 4  # a fixed number: the scores depend on it in their last digits
_MAX_CAPTION_BYTES = 2**20


def read_captions(data: ShapesData | ImageData | TarImages) -> Iterator[str]:
    """Every caption of :func:`hfgen.data.sources.load_images` once, in order.

    Raises:
        ValueError: if the source has no captions.
    """
    if isinstance(data, ShapesData):
        return (data[index]["caption"] for index in range(len(data)))
    return data.captions()


def normalize(text: str) -> str:
    """Unicode form NFKC, runs of white space as one space, none at the ends; the mark ``SPACE`` is white space."""
    return " ".join(unicodedata.normalize("NFKC", text).replace(SPACE, " ").split())


def train_sentencepiece(
    captions: Iterable[str],
    *,
    vocab_size: int,
    model_type: ModelType,
    character_coverage: float = 1.0,
) -> bytes:
    """Learn a sentencepiece model (arXiv 1808.06226); equal captions give equal bytes.

    Args:
        captions: text; empty captions are passed over.
        vocab_size: number of tokens, with the four special ones.
        model_type: unigram language model (arXiv 1804.10959) or byte-pair encoding (arXiv 1508.07909).
        character_coverage: share of the text's characters that get a token; the rarest others become ``<unk>``.

    Returns:
        The contents of a sentencepiece model file. It expects text that :func:`normalize` has gone through.

    Raises:
        ValueError: if there is no text, or the vocabulary does not fit it.
    """
    _check_model_type(model_type)
    if not 0.9 <= character_coverage <= 1:
        raise ValueError(f"character_coverage is {character_coverage}: use a share between 0.9 and 1")
    sentences = (sentence for sentence in map(normalize, captions) if sentence)
    first = next(sentences, None)
    if first is None:
        raise ValueError("all captions are empty: there is no text to learn a vocabulary from")

    def all_sentences() -> Iterator[str]:
        yield first
        yield from sentences

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=all_sentences(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            max_sentence_length=_MAX_CAPTION_BYTES,
            num_threads=_THREADS,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(vocab_size, model_type, str(error))) from error
    return model.getvalue()


def _check_model_type(model_type: str) -> None:
    if model_type not in typing.get_args(ModelType):
        raise ValueError(f"model_type {model_type!r} is unknown: use one of {list(typing.get_args(ModelType))}")


def _explain(vocab_size: int, model_type: str, message: str) -> str:
    if match := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too large for this text: with model_type {model_type!r} it supports at most "
            f"{match.group(1)} tokens. Use that or less, or more varied captions."
        )
    if match := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small for this text: its characters and the special tokens alone need "
            f"{match.group(2)}. Use more, or a lower character_coverage."
        )
    return f"sentencepiece cannot learn a vocabulary of {vocab_size} tokens: {message}"


def make_tokenizer(model: bytes, *, model_type: ModelType, max_length: int) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with the ids of a model of :func:`train_sentencepiece`.

    It gives the ids that sentencepiece gives for the normalised text, between ``<s>`` and ``</s>``. Unlike
    sentencepiece it also reads the special tokens where they are written out in a text.

    Args:
        model: contents of the sentencepiece model file.
        model_type: as it was trained.
        max_length: tokens that ``truncation=True`` keeps and ``padding="max_length"`` fills, special ones included.
    """
    _check_model_type(model_type)
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}: <s>, </s> and one token of text need at least 3")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(len(processor))]
    if model_type == "unigram":
        scores = [processor.get_score(index) for index in range(len(pieces))]
        core = models.Unigram(list(zip(pieces, scores)), unk_id=UNK, byte_fallback=False)
    else:
        ids = {piece: index for index, piece in enumerate(pieces)}
        core = models.BPE(ids, _merges(ids), unk_token="<unk>", fuse_unk=True, byte_fallback=False)
    tokenizer = Tokenizer(core)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(rf"[\s\x1c-\x1f{SPACE}]+"), " "),  # what str.split takes for white space
            normalizers.Strip(),
            normalizers.Prepend(SPACE),
            normalizers.Replace(" ", SPACE),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that make each token, in the order of the tokens, which is the order of the merges."""
    return [
        (token[:cut], token[cut:])
        for token in list(ids)[UNK + 1 :]
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
