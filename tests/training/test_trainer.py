from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfgen.training import Trainer
from hfgen.training.precision import autocast_forward, resolve_mixed_precision


def test_a_run_writes_everything(toy, tmp_path):
    folder = tmp_path / "run"
    trainer, _, finished = toy.fit(toy.config(folder, checkpointing_steps=3, checkpoints_total_limit=1))
    assert finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint-8", "final", "log.jsonl", "training_config.json", "validation",
    ]  # fmt: skip
    pictures = sorted(path.name for path in (folder / "validation").iterdir())
    assert pictures == [f"step-000000{step}_picture.png" for step in (3, 6, 8)]
    records = toy.records(folder)
    assert [record["step"] for record in records] == [2, 3, 4, 6, 6, 8, 8]
    training = [record for record in records if "model/loss" in record]
    assert training[-1]["model/loss"] < training[0]["model/loss"]
    assert {"model/error", "model/grad_norm", "model/learning_rate"} < set(training[0])
    assert [set(record) for record in records if record["step"] == 3] == [{"step", "validation/error"}]
    # Item 0 reports one skipped image each time it is drawn: once in each of 8 / 5 epochs.
    assert training[-1]["skipped_images"] in (1, 2)


def test_accumulation_equals_a_larger_batch(toy, tmp_path):
    """Without batch statistics and dropout, two micro-batches of 2 are one batch of 4."""
    weights = []
    for name, changes in (("a", {"batch_size": 4}), ("b", {"batch_size": 2, "gradient_accumulation_steps": 2})):
        trainer = Trainer(toy.config(tmp_path / name, **changes))
        task = toy.Task()
        task.modules["model"].layers = torch.nn.Linear(12, 12)
        task.training_step = lambda batch, draws, task=task: iter(
            [("model", (task.modules["model"](batch["pixels"]) - 1).square().mean(), {})]
        )
        task.pipeline = lambda modules: toy.Model()
        trainer._components = dict
        trainer.fit(task, toy.Data())
        weights.append(trainer.models["model"].layers.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_a_nonfinite_step_is_skipped_and_counted(toy, tmp_path, caplog):
    class Task(toy.Task):
        def training_step(self, batch, draws):
            for phase, loss, log in super().training_step(batch, draws):
                yield phase, loss * float("nan") if draws.step in (2, 3) else loss, log

    trainer = Trainer(toy.config(tmp_path / "run"))
    trainer.fit(Task(), toy.Data())
    assert "Step 3: the loss of phase 'model' is not finite" in caplog.text
    assert toy.records(tmp_path / "run")[-2]["skipped_steps"] == 2
    assert all(torch.isfinite(value).all() for value in trainer.models["model"].state_dict().values())
    assert next(iter(trainer.optimizers["model"].state.values()))["step"] == 6


def test_endless_nonfinite_steps_stop_the_run(toy, tmp_path):
    class Task(toy.Task):
        def training_step(self, batch, draws):
            for phase, loss, log in super().training_step(batch, draws):
                yield phase, loss / 0.0, log

    trainer = Trainer(toy.config(tmp_path / "run", max_skipped_steps=3))
    with pytest.raises(FloatingPointError, match="Step 3: the loss of phase 'model'.*3 times in a row"):
        trainer.fit(Task(), toy.Data())


def test_a_loss_that_trains_the_other_phase_is_an_error(toy, tmp_path):
    class Task(toy.Task):
        def training_step(self, batch, draws):
            output = self.modules["model"](batch["pixels"])
            yield "model", -self.modules["critic"](output).mean(), {}
            yield "critic", self.modules["critic"](output.detach()).mean(), {}

    trainer = Trainer(toy.config(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="phase 'model' left gradients.*phase 'critic'.*frozen"):
        trainer.fit(Task(adversarial=True), toy.Data())


def test_gradients_are_clipped(toy, tmp_path):
    norms = {}
    for limit in (0.0, 0.01):
        trainer = Trainer(toy.config(tmp_path / str(limit), max_train_steps=1, max_grad_norm=limit))
        task = toy.Task()
        trainer.optimizers = {}
        trainer._prepare(task, toy.Data())
        applied = []
        trainer.optimizers["model"].step = lambda applied=applied, trainer=trainer: applied.append(
            torch.nn.utils.get_total_norm([p.grad for p in trainer.models["model"].parameters()])
        )
        trainer._train_one_step(iter(trainer.loader))
        logged = trainer.window.means()["model/grad_norm"]
        norms[limit] = (float(applied[0]), logged)
    assert norms[0.0][0] == pytest.approx(norms[0.0][1])
    assert norms[0.01][0] == pytest.approx(0.01, rel=1e-3)
    assert norms[0.01][1] == pytest.approx(norms[0.0][1])


def test_a_missing_tracker_is_an_error(toy, tmp_path):
    with pytest.raises(ValueError, match="--report_to nothing: not installed.*log.jsonl"):
        Trainer(toy.config(tmp_path / "run", report_to="nothing"))


def test_mixed_precision_outputs_are_float32(toy):
    class Inner(toy.Model):
        def forward(self, pixels):
            self.dtype_inside = self.layers[0](pixels).dtype
            return super().forward(pixels)

    model, device = Inner(), torch.device("cpu")
    autocast_forward(model, device, "bf16")
    output = model(torch.randn(4, 12))
    assert model.dtype_inside == torch.bfloat16 and output.dtype == torch.float32
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        resolve_mixed_precision("fp16", device)


def test_launch_sets_mixed_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_mixed_precision(None, torch.device("cpu")) == "bf16"
    assert resolve_mixed_precision("no", torch.device("cpu")) == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="'fp8'; choose one of"):
        resolve_mixed_precision(None, torch.device("cpu"))


_TWO_PROCESSES = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("toy_conftest", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["toy_conftest"] = module
spec.loader.exec_module(module)
module.History.plot = lambda self: None
toy = module.Toy

def stop_second_rank(step, block):
    if (step, block) == (1, 1):
        os.kill(os.getpid(), signal.SIGTERM)

def fit(**changes):
    config = toy.config(pathlib.Path(sys.argv[2]), batch_size=2, max_train_steps=4, **changes)
    trainer, task, finished = toy.fit(config, adversarial=True, on_step=stop_second_rank)
    assert trainer.accelerator.num_processes == 2
    return trainer.step, finished, len(task.batches)

assert fit() == (2, False, 2)
assert fit(resume="latest") == (4, True, 2)
"""


def test_two_processes_equal_one_with_accumulation(toy, tmp_path):
    """Stopped by a signal to one of them and resumed. Only the order of sums and batch norm statistics differ."""
    script = tmp_path / "script.py"
    script.write_text(_TWO_PROCESSES)
    folder = tmp_path / "two"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(script), str(Path(__file__).with_name("conftest.py")), str(folder),
    ]  # fmt: skip
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]

    changes = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 4}
    trainer, _, _ = toy.fit(toy.config(tmp_path / "one", **changes), adversarial=True)
    for name in ("model", "ema_model", "critic"):
        loaded = toy.Model.from_pretrained(folder / "checkpoint-4" / name)
        for expected, actual in zip(trainer._components()[name].parameters(), loaded.parameters(), strict=True):
            assert torch.allclose(expected, actual, atol=1e-5), name
    losses = [
        [record["model/loss"] for record in toy.records(tmp_path / name) if "model/loss" in record]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (folder / "final" / "config.json").is_file()
