"""Random numbers that are a function of counters.

Every draw in hfgen belongs to a tuple of integers such as ``(seed, epoch, index)`` or ``(seed, step, rank)``. A run
that stops and continues asks for the same tuples and so repeats the same draws, with no generator state to save.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def counter_seed(*counters: int) -> int:
    """A 63-bit seed for a tuple of integers; different tuples give independent seeds."""
    message = b"".join(int(counter).to_bytes(16, "little", signed=True) for counter in counters)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def generator(*counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh torch generator on ``device`` for a tuple of integers."""
    return torch.Generator(device=device).manual_seed(counter_seed(*counters))


def numpy_generator(*counters: int) -> np.random.Generator:
    """A fresh numpy generator for a tuple of integers."""
    return np.random.Generator(np.random.PCG64(counter_seed(*counters)))
