"""What the command lines of the comparisons that train and report share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

PLACES = ("runs", "from_results", "page", "quick", "no_progress")  # do not change what is measured


def comparison_parser(description: str, results_file: str) -> argparse.ArgumentParser:
    """A parser that asks for a folder of runs, or for the results of another run to report again."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", type=Path, help="folder of all trainings, measurements and results")
    source.add_argument(
        "--from_results", type=Path, metavar="FILE",
        help=f"the {results_file} of another run: report what it holds, train and measure nothing",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--page", type=Path, help="renew the measured part of this Markdown page and its pictures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script runs, nothing else")
    parser.add_argument("--no_progress", action="store_true", help="no progress bars")
    return parser


def check_counts(parser: argparse.ArgumentParser, arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """End the program if one of these arguments is below 1, or the guidance."""
    for name in names:
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    if arguments.guidance < 1:
        parser.error(f"--guidance is {arguments.guidance}; it must be at least 1, which is off.")


def command_line(command: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """The command with what differs from the defaults, except for places."""
    words = [command]
    for name, value in vars(arguments).items():
        if name not in PLACES and value != parser.get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)
