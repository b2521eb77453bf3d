"""Two processes (gloo) compute what one computes over the same global batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import process_runs
from support.torchrun import ROOT, torchrun


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    torchrun(ROOT / "tests" / "support" / "process_runs.py", folder)
    return folder


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _losses(folder: Path) -> torch.Tensor:
    """(steps, 4); nan where a phase had no loss."""
    names = ("model/loss", "model/grad_norm", "critic/loss", "critic/grad_norm")
    rows = [
        [record.get(name, float("nan")) for name in names] for record in _records(folder) if "model/loss" in record
    ]
    return torch.tensor(rows)


def test_two_processes_equal_one(runs, tmp_path):
    """Losses, gradients, averages and the codebook's statistics, which count the vectors of both."""
    process_runs.fit(tmp_path, processes=1, random=False)
    one, two = _losses(tmp_path), _losses(runs / "equal")
    assert len(one) == 10 and one[0].isnan().tolist() == [False, False, True, True]  # the critic's phase starts later
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6, equal_nan=True)
    for component in ("model", "ema_model", "critic"):
        file = f"checkpoint-10/{component}/diffusion_pytorch_model.safetensors"
        torch.testing.assert_close(load_file(runs / "equal" / file), load_file(tmp_path / file), rtol=1e-5, atol=1e-6)
    assert (
        load_file(tmp_path / "checkpoint-10/model/diffusion_pytorch_model.safetensors")["quantizer.cluster_size"].max()
        > 1.5
    ), "no code was hit often enough for the comparison to mean anything"


def test_two_processes_resume_bit_exactly(runs):
    """With accumulation, average, adversarial phase, codebook averages and restarts, and loader workers."""
    assert {path.name for path in (runs / "stopped").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (3, 5, 6, 10)
    }
    expected, actual = (runs / name / "checkpoint-10" for name in ("straight", "stopped"))
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        torch.testing.assert_close(load_file(actual / file), load_file(expected / file), rtol=0, atol=0)
    states = [torch.load(folder / "training_state.pt", weights_only=True) for folder in (expected, actual)]
    torch.testing.assert_close(*[state["optimizers"] for state in states], rtol=0, atol=0)
    # The log's means over processes are rounded at each checkpoint.
    torch.testing.assert_close(
        _losses(runs / "stopped"), _losses(runs / "straight"), rtol=1e-6, atol=0, equal_nan=True
    )


def test_an_empty_selection_on_one_process_does_not_hang(runs):
    """The mean of a logged value is over the processes that have it."""
    values = [record["model/selected"] for record in _records(runs / "selection") if "model/loss" in record]
    assert len(values) == 3 and all(value > 0 for value in values)
