"""Text and ids of a mixed-modal transformer: its vocabulary, what it may draw, and text that grows token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfgen.models.generators.transfusion import TransfusionTransformer


class TransfusionVocabulary:
    """The ids of a transformer and the tokenizer of its text.

    Args:
        transformer: tells the special ids and those of codes.
        tokenizer: of the ids before them, None if there is no text.

    Raises:
        ValueError: a tokenizer of another vocabulary.
    """

    def __init__(self, transformer: TransfusionTransformer, tokenizer: PreTrainedTokenizerBase | None):
        self.config, self.tokenizer = transformer.config, tokenizer
        config = self.config
        self.codes = (
            range(config.code_offset, config.code_offset + config.codebook_size)
            if (config.image_mode == "discrete")
            else range(0)
        )
        markers = (config.boi_token_id, config.eoi_token_id, config.image_token_id, config.pad_token_id)
        edges = (config.bos_token_id, config.eos_token_id)
        self.special = {token for token in (*markers, *edges) if token is not None}
        if tokenizer is not None:
            self._check_tokenizer()

    def _check_tokenizer(self) -> None:
        num_text = self.config.vocab_size
        while num_text - 1 in self.special or num_text - 1 in self.codes:
            num_text -= 1
        if len(self.tokenizer) != num_text:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens, but the transformer has {num_text} for text, before "
                "its special ids and codes; use the tokenizer that the transformer was trained with."
            )
        for name in ("bos_token_id", "eos_token_id"):
            ours, theirs = self.config[name], getattr(self.tokenizer, name)
            if ours is not None and ours < num_text and theirs != ours:
                raise ValueError(
                    f"{name} is {theirs} in the tokenizer and {ours} in the transformer; use the tokenizer that the "
                    "transformer was trained with."
                )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without beginning and end.

        Raises:
            ValueError: there is no tokenizer, it is no text, or a special token is written out in it.
        """
        if self.tokenizer is None:
            raise ValueError("The pipeline has no tokenizer, so it reads no text: give it one, or no prompt.")
        if not isinstance(text, str):
            raise ValueError(f"A prompt is a text or a list of at least one, got {text!r}.")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        special = [token for token in ids if token in self.special or token in self.codes]
        if special:
            raise ValueError(
                f"The text {text!r} holds the special token {self.tokenizer.convert_ids_to_tokens(special[0])!r} (id "
                f"{special[0]}): markers are added where they belong, and images are given as images."
            )
        return ids

    def prompt_rows(self, prompts: str | Sequence[str]) -> list[list[int]]:
        """What precedes the image of each prompt: the beginning, the text, the marker of an image.

        Raises:
            ValueError: as :meth:`encode`, or no prompt at all.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompt is empty; give at least one text, or None for unconditional images.")
        texts = [[] if prompt == "" else self.encode(prompt) for prompt in prompts]
        return [[self.config.bos_token_id, *text, self.config.boi_token_id] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of drawn ids, without the special ones.

        Raises:
            ValueError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("The pipeline has no tokenizer, so it writes no text: give it one.")
        return self.tokenizer.decode([token for token in ids if token not in self.special], skip_special_tokens=True)

    def blocked(self, *others: int | None, device: torch.device | str | None = None) -> Tensor:
        """(V,) boolean, the ids that text is never drawn from.

        These are the beginning, padding, slots and codes of images, the end of an image, which no token of text
        precedes, and ``others``.
        """
        blocked = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        config = self.config
        never = (config.bos_token_id, config.pad_token_id, config.image_token_id, config.eoi_token_id, *others)
        blocked[[token for token in never if token is not None]] = True
        blocked[list(self.codes)] = True
        return blocked.to(device)


class GrowingText:
    """Text that grows token by token, for people who watch.

    Args:
        vocabulary: decodes it.
    """

    def __init__(self, vocabulary: TransfusionVocabulary):
        self._vocabulary, self._ids, self._shown = vocabulary, [], ""

    def add(self, token: int) -> str:
        """What a token adds to the text; nothing while it is part of an unfinished character."""
        self._ids.append(token)
        text = self._vocabulary.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

    @property
    def text(self) -> str:
        """All of it."""
        return self._vocabulary.decode(self._ids)
