"""Keys and values of earlier tokens, kept by the sampler while it generates."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer, attended at exactly the length that is filled.

    The sampler makes one per call and drops it afterwards; modules hold no state. Each forward pass appends the new
    tokens of every layer with :meth:`append` and then calls :meth:`advance` once.

    Args:
        num_layers, batch_size, max_length, num_heads, head_dim: sizes of the buffers
            (num_layers, batch_size, num_heads, max_length, head_dim), one for keys and one for values. The tokens of
            a head lie together, which attention kernels read faster than heads side by side.
        dtype, device: of the buffers.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        max_length: int,
        num_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (num_layers, batch_size, num_heads, max_length, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, n, heads, head_dim) of the new tokens; returns views of all tokens so far, (B, length + n, ...).

        Raises:
            ValueError: the buffers are full.
        """
        end = self.length + key.shape[1]
        if end > self.keys.shape[3]:
            raise ValueError(
                f"The cache holds {self.keys.shape[3]} tokens, but {end} are needed; create it with max_length={end}."
            )
        self.keys[layer, :, :, self.length : end] = key.transpose(1, 2)
        self.values[layer, :, :, self.length : end] = value.transpose(1, 2)
        return self.keys[layer, :, :, :end].transpose(1, 2), self.values[layer, :, :, :end].transpose(1, 2)

    def advance(self, num_tokens: int) -> None:
        """Count ``num_tokens`` as stored, after every layer has appended them."""
        self.length += num_tokens
