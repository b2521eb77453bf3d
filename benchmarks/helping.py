"""The command lines of the benchmarks: their help, their checks before any work, and one line for a wrong input."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

TRACEBACK = "HFGEN_TRACEBACK"  # environment variable; 1 keeps the tracebacks


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and the default of every option that has one, as it is typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        absent = action.default is None or action.default is False or action.default == ""
        if absent or "default:" in (action.help or ""):
            return action.help
        if isinstance(action.default, (list, tuple)):
            typed = " ".join(map(str, action.default)).replace("%", "%%")
            return f"{action.help} (default: {typed})" if typed else action.help
        return super()._get_help_string(action)


def run(main: Callable[[], None]) -> None:
    """Run a program: a wrong input, a ``ValueError`` or an ``OSError``, ends it with one line and exit code 2.

    With the environment variable :data:`TRACEBACK` set to 1 the traceback is shown instead.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        name = Path(sys.argv[0]).name
        print(f"{name}: error: {message} ({TRACEBACK}=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(2) from None


def check_counts(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, names: Sequence[str], least: int = 1
) -> None:
    """End the program if one of these arguments, or a number of one that is a list, is below ``least``."""
    for name in names:
        value = getattr(arguments, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each < least:
                parser.error(f"--{name} is {each}; it must be at least {least}.")


def check_output(parser: argparse.ArgumentParser, flag: str, path: Path | None) -> None:
    """End the program if a file that is written after all work could not be written."""
    if path is None:
        return
    if path.is_dir():
        parser.error(f"{flag} {path} is a folder; give the name of a file.")
    if not path.parent.is_dir():
        parser.error(f"{flag} {path}: there is no folder {path.parent}; make it first.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        parser.error(f"{flag} {path} may not be written; give another place.")


def check_runs(parser: argparse.ArgumentParser, folder: Path | None) -> None:
    """End the program if ``--runs`` is, or lies below, what is no folder."""
    if folder is None:
        return
    for place in (folder, *folder.parents):
        if place.exists():
            if not place.is_dir():
                parser.error(f"--runs {folder}: {place} is a file; give a folder, which is made if it is new.")
            return


def check_clone(parser: argparse.ArgumentParser, folder: Path, repository: str, file: str) -> None:
    """End the program if a folder is no clone of a repository, which has ``file``."""
    if not (folder / file).is_file():
        parser.error(f"{folder} is no clone of {repository}: it has no {file}.")


def check_saved(parser: argparse.ArgumentParser, flag: str, folder: Path, file: str, kind: str) -> dict:
    """The configuration of a saved pipeline (``file`` is model_index.json) or model (config.json).

    Ends the program if the folder has none, or one of another class than ``kind``.
    """
    if not (folder / file).is_file():
        final = folder / "final"
        hint = f"the result of a training is in its folder {final}" if final.is_dir() else f"expected a saved {kind}"
        parser.error(f"{flag} {folder} has no {file}: {hint}.")
    config = read_object(folder / file)
    if config.get("_class_name") != kind:
        parser.error(f"{flag} {folder} is a {config.get('_class_name')}; expected a {kind}.")
    return config


def read_object(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or none of an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Give a file that a benchmark wrote.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a JSON object.")
    return value
