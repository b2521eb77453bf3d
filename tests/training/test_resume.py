"""A run that stops and resumes is the run that did not stop, bit by bit."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import torch

from support import process_runs


def _stop_at(step: int):
    def on_step(current: int, block: int) -> None:
        if current == step and block == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def _assert_equal_states(first, second) -> None:
    for name, module in first._components().items():
        other = second._components()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), (name, key)
    for name, optimizer in first.optimizers.items():
        expected, actual = optimizer.state_dict(), second.optimizers[name].state_dict()
        assert expected["param_groups"] == actual["param_groups"]
        for index, values in expected["state"].items():
            for key, value in values.items():
                assert torch.equal(value, actual["state"][index][key]), (name, index, key)


@pytest.mark.parametrize(
    ("accumulation", "workers", "adversarial", "ema_decay"),
    [(1, 0, False, 0.9), (2, 0, True, 0.9), (1, 2, True, 0.9), (2, 2, False, 0.0)],
)
def test_resumed_run_is_bit_equal(toy, tmp_path, accumulation, workers, adversarial, ema_decay):
    """20 items in batches of 4: an epoch is 5 steps (2 with accumulation), so runs cross epochs; the stop is at 4."""
    changes = {"gradient_accumulation_steps": accumulation, "num_workers": workers, "ema_decay": ema_decay}
    straight, straight_task, finished = toy.fit(toy.config(tmp_path / "a", **changes), adversarial=adversarial)
    assert finished

    folder = tmp_path / "b"
    stopped, _, finished = toy.fit(toy.config(folder, **changes), adversarial=adversarial, on_step=_stop_at(4))
    assert not finished
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-5"]
    assert not (folder / "final").exists()
    resumed, task, finished = toy.fit(toy.config(folder, resume="latest", **changes), adversarial=adversarial)
    assert finished
    assert resumed.config.max_train_steps == resumed.step == 8
    assert task.batches == straight_task.batches[5 * accumulation :]

    _assert_equal_states(straight, resumed)
    assert toy.records(folder) == toy.records(tmp_path / "a")
    a, b = (toy.Model.from_pretrained(tmp_path / name / "final") for name in "ab")
    for key, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[key])


@pytest.mark.parametrize(
    ("accumulation", "workers", "stops"),
    [(1, (0, 2, 0), (2, 5)), (2, (2, 0), (5,)), (2, (0, 2), (3,))],
    ids=["middle and end of an epoch", "end of an epoch", "middle of an epoch"],
)
def test_a_codebook_of_moving_averages_resumes(tmp_path, accumulation, workers, stops):
    """Its statistics and restarts, with an adversarial phase that starts on the way; an epoch is six steps."""
    changes = {"gradient_accumulation_steps": accumulation, "batch_size": 8 // accumulation}
    fit = partial(process_runs.fit, processes=1, random=True, **changes)
    straight, straight_task = fit(tmp_path / "a")
    batches = []
    for position, stop in enumerate([*stops, None]):
        terminate = None if stop is None else (stop, 0)
        resume = "latest" if position else None
        resumed, task = fit(tmp_path / "b", terminate=terminate, resume=resume, num_workers=workers[position])
        batches += task.batches
    assert (tmp_path / "b" / f"checkpoint-{stops[-1] + 1}").is_dir()
    assert batches == straight_task.batches
    assert resumed.models["model"].quantizer.restart.step == 10 * accumulation
    _assert_equal_states(straight, resumed)


def test_the_comparison_can_fail(toy, tmp_path):
    first, _, _ = toy.fit(toy.config(tmp_path / "a"))
    second, _, _ = toy.fit(toy.config(tmp_path / "b", seed=1))
    with pytest.raises(AssertionError):
        _assert_equal_states(first, second)


def test_resume_from_an_earlier_checkpoint_cuts_the_log(toy, tmp_path):
    folder = tmp_path / "run"
    toy.fit(toy.config(folder, checkpointing_steps=3, checkpoints_total_limit=None))
    expected = toy.records(folder)
    for name in ("checkpoint-6", "checkpoint-8"):
        (folder / name).rename(tmp_path / name)
    toy.fit(toy.config(folder, resume=str(folder / "checkpoint-3")))
    assert toy.records(folder) == expected


def test_resume_before_a_later_checkpoint_is_refused(toy, tmp_path):
    folder = tmp_path / "run"
    toy.fit(toy.config(folder, checkpointing_steps=4))
    with pytest.raises(ValueError, match="checkpoint-8.*--resume latest"):
        toy.fit(toy.config(folder, resume=str(folder / "checkpoint-4")))


def test_an_existing_run_is_not_overwritten_by_accident(toy, tmp_path):
    folder = tmp_path / "run"
    toy.fit(toy.config(folder, max_train_steps=2))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--resume latest.*--overwrite"):
        toy.fit(toy.config(folder, max_train_steps=2))
    toy.fit(toy.config(folder, max_train_steps=1, overwrite=True))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert {record["step"] for record in toy.records(folder)} == {1}


def test_a_run_that_failed_at_once_is_no_obstacle(toy, tmp_path):
    folder = tmp_path / "run"

    def fail(step, block):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        toy.fit(toy.config(folder), on_step=fail)
    assert toy.fit(toy.config(folder, max_train_steps=1))[2]


def test_too_little_data_leaves_an_old_run_alone(toy, tmp_path):
    folder = tmp_path / "run"
    toy.fit(toy.config(folder, max_train_steps=1))
    with pytest.raises(ValueError, match="3 items, fewer than one global batch of 4"):
        toy.fit(toy.config(folder, overwrite=True), length=3)
    assert (folder / "checkpoint-1").is_dir()


def test_resume_latest_without_a_checkpoint_starts_a_run(toy, tmp_path):
    trainer, _, finished = toy.fit(toy.config(tmp_path / "run", max_train_steps=1, resume="latest"))
    assert finished and trainer.step == 1


def test_resume_with_another_ema_setting_names_the_missing_part(toy, tmp_path):
    folder = tmp_path / "run"
    toy.fit(toy.config(folder, max_train_steps=2, ema_decay=0.0))
    with pytest.raises(ValueError, match="ema_model.*--ema_decay"):
        toy.fit(toy.config(folder, max_train_steps=3, resume="latest"))


def test_a_longer_run_can_follow(toy, tmp_path, caplog):
    folder = tmp_path / "run"
    toy.fit(toy.config(folder, max_train_steps=2))
    trainer, _, _ = toy.fit(toy.config(folder, max_train_steps=4, resume="latest"))
    assert trainer.step == 4
    assert "the run had 2" in caplog.text
