"""Runs of the example scripts inside of the test process, and what they leave."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from hfgen.training.history import History

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = ["--max_train_steps", "2", "--batch_size", "4", "--limit", "8", "--num_validation_images", "2", "--no_progress"]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_script(script: str, folder: Path, *arguments: str) -> Path:
    """Call the script with ``--output_dir folder``; the folder of its result. Errors are raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", "--debug", "--output_dir", str(folder), *arguments])
        patch.setattr(History, "plot", lambda self: None)
        load_script(script).main()
    return folder / "final"


def read_log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder: Path, name: str) -> list[float]:
    """The values of one quantity, in the order of the steps."""
    return [record[name] for record in read_log(folder) if name in record]


def assert_equal_checkpoints(first: Path, second: Path) -> None:
    """Weights, averages and optimizer states are equal, bit by bit."""
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files and files == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    for name in files:
        expected, actual = load_file(first / name), load_file(second / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(value, actual[key]) for key, value in expected.items()), name
    states = [torch.load(folder / "training_state.pt", weights_only=True) for folder in (first, second)]
    expected, actual = (state["optimizers"] for state in states)
    assert expected.keys() == actual.keys()
    for name, optimizer in expected.items():
        assert optimizer["param_groups"] == actual[name]["param_groups"], name
        torch.testing.assert_close(optimizer["state"], actual[name]["state"], rtol=0, atol=0)
