"""Sequences of text and images in the layout of transfusion-pytorch: ids, slots, shared positions, cache.

Before an image stand the id ``meta``, its grid in characters such as "16,16", and the id ``som`` of its modality;
after it the id ``eom``. The slots of an image hold no id of the vocabulary but :func:`slot_id`.

Legend: B sequences, L tokens, M tokens in the cache, V text ids, K modalities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hfgen.models.layers.kv_cache import KVCache
from hfgen.models.layers.sequence_mask import image_runs, sequence_mask

PADDING_ID = -1
_CHARACTERS = 128


def slot_id(modality: int) -> int:
    """What the places of an image hold in a sequence of ids."""
    return -2 - modality


@dataclass(frozen=True)
class MixedVocabulary:
    """Ids beside those of text, which are 0 .. V - 1.

    Attributes:
        num_text_tokens: V.
        num_modalities: K.
    """

    num_text_tokens: int
    num_modalities: int

    @property
    def bos_id(self) -> int:
        """Begin of a sequence."""
        return self.num_text_tokens

    @property
    def eos_id(self) -> int:
        """End of a sequence."""
        return self.num_text_tokens + 1

    @property
    def null_id(self) -> int:
        """Stands for every id of a sequence without a condition."""
        return self.num_text_tokens + 2

    @property
    def meta_id(self) -> int:
        """Begin of the description of an image."""
        return self.num_text_tokens + 3 + 2 * self.num_modalities

    @property
    def size(self) -> int:
        """Number of all ids: V + 3 + 2 K + 1 + 128."""
        return self.meta_id + 1 + _CHARACTERS

    def som_id(self, modality: int) -> int:
        """Begin of an image."""
        return self.num_text_tokens + 3 + modality

    def eom_id(self, modality: int) -> int:
        """End of an image."""
        return self.num_text_tokens + 3 + self.num_modalities + modality

    def opening(self, modality: int, grid: tuple[int, ...]) -> list[int]:
        """What stands before an image: meta, the characters of its grid, som."""
        characters = [self.meta_id + 1 + ord(character) for character in ",".join(map(str, grid))]
        return [self.meta_id, *characters, self.som_id(modality)]

    def read_grid(self, ids: list[int]) -> tuple[int, ...] | None:
        """The grid that the ids since the last ``meta`` up to a closing ``som`` describe; None if they do not."""
        if self.meta_id not in ids:
            return None
        begin = len(ids) - ids[::-1].index(self.meta_id)
        characters = [token - self.meta_id - 1 for token in ids[begin:-1]]
        if any(not 0 <= character < _CHARACTERS for character in characters):
            return None
        sizes = "".join(map(chr, characters)).split(",")
        if any(not size.isdigit() or len(size) > 6 or int(size) < 1 for size in sizes):
            return None
        return tuple(map(int, sizes))


class MixedCache:
    """Keys and values of what mixed sequences have gone through, and where they go on.

    All rows end at the same place; shorter ones begin later, their first places hold :data:`PADDING_ID`.

    Args:
        kv: the keys and values.
        is_padding: (B, max_length) boolean.
        next_position: (B,) int64, the rotary position of the next token.
    """

    def __init__(self, kv: KVCache, is_padding: Tensor, next_position: Tensor):
        self.kv = kv
        self.is_padding = is_padding
        self.next_position = next_position

    @property
    def length(self) -> int:
        """Places that are filled."""
        return self.kv.length

    def keep(self, layout: MixedLayout) -> None:
        """Keep what the last pass appended; without this the next pass writes over it."""
        num_tokens = layout.positions.shape[1]
        self.is_padding[:, self.length : self.length + num_tokens] = layout.is_padding
        self.next_position = layout.positions[:, -1] + 1
        self.kv.advance(num_tokens)

    def joined(self, other: MixedCache, room: int) -> MixedCache:
        """A new cache: these rows and then those of ``other``, of the same length, with ``room`` more places."""
        length = self.length
        layers, _, heads, _, head_dim = self.kv.keys.shape
        rows = len(self.next_position) + len(other.next_position)
        kv = KVCache(
            layers, rows, length + room, heads, head_dim, dtype=self.kv.keys.dtype, device=self.kv.keys.device
        )
        kv.keys[:, :, :, :length] = torch.cat([self.kv.keys[:, :, :, :length], other.kv.keys[:, :, :, :length]], dim=1)
        kv.values[:, :, :, :length] = torch.cat(
            [self.kv.values[:, :, :, :length], other.kv.values[:, :, :, :length]], dim=1
        )
        kv.advance(length)
        is_padding = self.is_padding.new_zeros(rows, length + room)
        is_padding[:, :length] = torch.cat([self.is_padding[:, :length], other.is_padding[:, :length]])
        return MixedCache(kv, is_padding, torch.cat([self.next_position, other.next_position]))


@dataclass(frozen=True)
class MixedLayout:
    """What follows from the ids of a batch alone, so that several passes over the same places share it.

    Attributes:
        ids: (B, L) int64 for the table of embeddings; slots and padding have 0.
        is_padding: (B, L) boolean.
        runs: (B, L) int64, 0 outside images and k in the k-th one, counted from 1 over the flattened batch.
        positions: (B, L) int64; all tokens of an image share one.
        mask: (B, 1, L, M + L) boolean, True may be attended.
        places: (P,) int64, where the slots are in the flattened batch.
        modalities, lengths: of every image.
    """

    ids: Tensor
    is_padding: Tensor
    runs: Tensor
    positions: Tensor
    mask: Tensor
    places: Tensor
    modalities: list[int]
    lengths: list[int]

    def check_grids(self, grids: list[tuple[int, ...]]) -> None:
        """Raises ``ValueError`` unless every image, of which ``grids`` has one for each, fills its slots."""
        for index, (grid, length) in enumerate(zip(grids, self.lengths)):
            if math.prod(grid) != length:
                size = "x".join(map(str, grid))
                raise ValueError(
                    f"Image {index} has a grid of {size} = {math.prod(grid)} places, but {length} slots in the ids."
                )


def mixed_layout(input_ids: Tensor, vocabulary: MixedVocabulary, cache: MixedCache | None = None) -> MixedLayout:
    """The layout of sequences, or of what is appended to those in a cache.

    Args:
        input_ids: (B, L) int64: ids of the vocabulary, runs of :func:`slot_id`, :data:`PADDING_ID`. Between two images
            stand other ids; an image does not begin in the cache and end here.
        vocabulary: the ids.
        cache: what comes before.

    Raises:
        ValueError: another shape; ids that are none of these.
    """
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}, expected (batch, length), both positive.")
    is_image, is_padding = input_ids < PADDING_ID, input_ids == PADDING_ID
    runs = image_runs(is_image)
    extra = torch.zeros_like(is_image)
    extra[:, 1:] = is_image[:, 1:] & (runs[:, 1:] == runs[:, :-1])
    positions = (~(extra | is_padding)).cumsum(dim=1) - 1
    mask = sequence_mask(is_padding, runs)
    if cache is not None:
        positions = positions + cache.next_position[:, None]
        visible = ~cache.is_padding[:, None, None, : cache.length]
        mask = torch.cat([visible.expand(-1, -1, input_ids.shape[1], -1), mask], dim=-1)
    places = is_image.flatten().nonzero().squeeze(1)
    modalities, lengths = _images(input_ids.flatten(), runs.flatten(), places, vocabulary)
    ids = input_ids.clamp(min=0)
    return MixedLayout(ids, is_padding, runs, positions.clamp(min=0), mask, places, modalities, lengths)


def _images(ids: Tensor, runs: Tensor, places: Tensor, vocabulary: MixedVocabulary) -> tuple[list[int], list[int]]:
    """The modality and the number of slots of every image, after a check of all ids; one wait for the device."""
    lengths = torch.bincount(runs[places])[1:]
    firsts = places[lengths.cumsum(0) - lengths]
    extremes = torch.stack([ids.min(), ids.max()])
    low, high, *numbers = torch.cat([extremes, slot_id(0) - ids[firsts], lengths]).tolist()
    if low < slot_id(vocabulary.num_modalities - 1) or high >= vocabulary.size:
        raise ValueError(
            f"input_ids lie in [{low}, {high}]; expected ids below {vocabulary.size}, {PADDING_ID} for padding and "
            f"down to {slot_id(vocabulary.num_modalities - 1)} for the slots of images."
        )
    half = len(numbers) // 2
    return numbers[:half], numbers[half:]
