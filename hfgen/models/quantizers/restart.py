"""Reviving codes that nothing selects any more."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from hfgen.counters import generator
from hfgen.models.quantizers.usage import world_size


class DeadCodeRestart(nn.Module):
    """Names the codes to replace, and by what, after they went unused for a number of training steps.

    Random restarts as in Jukebox (arXiv 2005.00341, section 3.1): a dead code moves to a random encoder vector of the
    current batch. The draws are a function of the step counter, and both buffers are saved, so that a resumed run
    repeats them. All processes see the same counts and take the vectors of rank 0, so that codebooks stay equal.

    Args:
        num_codes: size of the codebook.
        after: steps in a row without a hit after which a code is dead.
    """

    def __init__(self, num_codes: int, after: int):
        super().__init__()
        self.after = after
        self.register_buffer("unused_steps", torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, counts: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Advance by one training step.

        Args:
            counts: (num_codes,) hits of this step over all processes.
            candidates: (N, d) vectors of this process, N >= 1.

        Returns:
            ``dead`` (D,) int64, the codes to replace, D >= 0, and their new values (D, d).
        """
        self.step += 1
        self.unused_steps.add_(1).mul_(counts == 0)
        dead = (self.unused_steps >= self.after).nonzero().squeeze(1)
        if dead.numel() == 0:
            # The counts are global, so every process returns here or none does.
            return dead, candidates[:0]
        self.unused_steps[dead] = 0
        draws = generator(self.step.item())
        if len(candidates) >= len(dead):
            chosen = torch.randperm(len(candidates), generator=draws)[: len(dead)]
        else:
            chosen = torch.randint(len(candidates), (len(dead),), generator=draws)
        vectors = candidates[chosen.to(candidates.device)]
        if world_size() > 1:
            distributed.broadcast(vectors, src=0)
        return dead, vectors
