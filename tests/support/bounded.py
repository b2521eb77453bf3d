"""Running something hostile in a forked child with little memory and little time."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEGABYTES = 1500
SECONDS = 30


def assert_refused(
    action: Callable[[], Any], match: str, *, megabytes: int = MEGABYTES, seconds: int = SECONDS
) -> None:
    """``action`` raises a ValueError or an OSError whose message contains ``match``.

    It runs in a child that may take ``megabytes`` more of address space than this process has and ``seconds`` of time,
    so that a crash, an endless loop and a huge allocation fail the test and not the machine.
    """
    kinds, message = _run(action, megabytes, seconds)
    assert kinds is not None, f"nothing was refused: the result is {message}"
    assert {"ValueError", "OSError"} & set(kinds), f"{kinds[0]}: {message}"
    assert match in message, f"{kinds[0]} does not say {match!r}: {message}"


def _run(action: Callable[[], Any], megabytes: int, seconds: int) -> tuple[list[str] | None, str]:
    """The names of the classes of the exception, None if there was none, and its text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            try:
                answer = (None, repr(action())[:300])
            except Exception as error:
                answer = ([kind.__name__ for kind in type(error).__mro__], str(error)[:20_000])
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        if not select.select([pipe], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert data, f"the child died with status {status} or took over {seconds} s"
    return pickle.loads(data)
