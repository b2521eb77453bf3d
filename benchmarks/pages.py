"""Parts of Markdown pages that scripts write, between markers."""

from __future__ import annotations


def with_section(text: str, begin: str, end: str, content: str) -> str:
    """``text`` with ``content`` between two lines of it.

    Raises:
        ValueError: ``text`` lacks one of the lines.
    """
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"The page needs the lines {begin} and {end}, in this order; what is between is replaced.")
    return f"{head}{begin}\n{content}\n{end}{tail}"
