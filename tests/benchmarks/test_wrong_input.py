"""Every program ends in one line for a wrong input, before it works; its help shows what can be typed."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.benchmark_modules import benchmark_modules

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "zoo"
PROGRAMS = (
    "data", "official_titok", "official_var", "paradigms", "plan", "quality", "sampling", "tokens", "training",
    "unified",
)  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    return benchmark_modules("helping", "comparisons", "pages", *PROGRAMS)


@pytest.fixture
def ended(modules, monkeypatch, capsys, tmp_path):
    """The last line of a program that ends with code 2, in an empty folder and before any work."""

    def call(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            modules["helping"].run(modules[name].main)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        last = captured.err.splitlines()[-1]
        assert last.startswith(f"{name}.py: error: ") and not captured.out
        return last

    return call


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("data --images 0", "--images is 0; it must be at least 32"),
        ("data --images 5 --steps 1", "--images is 5; it must be at least 32"),
        ("data --images 64 --steps 0", "--steps is 0; it must be at least 2"),
        ("data --images 64 --steps 1", "--steps is 1; it must be at least 2"),
        ("data --json nosuch/x.json", "there is no folder nosuch"),
        ("official_var .", "is no clone of FoundationVision/VAR: it has no models/var.py"),
        ("official_titok .", "is no clone of bytedance/1d-tokenizer"),
        ("plan --json nosuch/x.json", "--json nosuch/x.json: there is no folder nosuch"),
        ("plan --json .", "--json . is a folder"),
        ("plan --gpus 8 0", "--gpus is 0; it must be at least 1"),
        ("sampling --device gpu", "--device gpu is no device"),
        ("sampling --device cuda:99", "--device cuda:99 is not here"),
        ("sampling --batch 1 0", "--batch is 0; it must be at least 1"),
        ("sampling --threads 0", "--threads is 0"),
        ("sampling --repeats 0", "--repeats is 0"),
        ("sampling --json nosuch/x.json", "there is no folder nosuch"),
        ("training --rounds 0", "--rounds is 0"),
        ("training --batch_size 0", "--batch_size is 0"),
        ("quality var-shapes --path nosuch", "--path nosuch has no model_index.json"),
        (f"quality var-shapes --path {ZOO}/titok-shapes", "is a MaskGITPipeline; expected a VARPipeline"),
        ("quality var-shapes --images 0", "--images is 0"),
        ("quality var-shapes --per_class 0", "--per_class is 0"),
        ("quality var-shapes --temperature 0", "--temperature is 0; it must be above 0"),
        ("quality var-shapes --choice_temperature 1", "--choice_temperature is nothing that var-shapes has"),
        ("quality var-shapes --steps 4", "--steps is nothing that var-shapes has"),
        ("quality meanflow-shapes --temperature 3", "--temperature is nothing that meanflow-shapes has"),
        ("quality titok-shapes --steps 100", "--steps is 100; it must be at most the 16 tokens"),
        ("quality var-shapes --json nosuch/x", "there is no folder nosuch"),
        (
            "tokens --runs runs --parts steps --titok_pipeline nosuch",
            "--titok_pipeline nosuch has no model_index.json",
        ),
        (f"tokens --runs runs --parts steps --titok_pipeline {ZOO}/var-shapes", "expected a MaskGITPipeline"),
        (f"tokens --runs runs --parts steps --grid_pipeline {ZOO}/titok-shapes", "give it as --titok_pipeline"),
        ("tokens --runs runs --parts stages --vqgan nosuch", "--vqgan nosuch has no config.json"),
        ("tokens --runs runs --parts number --images 0", "--images is 0"),
    ],
)
def test_a_wrong_input_is_named(command, message, ended):
    assert message in ended(*command.split())


@pytest.mark.parametrize("name", ["paradigms", "unified"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--from_results nosuch.json", "--from_results nosuch.json is no file"),
        ("--from_results wrong.json", "--from_results wrong.json lacks command, seeds"),
        ("--from_results text.md", "text.md is no JSON"),
        ("--from_results list.json", "list.json holds a list"),
        ("--from_results other.json", "has measured gan, which this program does not know"),
        ("--runs text.md", "text.md is a file; give a folder"),
        ("--runs text.md/runs", "text.md is a file; give a folder"),
        ("--runs runs --page nosuch.md", "--page nosuch.md is no file"),
        ("--runs runs --page text.md", "--page text.md: The page needs the lines <!--"),
        ("--runs runs --threads 0", "--threads is 0"),
    ],
)
def test_wrong_places_of_a_comparison(name, flags, message, ended, modules, tmp_path):
    (tmp_path / "text.md").write_text("# Nothing")
    (tmp_path / "wrong.json").write_text("{}")
    (tmp_path / "list.json").write_text("[]")
    parts = dict.fromkeys(modules[name].RESULT_PARTS, {})
    (tmp_path / "other.json").write_text(json.dumps(parts | {"measures": {"gan": {"0": {}}}}))
    assert message in ended(name, *flags.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--resolution", "30"],
            "--resolution is 30; the autoencoder zoo/transfusion-shapes/vae needs a multiple of 4",
        ),
        (["--patch_size", "3"], "--patch_size is 3; it must divide the 8 latents"),
        (["--images", "0"], "--images is 0"),
    ],
)
def test_sizes_that_do_not_fit(flags, message, ended):
    assert message in ended("paradigms", "--runs", "runs", *flags)


@pytest.mark.parametrize("shown", [False, True])
def test_the_traceback_is_shown_on_demand(shown, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "unified.py", "--from_results", tmp_path / "nosuch.json"]
    environment = os.environ | {"HFGEN_TRACEBACK": "1" if shown else "0"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if shown:
        assert result.returncode == 1 and "Traceback" in result.stderr
    else:
        (line,) = result.stderr.splitlines()
        assert result.returncode == 2 and line.startswith("unified.py: error: --from_results")
        assert line.endswith("(HFGEN_TRACEBACK=1 shows the traceback)")


def test_every_program_is_run_so():
    for name in PROGRAMS:
        text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        assert text.endswith('if __name__ == "__main__":\n    run(main)\n'), name


def test_a_place_that_may_not_be_written(modules, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(SystemExit):
        modules["helping"].check_output(argparse.ArgumentParser(), "--json", tmp_path / "new.json")
    assert "may not be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_shows_defaults_once_and_as_they_are_typed(name, modules, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        modules[name].main()
    options = capsys.readouterr().out.partition("options:")[2]
    assert "(default: )" not in options and "default: [" not in options and "default: (" not in options
    assert all(line.count("(default") <= 1 for line in options.splitlines())
    expected = {
        "sampling": "images per call (default: 1 8)",
        "training": "data loading processes (default: 0)",
        "paradigms": "each of them (default: 0 1 2)",
        "unified": "each of them (default: 0 1 2)",
    }
    assert expected.get(name, "") in options


def test_lines_of_prose_are_wrapped(modules):
    pages = modules["pages"]
    words = "word " * 40
    code = "`" + "a code " * 30 + "`"
    kept = [
        "| " + words + "|",
        "![" + words + "](images/a.png)",
        "# " + words,
        "<!-- " + words + "-->",
        "```",
        words,
        "```",
        code,
    ]
    assert pages.wrapped("\n".join(kept)).split("\n") == kept
    content = "\n".join(
        [
            f"- Item: {words}**is undecided** {words}",
            "",
            f"Measured by {code} at last.",
            "",
            "x" * 110 + " - 1. > 0",
        ]
    )
    found = pages.wrapped(content)
    assert found.split() == content.split() and pages.wrapped(found) == found
    lines = found.split("\n")
    assert all(len(line) <= pages.WIDTH for line in lines if line not in (code, lines[-1]))
    assert code in lines and any("**is undecided**" in line for line in lines)
    assert lines[0].startswith("- ") and lines[1].startswith("  word")
    assert lines[-1].startswith("x")  # a dash at the start of a line would be a list
    page = pages.with_section("A\n<begin>\nold\n<end>\nB", "<begin>", "<end>", content)
    assert page == f"A\n<begin>\n{found}\n<end>\nB"
