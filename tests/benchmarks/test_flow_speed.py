"""The benchmark of flow pipelines compares equal outputs, and the pipelines visit their networks once per call."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from support.benchmark_modules import benchmark_modules

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def modules():
    """The script and the module of its system."""
    found = benchmark_modules("sampling", "speed_rectified_flow")
    return {"sampling": found["sampling"], "flow": found["speed_rectified_flow"]}


def test_pipelines_of_diffusers_make_the_same(modules, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(modules["flow"], "STEPS", 2)
    output = tmp_path / "rows.json"
    flags = ["--system", "rectified_flow", "--batch", "1", "--threads", "1", "--repeats", "1", "--json", str(output)]
    monkeypatch.setattr(sys, "argv", ["sampling.py", *flags])
    modules["sampling"].main()
    rows, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert [row["part"] for row in rows] == ["sd3", "dit", "dit network"]
    for row in rows:
        assert row["ratio"] > 0 and row["max_pixel_difference"] < 1e-4
        assert f"| {row['part']} | float32 | 1 | 1 |" in printed


@torch.no_grad()
def test_different_outputs_are_not_timed(modules, monkeypatch):
    benchmark = modules["flow"]
    monkeypatch.setattr(benchmark, "STEPS", 1)
    networks = benchmark.load("tiny", torch.float32, "cpu")
    monkeypatch.setattr(benchmark, "DIFFERENCE", {torch.float32: -1.0})
    with pytest.raises(SystemExit, match="Outputs of sd3 differ by .*nothing was timed"):
        benchmark.compare(networks, batch=1)


@pytest.mark.parametrize("part", ["sd3", "dit"])
@torch.no_grad()
def test_work_that_no_step_changes_is_done_once(part, modules, monkeypatch):
    """Diffusers visits all modules of a network to tell its dtype, which took as long as a small network's pass."""
    benchmark = modules["flow"]
    networks = benchmark.load("tiny", torch.float32, "cpu")
    network, visits = getattr(networks, part), []
    dtype = type(network).dtype.fget
    monkeypatch.setattr(type(network), "dtype", property(lambda self: visits.append(1) or dtype(self)))
    counts = []
    for steps in (1, 3):
        monkeypatch.setattr(benchmark, "STEPS", steps)
        make = {"sd3": benchmark._sd3, "dit": lambda net, batch: benchmark._dit(net, net, "dit", batch)}[part]
        comparison = make(network, 1)
        visits.clear()
        comparison.optimised()
        counts.append(len(visits))
    assert counts[0] == counts[1] > 0
