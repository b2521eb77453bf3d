"""The entry point of a training script: its command line, its log, and one line for a wrong input."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from hfgen.data.rows import BrokenImageError
from hfgen.training.config import ConfigT, parse_command_line
from hfgen.training.trainer import Trainer


def script(config_class: type[ConfigT], description: str | None) -> Callable[[Callable[[ConfigT], None]], Callable]:
    """Turn ``main(config)`` into the ``main()`` of a script, which reads the command line.

    A wrong input, a ``ValueError``, an ``OSError`` or an ``ImportError`` from before the first optimizer step, ends
    the program with one line and exit code 2, and with the whole traceback if ``--debug`` is given. What is raised
    while a model trains keeps its traceback, but for images that cannot be read: these are found one by one.

    Args:
        config_class: dataclass of the flags, made with :func:`flag`.
        description: of the script, for ``--help``.
    """

    def decorate(main: Callable[[ConfigT], None]) -> Callable[[], None]:
        @wraps(main)
        def run() -> None:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
            config, debug = parse_command_line(config_class, description=description)
            try:
                main(config)
            except (ValueError, OSError, ImportError) as error:
                if debug or (_was_training(error) and not isinstance(error, BrokenImageError)):
                    raise
                message = " ".join(_own_text(error).split()) or type(error).__name__
                print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
                raise SystemExit(2) from None

        return run

    return decorate


def _own_text(error: BaseException) -> str:
    """The message of an error; that of a loading worker comes with the worker's traceback before it."""
    text, name = str(error), type(error).__name__
    return text.rpartition(f"{name}: ")[2] if text.startswith(f"Caught {name} in DataLoader worker") else text


def _was_training(error: BaseException) -> bool:
    """Whether the error comes out of the trainer's loop over steps."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is Trainer._loop.__code__ for frame, _ in frames)
