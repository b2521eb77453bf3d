"""Verdicts on claims: each holds, does not hold at this scale, or is undecided.

Two quantities are compared by their ranges over the seeds. The order is certain if the ranges do not overlap; with
overlapping ranges or fewer than two seeds a comparison is undecided. A claim of several comparisons holds if all of
them do, and does not hold if one of them is certainly the other way round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

HOLDS, FAILS, UNDECIDED = "holds", "does not hold at this scale", "is undecided"


def below(lower: Sequence[float], higher: Sequence[float]) -> str:
    """Whether the first values lie below the second: HOLDS, FAILS or UNDECIDED as the module says."""
    if min(len(lower), len(higher)) < 2:
        return UNDECIDED
    if max(lower) < min(higher):
        return HOLDS
    return FAILS if min(lower) > max(higher) else UNDECIDED


def together(verdicts: Sequence[str]) -> str:
    """The verdict on a claim with several comparisons."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


def spread(numbers: Sequence[float], form: str = "{:.2f}") -> str:
    """``mean (smallest to largest)``."""
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return form.format(mean)
    return f"{form.format(mean)} ({form.format(min(numbers))} to {form.format(max(numbers))})"


def criterion(claim: Callable) -> str:
    """When a claim holds: what its function states, so that the text cannot differ from the code's."""
    return " ".join(inspect.getdoc(claim).split())


def listed(head: str, items: Sequence[str]) -> str:
    """A Markdown list below its head; nothing without items."""
    return "\n".join([head, "", *(f"- {item}" for item in items)]) if items else ""
