from __future__ import annotations

import errno
import os

import pytest
import torch

from hfgen.training import checkpoints
from hfgen.training.checkpoints import list_checkpoints, load_checkpoint, resolve_checkpoint, save_checkpoint


class Failing:
    """A component whose save breaks after a part of it was written."""

    def __init__(self, failure) -> None:
        self.failure = failure

    def save_pretrained(self, folder) -> None:
        folder.mkdir()
        (folder / "half.safetensors").write_bytes(b"half of the weights")
        self.failure()


def _disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_previous_checkpoint(toy, tmp_path):
    model = toy.Model()
    save_checkpoint(tmp_path, 3, {"model": model}, {"value": 1}, total_limit=1)
    with pytest.raises(OSError, match="checkpoint-5.*Free space.*checkpoint-3 is intact") as caught:
        save_checkpoint(tmp_path, 5, {"model": model, "second": Failing(_disk_full)}, {}, total_limit=1)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]
    loaded = toy.Model()
    state = load_checkpoint(resolve_checkpoint(tmp_path, "latest"), {"model": loaded})
    assert state == {"value": 1, "step": 3}
    assert torch.equal(loaded.layers[0].weight, model.layers[0].weight)


def test_a_killed_process_keeps_the_previous_checkpoint(toy, tmp_path):
    model = toy.Model()
    save_checkpoint(tmp_path, 3, {"model": model}, {})
    child = os.fork()
    if child == 0:
        save_checkpoint(tmp_path, 5, {"second": Failing(lambda: os._exit(9))}, {})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "checkpoint-5.tmp" / "second" / "half.safetensors").exists()
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-3"
    load_checkpoint(tmp_path / "checkpoint-3", {"model": toy.Model()})
    save_checkpoint(tmp_path, 4, {"model": model}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_a_run_whose_save_fails_resumes_from_the_one_before(toy, tmp_path, monkeypatch):
    straight, _, _ = toy.fit(toy.config(tmp_path / "a"))
    folder, save = tmp_path / "b", torch.save

    def save_once(value, path):
        if value["step"] == 6:
            path.write_bytes(b"half")
            _disk_full()
        save(value, path)

    monkeypatch.setattr(checkpoints.torch, "save", save_once)
    with pytest.raises(OSError, match="checkpoint-3 is intact"):
        toy.fit(toy.config(folder, checkpointing_steps=3))
    monkeypatch.undo()
    resumed, _, _ = toy.fit(toy.config(folder, resume="latest", checkpointing_steps=3))
    for expected, actual in zip(straight.models["model"].parameters(), resumed.models["model"].parameters()):
        assert torch.equal(expected, actual)
    assert toy.records(folder) == toy.records(tmp_path / "a")


def test_latest_is_the_newest_complete_one(toy, tmp_path):
    for step in (9, 10):
        save_checkpoint(tmp_path, step, {"model": toy.Model()}, {})
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-12.tmp").mkdir()
    assert resolve_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"
    with pytest.raises(ValueError, match="not a complete checkpoint.*checkpoint-10"):
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-11"))


def test_only_the_newest_are_kept(toy, tmp_path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"model": toy.Model()}, {}, total_limit=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 10]


def test_the_same_step_can_be_saved_again(toy, tmp_path):
    save_checkpoint(tmp_path, 1, {"model": toy.Model()}, {"value": 1})
    save_checkpoint(tmp_path, 1, {"model": toy.Model()}, {"value": 2})
    assert load_checkpoint(tmp_path / "checkpoint-1", {"model": toy.Model()})["value"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_components_load_with_from_pretrained(toy, tmp_path):
    trainer, _, _ = toy.fit(toy.config(tmp_path / "run", max_train_steps=3))
    average = trainer.averages["model"].module.state_dict()
    loaded = toy.Model.from_pretrained(tmp_path / "run" / "checkpoint-3" / "ema_model").state_dict()
    final = toy.Model.from_pretrained(tmp_path / "run" / "final").state_dict()
    for key, value in average.items():
        assert torch.equal(value, loaded[key]) and torch.equal(value, final[key]), key
    assert loaded["seen"] == 12
