"""What the command lines of the comparisons that train and report share."""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from helping import HelpFormatter, check_counts, check_runs, read_object
from pages import with_section

PLACES = ("runs", "from_results", "page", "quick", "no_progress")  # do not change what is measured


def comparison_parser(description: str, results_file: str) -> argparse.ArgumentParser:
    """A parser that asks for a folder of runs, or for the results of another run to report again."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", type=Path, help="folder of all trainings, measurements and results")
    source.add_argument(
        "--from_results", type=Path, metavar="FILE",
        help=f"the {results_file} of another run: report what it holds, train and measure nothing",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="all is trained with each of them")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--page", type=Path, help="renew the measured part of this Markdown page and its pictures")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script runs, nothing else")
    parser.add_argument("--no_progress", action="store_true", help="no progress bars")
    return parser


def check_comparison(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, counts: Sequence[str], markers: tuple[str, str]
) -> None:
    """End the program if a count or the guidance is below 1, or the runs or the page are not what they should be."""
    check_counts(parser, arguments, (*counts, "threads", "guidance"))
    check_runs(parser, arguments.runs)
    if arguments.page is not None:
        check_page(parser, arguments.page, [markers])


def check_page(parser: argparse.ArgumentParser, page: Path, markers: Sequence[tuple[str, str]]) -> None:
    """End the program if ``--page`` is missing or lacks the lines between which it is renewed."""
    if not page.is_file():
        begin, end = markers[0]
        parser.error(f"--page {page} is no file; make it with the lines {begin} and {end}.")
    text = page.read_text(encoding="utf-8")
    for begin, end in markers:
        try:
            with_section(text, begin, end, "")
        except ValueError as error:
            parser.error(f"--page {page}: {error}")


def stored_results(path: Path, parts: Sequence[str], names: Container[str]) -> dict:
    """The results of an earlier run, for ``--from_results``.

    Args:
        path: what the run wrote.
        parts: of the results, that the report reads.
        names: that what was measured may have.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"--from_results {path} is no file; give the results that a run wrote to its --runs.")
    results = read_object(path)
    missing = [part for part in parts if part not in results]
    if missing:
        raise ValueError(f"--from_results {path} lacks {', '.join(missing)}: these are no results of this program.")
    measures = results["measures"]
    if not isinstance(measures, Mapping) or not all(isinstance(each, Mapping) and each for each in measures.values()):
        raise ValueError(f"--from_results {path}: 'measures' must hold for every name the values by seed.")
    unknown = [name for name in measures if name not in names]
    if unknown:
        raise ValueError(f"--from_results {path} has measured {', '.join(unknown)}, which this program does not know.")
    return results


def command_line(command: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """The command with what differs from the defaults, except for places."""
    words = [command]
    for name, value in vars(arguments).items():
        if name not in PLACES and value != parser.get_default(name):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)
