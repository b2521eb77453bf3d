"""Keys and values of the text and the images that mixed sequences have gone through, for transformers' Llama trunk.

Legend: R rows (sequences), T new tokens, M all tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TransfusionCache:
    """Preallocated keys and values of every layer, attended at exactly the length that is filled.

    It takes the place of a ``transformers.Cache`` as ``past_key_values``. The sampler makes it and drops it after its
    call; a pass of all layers makes it longer, and :meth:`crop` takes back what shall not stay, such as the patches of
    an unfinished image.

    All rows end at the same place. Shorter ones begin later: the first ``padding[r]`` places of row r are empty, which
    :meth:`mask` hides and :meth:`positions` does not count.

    Args:
        num_layers: L.
        max_length: places of a row, with the empty ones.
        padding: R numbers of empty places. Whoever adds the first tokens fills them with any.

    Attributes:
        length: places that are filled.
    """

    def __init__(self, num_layers: int, max_length: int, padding: Sequence[int]):
        self.max_length = max_length
        self.padding = tuple(padding)
        self.length = 0
        # Made when a layer brings its first keys: layers can lie on several devices and run in several dtypes.
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._begins_on: dict[torch.device, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Store (R, heads, T, head_dim) of the new tokens; returns views (R, heads, M, head_dim) of all so far.

        The last layer moves ``length``.

        Raises:
            ValueError: the places are used up.
        """
        end = self.length + key_states.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"The cache has places for {self.max_length} tokens, but {end} are needed; make it with "
                f"max_length={end}."
            )
        if self._keys[layer_idx] is None:
            shape = (*key_states.shape[:2], self.max_length, key_states.shape[3])
            self._keys[layer_idx], self._values[layer_idx] = key_states.new_empty(shape), value_states.new_empty(shape)
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[:, :, self.length : end] = key_states
        values[:, :, self.length : end] = value_states
        if layer_idx == len(self._keys) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def crop(self, length: int) -> None:
        """Forget the tokens from place ``length`` on."""
        self.length = min(length, self.length)

    def positions(self, num_tokens: int, device: torch.device | str | None = None) -> Tensor:
        """(R, T) int64: the positions in their sequences of the next ``num_tokens`` tokens."""
        places = torch.arange(self.length, self.length + num_tokens, device=device)
        return (places - self._begins(device)).clamp(min=0)

    def mask(self, num_tokens: int, *, causal: bool, device: torch.device | str | None = None) -> Tensor | None:
        """(R, 1, T or 1, M) boolean for the next tokens, True may be attended; None if there are no empty places.

        Args:
            num_tokens: T.
            causal: whether the new tokens see only those before them and themselves, or all of each other.
            device: of the mask.
        """
        if not any(self.padding):
            return None
        keys = torch.arange(self.length + num_tokens, device=device)
        filled = (keys >= self._begins(device))[:, None, None]
        if not causal or num_tokens == 1:
            return filled
        queries = torch.arange(self.length, self.length + num_tokens, device=device)[:, None]
        # A query at an empty place sees itself, since a softmax over nothing is not a number.
        return (keys <= queries) & filled | (keys == queries)

    def _begins(self, device: torch.device | str | None) -> Tensor:
        """(R, 1), copied to a device once and not at every step."""
        device = torch.device("cpu" if device is None else device)
        if device not in self._begins_on:
            self._begins_on[device] = torch.tensor(self.padding, device=device)[:, None]
        return self._begins_on[device]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of ``transformers.Cache``: tokens before the next ones."""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Of ``transformers.Cache``: the place of the next token."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Of ``transformers.Cache``: tokens that a mask covers, and the place of the first."""
        return self.length + query_length, 0

    @classmethod
    def join(cls, parts: Sequence[tuple[TransfusionCache, Sequence[int]]], room: int) -> TransfusionCache:
        """A copy of chosen rows of filled caches, with places for ``room`` more tokens.

        Args:
            parts: caches of one model, each with the rows to take, which can repeat.
            room: places after the longest of the caches.
        """
        length = max(cache.length for cache, _ in parts)
        shifts = [length - cache.length for cache, _ in parts]
        padding = [cache.padding[row] + shift for (cache, rows), shift in zip(parts, shifts) for row in rows]
        joined = cls(len(parts[0][0]._keys), length + room, padding)
        joined.length = length
        for name in ("_keys", "_values"):
            for layer in range(len(getattr(joined, name))):
                first = getattr(parts[0][0], name)[layer]
                # Zeros, since a hidden value counts nothing only if it is a number.
                buffer = first.new_zeros(len(padding), first.shape[1], joined.max_length, first.shape[3])
                start = 0
                for (cache, rows), shift in zip(parts, shifts):
                    source = getattr(cache, name)[layer][:, :, : cache.length]
                    indices = torch.tensor(rows, device=source.device)
                    buffer[start : start + len(rows), :, shift:length] = source[indices]
                    start += len(rows)
                getattr(joined, name)[layer] = buffer
        return joined
