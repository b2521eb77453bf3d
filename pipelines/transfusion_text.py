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
        theirs = () if tokenizer is None else (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.special = {token for token in (*markers, *edges, *theirs) if token is not None}
        if tokenizer is not None:
            self._check_tokenizer(self.special.difference(theirs))

    def _check_tokenizer(self, added: set[int]) -> None:
        """``added``: the special ids that the tokenizer does not have."""
        num_text, known = self.config.num_text_tokens, len(self.tokenizer)
        if num_text is None:
            num_text = self.config.vocab_size
            while num_text - 1 in added or num_text - 1 in self.codes:
                num_text -= 1
        if known != num_text:
            raise ValueError(
                f"The tokenizer has {known} tokens, but the transformer has {num_text} for text, before its special "
                "ids and codes; use the tokenizer that the transformer was trained with. A transformer whose "
                "vocabulary was padded says so by num_text_tokens."
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
            raise ValueError(f"Expected a text, got {text!r}.")
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
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, Sequence) or not prompts:
            raise ValueError(
                f"prompt must be a text or a list of at least one, or None for unconditional images, got {prompts!r}."
            )
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
        precedes, ids without a meaning, what the tokenizer has for unknown words and the like, and ``others``.
        """
        config = self.config
        drawn = {config.boi_token_id, config.eos_token_id}
        never = {*others, *self.special, *self.codes} | (set() if self.tokenizer is None else self._meaningless())
        never = {token for token in never if token is not None and (token in others or token not in drawn)}
        blocked = torch.zeros(config.vocab_size, dtype=torch.bool)
        blocked[sorted(never)] = True
        return blocked.to(device)

    def _meaningless(self) -> set[int]:
        """Ids that are no text: the tokenizer's special ones, and those of rows that pad the vocabulary."""
        return {*self.tokenizer.all_special_ids, *range(len(self.tokenizer), self.config.vocab_size)}


class GrowingText:
    """Text that grows token by token, for people who watch.

    Args:
        vocabulary: decodes it.
        before: ids of text that it continues, so that it begins with the space between two words if there is one.

    Attributes:
        ended: whether a token has ended it; what comes later does not count.
    """

    def __init__(self, vocabulary: TransfusionVocabulary, before: Sequence[int] = ()):
        self._vocabulary, self._ids, self._shown = vocabulary, list(before), 0
        self._begin = len(vocabulary.decode(before)) if before else 0
        self.ended = False

    def add(self, token: int, *, ends: bool) -> None:
        """Add a token, or the one that ``ends`` the text."""
        self.ended = self.ended or ends
        if not self.ended:
            self._ids.append(token)

    def piece(self, *, last: bool = False) -> str:
        """What is new since the last call; characters that are not finished wait, unless nothing more comes."""
        text = self.text
        if text.endswith("\ufffd") and not last:
            return ""
        shown, self._shown = self._shown, len(text)
        return text[shown:]

    @property
    def text(self) -> str:
        """All of it, without what was before."""
        return self._vocabulary.decode(self._ids)[self._begin :]
