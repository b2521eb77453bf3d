"""A run on a stream of tar files that stops and resumes is the run that did not stop, without any saved position."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
import torch

from hfgen.training import parse_config, training_images, validation_images
from hfgen.training.batches import make_loader, make_sampler
from hfgen.training.config import TrainingConfig
from hfgen.training.streams import STREAM_FILE, StreamSampler
from support import stream_runs
from support.stream_runs import compare_interrupted, fit, records, stream_config
from support.tars import png, write_shards, write_tar
from support.torchrun import torchrun

COUNTS = (4, 3, 5, 4, 2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """With one unreadable sample."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), COUNTS)
    write_tar(folder / "05.tar", {"bad.png": b"no image", "bad.cls": b"0", "good.png": png(99), "good.cls": b"0"})
    return folder


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (0, 2), (2, 1), (2, 2)])
def test_resumed_run_is_bit_equal(shards, tmp_path, workers, accumulation):
    """Nineteen images and batches of two: the runs cross epochs, and stop in the middle of one."""
    changes = {"num_workers": workers, "gradient_accumulation_steps": accumulation}
    batches = compare_interrupted(tmp_path, shards, terminate=6, **changes)
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    assert records(tmp_path / "straight")[-1]["skipped_images"] > 0
    names = {name for batch in batches for name in batch}
    assert names == {f"{k:04d}" for k in range(sum(COUNTS))} | {"good"}


def test_the_comparison_can_fail(shards, tmp_path):
    _, first = fit(tmp_path / "a", shards, max_train_steps=2)
    _, second = fit(tmp_path / "b", shards, max_train_steps=2, seed=1)
    assert first.batches != second.batches


def test_two_processes_resume_bit_equal_and_share_the_images(tmp_path):
    """Two processes with two workers each: four lanes of five shards."""
    shards = write_shards(tmp_path / "shards", COUNTS)
    torchrun(stream_runs.__file__, tmp_path, shards)
    shown = [json.loads((tmp_path / f"batches_{rank}.json").read_text()) for rank in range(2)]
    assert [len(batches) for batches in shown] == [6, 6]
    record = json.loads((tmp_path / "stopped" / STREAM_FILE).read_text())
    assert record["processes"] == 2 and record["num_workers"] == 2
    # The four lanes' first two batches, 16 images of epoch 0 or the beginning of epoch 1, have few repetitions.
    counts = Counter(name for batches in shown for batch in batches[:4] for name in batch)
    assert len(counts) >= 12 and max(counts.values()) <= 2


def test_positions_are_those_of_an_uninterrupted_loader(shards, tmp_path):
    """Also for more workers than fit a step, where the first batch comes from another worker."""
    config = stream_config(tmp_path, shards, num_workers=3, gradient_accumulation_steps=2)
    data = training_images(config)

    def names(step, count):
        sampler = make_sampler(data, config, rank=0, world_size=2)
        sampler.start_step = step
        loader = iter(make_loader(data, sampler, num_workers=3, pin_memory=False))
        return [next(loader)["name"] for _ in range(count)]

    straight = names(0, 10)
    assert names(1, 8) == straight[2:] and names(2, 6) == straight[4:]
    sampler = make_sampler(data, config, rank=1, world_size=2)
    assert sampler.lanes == 6 and sampler.global_batch == 8
    assert {sampler.position(worker)[0] for worker in range(3)} == {1, 3, 5}
    assert next(iter(sampler)) == [(1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_workers": 2}, r"num_workers 2 \(was 1\)"),
        ({"batch_size": 4, "seed": 3}, r"batch_size 4 \(was 2\), seed 3 \(was 0\)"),
        ({"shuffle_buffer": 9}, r"shuffle_buffer 9 \(was 3\)"),
    ],
)
def test_a_stream_that_is_divided_otherwise_is_refused(shards, tmp_path, change, message):
    fit(tmp_path / "run", shards, max_train_steps=1)
    with pytest.raises(ValueError, match=message + ".*Go back to the old values"):
        fit(tmp_path / "run", shards, max_train_steps=2, resume="latest", **change)
    fit(tmp_path / "run", shards, max_train_steps=1, overwrite=True, **change)  # a new run may
    trainer, _ = fit(tmp_path / "run", shards, max_train_steps=2, resume="latest", **change)
    assert trainer.step == 2


def test_a_stream_of_other_shards_is_refused(shards, tmp_path):
    fit(tmp_path / "run", shards, max_train_steps=1)
    fewer = write_shards(tmp_path / "fewer", (4, 3))
    with pytest.raises(ValueError, match=r"shards 2 \(was 6\)"):
        fit(tmp_path / "run", fewer, max_train_steps=2, resume="latest")
    moved = write_shards(tmp_path / "moved", COUNTS)
    write_tar(moved / "05.tar", {"a.png": png(1), "a.cls": b"0"})
    fit(tmp_path / "run", moved, max_train_steps=2, resume="latest")
    (tmp_path / "run" / STREAM_FILE).unlink()
    with pytest.raises(ValueError, match="did not read a stream"):
        fit(tmp_path / "run", moved, max_train_steps=3, resume="latest")


def test_too_few_shards_leave_an_old_run_alone(shards, tmp_path):
    fit(tmp_path / "run", shards, max_train_steps=1)
    with pytest.raises(ValueError, match=r"6 tar files, too few for 7 lanes \(1 processes x 7.*at most 6"):
        fit(tmp_path / "run", shards, max_train_steps=1, overwrite=True, num_workers=7)
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_log_line_and_strict(shards, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        fit(tmp_path / "run", shards, max_train_steps=1)
    assert "A stream of 6 tar files in 1 lanes, global batch 2; steps 0 to 1" in caplog.text
    with pytest.raises(ValueError, match="bad.png"):
        fit(tmp_path / "strict", shards, max_train_steps=12, strict=True)


def test_validation_images(shards, tmp_path):
    config = stream_config(tmp_path, shards, validation_split="train", num_validation_images=5)
    images = validation_images(config)
    assert images.shape == (5, 3, 4, 4) and images.dtype == torch.uint8
    with pytest.raises(ValueError, match="No validation images.*no split 'validation'.*'train' shows"):
        validation_images(stream_config(tmp_path, shards))


def test_flags(shards, tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--dataset", str(shards), "--caption_column", "txt"]
    config = parse_config(TrainingConfig, [*arguments, "--num_classes", "3", "--shuffle_buffer", "7"])
    data = training_images(config)
    assert data.has_captions and data.num_classes == 3 and data.shuffle_buffer == 7
    sampler = make_sampler(data, config, rank=0, world_size=1)
    assert isinstance(sampler, StreamSampler) and sampler.batch_size == config.batch_size
