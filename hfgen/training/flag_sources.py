"""Errors of loading what a flag names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfgen.training.run_folder import FINAL_FOLDER


@contextmanager
def loading_flag(name: str, source: str | None) -> Iterator[None]:
    """Say which flag named what could not be loaded, and what to give instead.

    Args:
        name: of the flag, without dashes.
        source: its value, a folder or a Hub id.

    Raises:
        OSError: instead of that of the loading function.
    """
    try:
        yield
    except OSError as error:
        folder = Path(str(source))
        if (folder / FINAL_FOLDER).is_dir():
            reason = f"that is the folder of a training run; give its result, {folder / FINAL_FOLDER}."
        elif folder.exists():
            reason = f"no saved model of the kind that is needed. ({error})"
        else:
            reason = f"there is no such folder, and it could not be read from the Hub. ({error})"
        raise OSError(f"--{name} {source}: {reason}") from error
