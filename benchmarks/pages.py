"""Parts of Markdown pages that scripts write, between markers."""

from __future__ import annotations

import re
import textwrap

WIDTH = 119
# What stays on one line: code, links and images, and bold words.
_WHOLE = re.compile(r"`[^`]*`|!?\[[^\]]*\]\([^)]*\)|\*\*[^*]+\*\*")
# The space before a word that would begin a list, a heading, a quote, a table or an underline at the start of a line.
_KEPT = re.compile(r" (?=(?:[-+*]|#{1,6}|\d{1,9}[.)]|=+|-+)(?:[ \0]|$)|[>|<]|```|~~~)")
_ITEM = re.compile(r"\s*(?:[-+*] |\d{1,9}[.)] )?")
_SPACE = "\0"  # stands for a space where no line may end


def with_section(text: str, begin: str, end: str, content: str) -> str:
    """``text`` with ``content``, its prose wrapped, between two lines of it.

    Raises:
        ValueError: ``text`` lacks one of the lines.
    """
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"The page needs the lines {begin} and {end}, in this order; what is between is replaced.")
    return f"{head}{begin}\n{wrapped(content)}\n{end}{tail}"


def wrapped(content: str) -> str:
    """Markdown whose lines of prose have at most :data:`WIDTH` characters.

    Tables, headings, comments and blocks of code stay as they are, and so does what may not be broken, such as a span
    of code, which has a longer line to itself.
    """
    lines, fenced = [], False
    for line in content.split("\n"):
        fence = line.lstrip().startswith(("```", "~~~"))
        fenced = fenced != fence
        if fenced or fence or len(line) <= WIDTH or line.lstrip().startswith(("|", "#", "<!--")):
            lines.append(line)
        else:
            lines += _broken(line)
    return "\n".join(lines)


def _broken(line: str) -> list[str]:
    """The lines of a paragraph or of an item of a list, which go on where its text begins."""
    start = _ITEM.match(line).group()
    whole = _WHOLE.sub(lambda match: match.group().replace(" ", _SPACE), line[len(start) :])
    parts = textwrap.wrap(
        _KEPT.sub(_SPACE, whole), WIDTH, initial_indent=start, subsequent_indent=" " * len(start),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return [part.replace(_SPACE, " ") for part in parts]
