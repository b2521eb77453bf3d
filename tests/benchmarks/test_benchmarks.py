"""The benchmarks run as documented; they stop with an error unless both paths draw equal tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.benchmark_modules import benchmark_modules

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = ["--batch", "2", "--threads", "1", "--repeats", "1"]


@pytest.fixture(scope="module")
def modules():
    """The modules beside the scripts, by name."""
    return benchmark_modules("comparison", "official_titok", "sampling")


@pytest.fixture
def run(modules, monkeypatch):
    """Run a script in this process."""

    def run_main(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        modules[name].main()

    return run_main


@pytest.mark.parametrize(
    ("system", "parts"), [("var", ["sample"]), ("maskgit", ["sample"]), ("titok", ["encode", "decode"])]
)
def test_sampling_compares_equal_outputs(system, parts, run, tmp_path, capsys):
    output = tmp_path / "rows.json"
    run("sampling", "--system", system, *SAMPLING, "--json", output)
    rows = json.loads(output.read_text())
    assert [row["part"] for row in rows] == parts
    printed = capsys.readouterr().out
    for row in rows:
        assert row["ratio"] > 0 and row["max_pixel_difference"] < 1e-4
        assert f"| {row['part']} | float32 | 1 | 2 |" in printed


@pytest.fixture
def quality(tmp_path):
    """Run benchmarks/quality.py as a program; its numbers and what it printed."""

    def run_quality(*arguments):
        output = tmp_path / "rows.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), *arguments, "--json", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return json.loads(output.read_text()), result.stdout

    return run_quality


@pytest.mark.parametrize(("name", "psnr"), [("var-shapes", 28), ("titok-shapes", 24)])
def test_quality(name, psnr, quality):
    rows, _ = quality(name, "--images", "16", "--per_class", "1", "--guidance", "2")
    assert rows["reconstruction"]["psnr"] > psnr and rows["generation"]["2"]["label"] > 0.5


def test_quality_of_one_pass(quality):
    rows, _ = quality("meanflow-shapes", "--per_class", "2", "--guidance", "1", "--steps", "1")
    assert rows["generation"]["1"]["label"] > 0.6 and "reconstruction" not in rows


@pytest.mark.parametrize("name", ["flow-shapes", "transfusion-shapes"])
def test_quality_of_captions(name, quality):
    rows, printed = quality(name, "--captions", "8", "--steps", "8", "--guidance", "2")
    shares, attributes = rows["generation"]["2"], ("shape", "colour", "size", "cell")
    assert min(shares[attribute] for attribute in attributes) > 0.7 and "| 2 | " in printed
    if name == "flow-shapes":  # learned two objects, and does not write
        assert shares["pair_size"] > 0.7 and "both objects" in printed and "captioning" not in rows
    else:
        assert min(rows["captioning"][attribute] for attribute in attributes) > 0.7 and "pair" not in shares


def test_different_tokens_are_not_timed(modules):
    zeros, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    paths = {"plain": lambda: (zeros, None), "optimised": lambda: (ones, None), "transformer": lambda: None}
    comparison = modules["comparison"].Comparison(part="sample", batch=1, dtype=torch.float32, **paths)
    with pytest.raises(SystemExit, match="Tokens differ: 4 of 4"):
        modules["comparison"].measure(comparison, threads=1, repeats=1, device="cpu")


@pytest.mark.parametrize(("system", "saved"), [("maskgit", 0.05), ("titok", 0.01)])
@torch.no_grad()
def test_the_optimised_path_does_less(system, saved, modules):
    """Floating-point operations, which no other work on the machine disturbs."""
    benchmark = modules["sampling"].SYSTEMS[system]
    for comparison in benchmark.compare(benchmark.load("tiny", torch.float32, "cpu"), batch=2):
        operations = []
        for path in (comparison.plain, comparison.optimised):
            with FlopCounterMode(display=False) as counter:
                path()
            operations.append(counter.get_total_flops())
        assert operations[1] < (1 - saved) * operations[0], comparison.part


def test_bad_arguments(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("sampling", "--system", "titok", "--size", "var-d16")
    assert "choose one of tiny, titok-s-128" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("official_titok", tmp_path)
    assert "is no clone of bytedance/1d-tokenizer" in capsys.readouterr().err
