"""Calls of the command line in this process."""

from __future__ import annotations

from hfgen.cli import main


def run(*arguments) -> None:
    """A command that must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def error_of(capsys, *arguments) -> str:
    """The message of a command that must fail, without a traceback."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and not captured.out
    return captured.err.strip().splitlines()[-1].removeprefix("hfgen: error: ")
