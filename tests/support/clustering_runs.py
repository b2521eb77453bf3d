"""One training step of what keeps statistics of a batch, for a test that starts this file in two processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, distributed

from hfgen.losses.lecam import LeCam
from hfgen.models.quantizers.clustering import ClusteringVectorQuantizer


def step(rank: int, world_size: int) -> dict[str, Tensor]:
    """The state after a step on this process's share of one batch."""
    latents = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    logits = torch.arange(8.0).view(2, 4)
    share = slice(rank * 2 // world_size, (rank + 1) * 2 // world_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = ClusteringVectorQuantizer(6, 3)
    lecam = LeCam()
    with torch.no_grad():
        quantizer(latents[share])
        lecam(logits[share], -logits[share])
    return {**quantizer.state_dict(), **lecam.state_dict()}


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.save(step(rank, distributed.get_world_size()), Path(sys.argv[1]) / f"{rank}.pt")
    distributed.destroy_process_group()
