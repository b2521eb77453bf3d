"""Where each loading worker of each process stands in a stream of tar files, as a function of the step.

A run has ``processes x max(1, num_workers)`` lanes (see :mod:`hfgen.data.tar_stream`). The loader of a process takes
whole micro-batches from its workers in turn, so micro-batch m of a process comes from its lane ``m % workers`` and is
number ``m // workers`` there. Nothing has to be saved, but the numbers that divide the stream must stay the same: they
are recorded in ``OUTPUT_DIR/stream.json``, and a run that resumes with others is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfgen.data.tar_stream import TarImages
from hfgen.training.history import write_text

STREAM_FILE = "stream.json"


@dataclass
class StreamSampler:
    """The position of one process in a stream.

    Attributes:
        dataset: the stream.
        batch_size: items per block.
        num_workers: loading workers of each process; 0 loads in the process itself.
        accumulation: micro-steps per optimizer step.
        rank, world_size: which process this is, of how many.
        seed: of the loader.
        start_step: the optimizer step to begin with.

    Raises:
        ValueError: if the stream has fewer shards than lanes.
    """

    dataset: TarImages
    batch_size: int
    num_workers: int = 0
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    start_step: int = 0

    def __post_init__(self) -> None:
        shards = len(self.dataset.shards)
        if shards < self.lanes:
            raise ValueError(
                f"The stream has {shards} tar files, too few for {self.lanes} lanes ({self.world_size} processes x "
                f"{self.workers} loading workers): lower --num_workers to at most {shards // self.world_size}, use "
                "fewer processes, or write the data into more tar files."
            )

    @property
    def workers(self) -> int:
        return max(1, self.num_workers)

    @property
    def lanes(self) -> int:
        return self.world_size * self.workers

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    def position(self, worker: int) -> tuple[int, int]:
        """The lane that a loader's worker reads if the loader begins at ``start_step``, and its first item there."""
        micro_batch = self.start_step * self.accumulation + worker
        lane_of_process = micro_batch % self.workers
        return lane_of_process * self.world_size + self.rank, micro_batch // self.workers * self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The batches of this process as ``(lane, item number in the lane)``, without end."""
        for ahead in itertools.count():
            lane, first = self.position(ahead)
            yield [(lane, number) for number in range(first, first + self.batch_size)]

    def describe(self) -> str:
        return (
            f"A stream of {len(self.dataset.shards)} tar files in {self.lanes} lanes, global batch {self.global_batch}"
        )

    def check_record(self, output_dir: Path) -> None:
        """Record what divides the stream at step 0; refuse to go on later if it has changed. On one process only.

        Raises:
            ValueError: naming what changed.
        """
        record = {
            "processes": self.world_size,
            "num_workers": self.workers,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "shuffle_buffer": self.dataset.shuffle_buffer,
            "seed": self.seed,
            "shards": len(self.dataset.shards),
            "shard_names": hashlib.sha256("\n".join(_base_names(self.dataset.shards)).encode()).hexdigest(),
        }
        path = output_dir / STREAM_FILE
        if self.start_step == 0:
            write_text(path, json.dumps(record, indent=2) + "\n")
            return
        if not path.is_file():
            raise ValueError(
                f"{output_dir} has no {STREAM_FILE}: its run did not read a stream, and cannot go on with one."
            )
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in record if before.get(name) != record[name]]
        if changed:
            differences = ", ".join(f"{name} {record[name]} (was {before.get(name)})" for name in changed)
            raise ValueError(
                f"A stream can only be resumed where it was if it is divided as before; now it has {differences}. Go "
                "back to the old values, or begin a new run from the trained weights."
            )


def _base_names(shards: list[str]) -> list[str]:
    """Without folders: the same files may have moved."""
    return [shard.replace("\\", "/").rpartition("/")[2] for shard in shards]


class LaneItems(torch.utils.data.IterableDataset):
    """The items of the lane that belongs to the loading worker that iterates."""

    def __init__(self, sampler: StreamSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        lane, start = self.sampler.position(worker.id if worker else 0)
        return self.sampler.dataset.stream(lane, self.sampler.lanes, start)
