"""A run survives being killed at any moment of a save, and being asked to stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from hfgen.training.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    resolve_checkpoint,
    restore_replaced,
    save_checkpoint,
    write_folder,
)
from support.torchrun import environment

# Opening, renaming, creating and deleting: what changes a file system and what comes just before.
MOMENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def _killed_at(moment: int, action) -> bool:
    """Run ``action`` in a child that gets SIGKILL at its n-th file operation; False if it finished before."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in MOMENTS:
                if seen == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


class Component:
    """Two small files, as a model's; written without third parties, so that a fork cannot meet their locks."""

    def __init__(self, value: int) -> None:
        self.value = value

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        for name in ("config.json", "weights"):
            (folder / name).write_text(str(self.value))

    def check(self, folder: Path) -> None:
        assert [(folder / name).read_text() for name in ("config.json", "weights")] == [str(self.value)] * 2


@pytest.mark.parametrize("step", [3, 2], ids=["next", "again"])
def test_a_kill_at_any_moment_of_a_save_leaves_a_complete_checkpoint(tmp_path, step):
    """Old checkpoints beyond the limit are deleted on the way, and ``again`` replaces the newest one."""
    moment = 0
    while True:
        folder = tmp_path / str(moment)
        for earlier in (1, 2):
            save_checkpoint(folder, earlier, {"model": Component(earlier)}, {"value": earlier})
        save = partial(save_checkpoint, folder, step, {"model": Component(3)}, {"value": 3}, total_limit=1)
        killed = _killed_at(moment, save)
        restore_replaced(folder)
        found = list_checkpoints(folder)
        newest = resolve_checkpoint(folder, "latest")
        assert newest == found[-1][1]
        for _, checkpoint in found:
            components = {"model": Component(0)}
            state = load_checkpoint(checkpoint, components, load=lambda module, path: None)
            Component(state["value"]).check(checkpoint / "model")
        assert (newest.name, state["value"]) in [("checkpoint-2", 2), (f"checkpoint-{step}", 3)]
        save_checkpoint(folder, 4, {"model": Component(4)}, {"value": 4}, total_limit=1)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
        shutil.rmtree(folder)
        if not killed:
            break
        moment += 1
    assert moment > 15, "the child was not killed often enough for this to be a test"


def test_a_kill_while_a_result_is_replaced_keeps_a_whole_one(tmp_path):
    moment, killed = 0, True
    while killed:
        target = tmp_path / str(moment) / "final"
        write_folder(target, lambda folder: (folder / "value").write_text("old"))
        killed = _killed_at(moment, partial(write_folder, target, lambda folder: (folder / "value").write_text("new")))
        restore_replaced(target.parent)
        assert (target / "value").read_text() in (("old", "new") if killed else ("new",))
        moment += 1
    assert moment > 4


_UNTIL_STOPPED = """
import sys
from support.process_runs import CodebookTask, Data
from hfgen.training import Trainer, TrainingConfig
from hfgen.training.history import History

History.plot = lambda self: None
config = TrainingConfig(
    output_dir=sys.argv[1], max_train_steps=10**6, batch_size=8, checkpointing_steps=0, validation_steps=0,
    logging_steps=1, progress=False, num_workers=1,
)
Trainer(config).fit(CodebookTask(random=True), Data())
"""


def test_sigterm_writes_a_checkpoint_and_exits_with_0(tmp_path):
    """Sent from outside and to the whole process group, the loader's worker included, as a job scheduler does."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(_UNTIL_STOPPED)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        log = folder / "log.jsonl"
        deadline = time.monotonic() + 240
        while not (log.exists() and log.stat().st_size > 0):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == 0, process.stderr.read()
    finally:
        process.kill()
    ((step, checkpoint),) = list_checkpoints(folder)
    assert torch.load(checkpoint / "training_state.pt", weights_only=True)["step"] == step
    assert not (folder / "final").exists()
