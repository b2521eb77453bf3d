"""The text of a Transfusion run: its tokenizer, the orders of captions and images, and text-only batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hfgen.data.sequences import Document, PackedRows, SequenceFormat, pack
from hfgen.data.texts import Texts, load_texts
from hfgen.models.generators.llama_checkpoint import llama_arguments, llama_folder
from hfgen.training.captions import caption_length, caption_tokenizer, first_captions
from hfgen.training.flag_sources import loading_flag
from hfgen.training.transfusion import TransfusionTrainingConfig

MAX_CAPTION_TOKENS = 256
SLOT = -1
_PADDED_TO = (8, 16, 32, 64, 128, 256, 512, 1024)


class SequenceWriter:
    """Turns captions and texts into rows of ids.

    Args:
        config: shares, lengths and sources.
        data: with captions.
        num_slots: tokens of an image.

    Attributes:
        tokenizer: of text.
        format: ids of documents; the markers come after the text. Slots of images are ``SLOT``.
        text_tokens: of the longest caption.
        row_length: of the rows.
        validation_texts: to measure text alone with; None are the captions.

    Raises:
        ValueError: the data has no captions, the tokenizer no begin or end, or the rows are too short.
    """

    def __init__(self, config: TransfusionTrainingConfig, data: Dataset, num_slots: int) -> None:
        self.config = config
        if not data.has_captions:
            raise ValueError(f"--dataset {config.dataset} has no captions, which Transfusion learns from.")
        captions = first_captions(data)
        self.tokenizer = _tokenizer(config, captions)
        first = len(self.tokenizer) if config.llama is None else _llama_ids(config, self.tokenizer)
        self.format = SequenceFormat(
            bos=self.tokenizer.bos_token_id,
            eos=self.tokenizer.eos_token_id,
            boi=first,
            eoi=first + 1,
            pad=first + 2,
            slot=SLOT,
            num_slots=num_slots,
        )
        longest = max(map(len, self._encode(captions)))
        self.text_tokens = caption_length(longest, config.text_tokens, MAX_CAPTION_TOKENS)
        needed = self.format.overhead + self.text_tokens
        self.row_length = config.row_length or needed
        if not needed <= self.row_length:
            raise ValueError(
                f"--row_length is {self.row_length}, but an image of {num_slots} tokens and a caption of "
                f"{self.text_tokens} need {needed}; make it longer, or cut captions with --text_tokens."
            )
        if needed > config.context_length:
            raise ValueError(
                f"--context_length is {config.context_length}, but an image of {num_slots} tokens and a caption of "
                f"{self.text_tokens} need {needed}."
            )
        self.texts: Texts | None = None
        self.validation_texts: Texts | None = None
        if config.text_dataset is not None:
            texts = load_texts(config.text_dataset, column=config.text_column)
            if len(texts) <= config.num_validation_images:
                raise ValueError(
                    f"--text_dataset {config.text_dataset} has {len(texts)} texts, of which "
                    f"--num_validation_images {config.num_validation_images} are kept for validation; use more texts."
                )
            self.validation_texts, self.texts = texts.split(config.num_validation_images)

    @property
    def first_free_id(self) -> int:
        """The id after text and markers."""
        return self.format.pad + 1

    def draw(self, captions: Sequence[str], generator: torch.Generator) -> PackedRows:
        """The rows of a micro-batch: text alone, or each image with its caption in a drawn order or without it."""
        config = self.config
        share, *draws = torch.rand(1 + 2 * len(captions), generator=generator, device=generator.device).tolist()
        if share < config.text_only_share:
            return self.texts_alone(self._draw_texts(captions, generator), generator)
        dropped = [draw < config.caption_dropout for draw in draws[: len(captions)]]
        image_first = [draw >= config.caption_first_share for draw in draws[len(captions) :]]
        documents = [
            self.format.uncaptioned(index) if drop else self._captioned(ids, index, first)
            for index, (ids, drop, first) in enumerate(zip(self._encode(captions), dropped, image_first))
        ]
        return self._pack(documents)

    def captioned(self, captions: Sequence[str], *, image_first: bool) -> PackedRows:
        """The rows of images with their captions in one order."""
        ids = self._encode(captions)
        return self._pack([self._captioned(each, index, image_first) for index, each in enumerate(ids)])

    def texts_alone(self, texts: Sequence[str], generator: torch.Generator | None = None) -> PackedRows:
        """The rows of texts; of one that is longer than a row, the part that ``generator`` draws, or the first."""
        longest = min(self.row_length, self.config.context_length) - 2
        documents = []
        for ids in self._encode(texts):
            parts = [ids[start : start + longest] for start in range(0, len(ids), longest)] or [[]]
            index = 0
            if generator is not None and len(parts) > 1:
                index = int(torch.randint(len(parts), (), generator=generator, device=generator.device))
            documents.append(self.format.text(parts[index], goes_on=index < len(parts) - 1))
        return self._pack(documents)

    def held_out(self, captions: Sequence[str], first: int) -> Sequence[str]:
        """Texts to validate with: those that were kept, in place of as many captions, which begin with the i-th."""
        if self.validation_texts is None:
            return captions
        return [self.validation_texts[first + index] for index in range(len(captions))]

    def _pack(self, documents: Sequence[Document]) -> PackedRows:
        return pack(documents, self.row_length, self.format.pad)

    def _draw_texts(self, captions: Sequence[str], generator: torch.Generator) -> Sequence[str]:
        if self.texts is None:
            return captions
        count = self.config.text_batch_size or len(captions)
        chosen = torch.randint(len(self.texts), (count,), generator=generator, device=generator.device)
        return [self.texts[index] for index in chosen.tolist()]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _captioned(self, ids: list[int], image: int, image_first: bool) -> Document:
        cut = ids[: self.text_tokens]
        return self.format.captioned(cut, image, image_first=image_first, goes_on=len(cut) < len(ids))


def _tokenizer(config: TransfusionTrainingConfig, captions: Sequence[str]) -> PreTrainedTokenizerBase:
    source = config.text_tokenizer or config.llama
    with loading_flag("text_tokenizer" if config.text_tokenizer else "llama", source):
        tokenizer = caption_tokenizer(source, captions, vocab_size=config.vocab_size, max_length=config.context_length)
    missing = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(f"The tokenizer {source} has no {' and no '.join(missing)}, which mark the ends of a text.")
    return tokenizer


def _llama_ids(config: TransfusionTrainingConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids of ``--llama``, after which the markers come.

    Raises:
        ValueError: they are not those of the tokenizer, nor these padded to a multiple of a power of two.
    """
    with loading_flag("llama", config.llama):
        arguments = llama_arguments(llama_folder(config.llama), tokenizer.eos_token_id)
    num_ids, num_tokens = arguments["vocab_size"], len(tokenizer)
    is_padded = any(num_ids == -(-num_tokens // multiple) * multiple for multiple in _PADDED_TO)
    if num_ids != num_tokens and not is_padded:
        raise ValueError(
            f"--llama {config.llama} has {num_ids} ids, but its tokenizer {num_tokens}; name the tokenizer that "
            "belongs to it with --text_tokenizer."
        )
    if arguments["bos_token_id"] != tokenizer.bos_token_id:
        raise ValueError(
            f"--llama {config.llama} begins texts with {arguments['bos_token_id']}, but its tokenizer with "
            f"{tokenizer.bos_token_id}; name the tokenizer that belongs to it with --text_tokenizer."
        )
    return num_ids
