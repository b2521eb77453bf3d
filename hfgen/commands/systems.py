"""``hfgen systems``: the table of published systems."""

from __future__ import annotations

import argparse
import json

from hfgen.systems import SYSTEMS, as_dict

HEADER = ("system", "status", "convert", "tokenizer, generator, pipeline", "published")


def run(options: argparse.Namespace) -> str:
    """A table for reading, or all fields as JSON."""
    if options.json:
        return json.dumps([as_dict(system) for system in SYSTEMS], indent=2)
    rows = [HEADER]
    for system in SYSTEMS:
        classes = ", ".join(system.classes) or "-"
        published = f"{system.published}, arXiv {system.arxiv}"
        rows.append((system.key, system.status, system.converter or "-", classes, published))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
