"""The entry point of scripts: flags in, one line for a wrong input, a traceback for what happens in training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hfgen.data.rows import BrokenImageError
from hfgen.training import Trainer, TrainingConfig, loading_flag, script
from support.example_runs import EXAMPLES


def run(monkeypatch, main, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["folder/train_toy.py", *map(str, arguments)])
    script(TrainingConfig, "A toy.")(main)()


def test_main_gets_what_the_command_line_says(monkeypatch):
    configs = []
    run(monkeypatch, configs.append, "--output_dir", "x", "--seed", "7")
    assert configs == [TrainingConfig(output_dir="x", seed=7)]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("No\n  such data."),
        FileNotFoundError("No such data."),
        ImportError("No such data."),
        ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback: \nx\nValueError: No such data."),
    ],
)
def test_a_wrong_input_is_one_line_and_exit_code_2(monkeypatch, capsys, error):
    def main(config):
        raise error

    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, main, "--output_dir", "x")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "train_toy.py: error: No such data.\n"
    with pytest.raises(type(error)):
        run(monkeypatch, main, "--output_dir", "x", "--debug")


def test_other_errors_keep_their_traceback(monkeypatch):
    def main(config):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(monkeypatch, main, "--output_dir", "x")


def test_errors_of_a_training_keep_their_traceback(monkeypatch, capsys, tmp_path, toy):
    """An hour of training that ends with an error of torch shall tell where; what it begins with is input."""

    def break_down(step, block):
        raise ValueError("deep inside")

    def main(config):
        Trainer(config).fit(toy.Task(on_step=break_down), toy.Data())

    flags = ["--output_dir", tmp_path / "run", "--max_train_steps", "1", "--batch_size", "4", "--no_progress"]
    with pytest.raises(ValueError, match="deep inside"):
        run(monkeypatch, main, *flags)
    with pytest.raises(SystemExit):
        run(monkeypatch, main, *flags, "--batch_size", "64")
    assert capsys.readouterr().err.splitlines()[-1].startswith("train_toy.py: error: ")


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_broken_images_are_a_wrong_input_whenever_they_are_found(monkeypatch, capsys, tmp_path, toy, num_workers):
    class Data(toy.Data):
        def __getitem__(self, key):
            raise BrokenImageError("cannot read the image cat.png")

    def main(config):
        Trainer(config).fit(toy.Task(), Data())

    flags = ["--output_dir", tmp_path / "run", "--max_train_steps", "1", "--batch_size", "4", "--no_progress"]
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, main, *flags, "--num_workers", num_workers)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "train_toy.py: error: cannot read the image cat.png"


def test_the_usage_line_shows_what_is_required_and_does_not_hide_the_message(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, None, "--seed", "1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "--output_dir STR" in lines[0] and "--help" in lines[0]
    assert "Missing --output_dir" in lines[1]


@pytest.mark.parametrize("content", [None, "final/config.json", "notes.txt"])
def test_what_cannot_be_loaded_is_named_with_its_flag(tmp_path, content):
    folder = tmp_path / "model"
    if content is not None:
        (folder / content).parent.mkdir(parents=True)
        (folder / content).touch()
    expected = {
        None: "there is no such folder",
        "final/config.json": f"give its result, {folder}",
        "notes.txt": "kind",
    }
    with pytest.raises(OSError, match=f"--vae {folder}: .*{expected[content]}"), loading_flag("vae", str(folder)):
        raise OSError("no config.json")


def test_a_script_as_a_program(tmp_path):
    flags = ["--output_dir", "x", "--tokenizer", str(tmp_path / "none"), "--no_progress"]
    command = [sys.executable, str(EXAMPLES / "train_var.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"train_var.py: error: --tokenizer {tmp_path / 'none'}: there is no such folder" in done.stderr
