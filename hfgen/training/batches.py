"""Which items form a batch, as a pure function of (seed, step): nothing about the order has to be saved.

The global batch of an optimizer step is cut into ``accumulation x processes`` blocks of ``batch_size`` items. Process
r takes block ``micro_step * processes + r``, so two processes see what one process with two micro-steps sees.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hfgen.counters import counter_seed, generator, numpy_generator
from hfgen.data.shapes import ShapesData
from hfgen.data.shards import is_tar_source
from hfgen.data.sources import ImageData, load_images
from hfgen.data.tar_stream import TarImages
from hfgen.training.config import TrainingConfig
from hfgen.training.streams import LaneItems, StreamSampler


@dataclass(frozen=True)
class Draws:
    """The random draws of one micro-batch: generators that depend on (seed, step, block) only."""

    seed: int
    step: int
    block: int
    device: torch.device

    def generator(self, stream: int = 0) -> torch.Generator:
        """A fresh generator on the training device; different ``stream`` numbers give independent draws."""
        return generator(self.seed, self.step, self.block, stream, device=self.device)

    def seed_global(self) -> None:
        """Seed torch's global generators, which dropout layers draw from."""
        seed = counter_seed(self.seed, self.step, self.block)
        if self.device.type == "cpu":
            # torch.manual_seed also queues the seed, with a stack trace, for GPUs that are not in use.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)


class BlockSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of ``(epoch, index)`` keys for one process.

    Each epoch visits a fresh permutation of the data set; the items that do not fill a last global batch are left out
    of that epoch.

    Args:
        length: number of items in the data set.
        batch_size: items per block.
        accumulation: micro-steps per optimizer step.
        rank, world_size: which process this is, of how many.
        seed: of the permutations.
        start_step: the optimizer step to begin with, also an attribute; skipping costs nothing.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        self.global_batch = batch_size * accumulation * world_size
        if length < self.global_batch:
            raise ValueError(
                f"The data set has {length} items, fewer than one global batch of {self.global_batch} (batch size "
                f"{batch_size} x accumulation {accumulation} x {world_size} processes); lower --batch_size or "
                "--gradient_accumulation_steps, or use more data."
            )
        self.length = length
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start_step = start_step

    @property
    def steps_per_epoch(self) -> int:
        return self.length // self.global_batch

    def describe(self) -> str:
        return f"{self.length} items, global batch {self.global_batch}, {self.steps_per_epoch} steps per epoch"

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        permuted_epoch = permutation = None
        while True:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != permuted_epoch:
                permuted_epoch = epoch
                permutation = numpy_generator(self.seed, epoch).permutation(self.length)
            for micro_step in range(self.accumulation):
                block = micro_step * self.world_size + self.rank
                first = step_in_epoch * self.global_batch + block * self.batch_size
                yield [(epoch, int(index)) for index in permutation[first : first + self.batch_size]]
            step += 1


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors and numbers of the items; anything else (captions, tuples) becomes a list."""
    batch: dict[str, Any] = {}
    for name in items[0]:
        values = [item[name] for item in items]
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(values[0], int | float):
            batch[name] = torch.tensor(values)
        else:
            batch[name] = values
    return batch


def training_images(config: TrainingConfig) -> ShapesData | ImageData | TarImages:
    """The images that a run trains on: uint8, a function of (seed, epoch, index), or a stream of tar files."""
    return _load(config, split="train", crop=config.crop, flip=config.flip, limit=config.limit)


def validation_images(config: TrainingConfig) -> Tensor:
    """The first images of the validation split, centre-cropped: uint8 (N, 3, H, W)."""
    count = config.num_validation_images
    limit = None if is_tar_source(config.dataset) else count
    try:
        data = _load(config, split=config.validation_split, crop="center", flip=False, limit=limit)
    except ValueError as error:
        _load(config, split="train", crop="center", flip=False, limit=limit)  # raises if the data set is not there
        raise ValueError(
            f"No validation images: {error}. Name another with --validation_split; 'train' shows training images."
        ) from error
    items = iter(data) if isinstance(data, TarImages) else (data[0, index] for index in range(min(count, len(data))))
    return torch.stack([item["pixels"] for item in islice(items, count)])


def _load(
    config: TrainingConfig, *, split: str, crop: str, flip: bool, limit: int | None
) -> ShapesData | ImageData | TarImages:
    return load_images(
        config.dataset,
        resolution=config.resolution,
        split=split,
        image_column=config.image_column,
        caption_column=config.caption_column,
        label_column=config.label_column,
        crop=crop,
        flip=flip,
        resize_ratio=config.resize_ratio,
        resample=config.resample,
        seed=config.seed,
        strict=config.strict,
        limit=limit,
        config_name=config.dataset_config_name,
        revision=config.dataset_revision,
        num_classes=config.num_classes,
        shuffle_buffer=config.shuffle_buffer,
    )


def _ignore_sigterm(worker: int) -> None:
    """A scheduler may signal all processes of a job; the main one still needs its workers to finish the step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_sampler(
    dataset: Dataset, config: TrainingConfig, *, rank: int, world_size: int
) -> BlockSampler | StreamSampler:
    """Which items process ``rank`` of ``world_size`` reads."""
    shares = {"accumulation": config.gradient_accumulation_steps, "rank": rank, "world_size": world_size}
    if isinstance(dataset, TarImages):
        return StreamSampler(dataset, config.batch_size, num_workers=config.num_workers, seed=config.seed, **shares)
    return BlockSampler(len(dataset), config.batch_size, seed=config.seed, **shares)


def make_loader(
    dataset: Dataset, sampler: BlockSampler | StreamSampler, *, num_workers: int, pin_memory: bool
) -> DataLoader:
    """The loader of one process. Accelerate must not prepare it: the sampler already deals the processes' shares."""
    if isinstance(sampler, StreamSampler):
        batches = {"dataset": LaneItems(sampler), "batch_size": sampler.batch_size}
    else:
        batches = {"dataset": dataset, "batch_sampler": sampler}
    return DataLoader(
        **batches,
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_ignore_sigterm,
        pin_memory=pin_memory,
        # The loader draws a base seed for its workers; an own generator keeps that away from the global one.
        generator=torch.Generator().manual_seed(sampler.seed),
    )
