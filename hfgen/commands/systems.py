"""``hfgen systems``: the table of published systems, and that of their official weights."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from hfgen.systems import SYSTEMS, as_dict

HEADER = ("system", "status", "convert", "golden cases", "tokenizer, generator, pipeline", "published")
WEIGHTS_HEADER = ("name", "system", "size", "licence", "repository", "files")


def run(options: argparse.Namespace) -> str:
    """A table for reading, or all fields as JSON."""
    if options.weights:
        return list_weights(as_json=options.json)
    if options.json:
        return json.dumps([as_dict(system) for system in SYSTEMS], indent=2)
    rows = [HEADER]
    for system in SYSTEMS:
        classes = ", ".join(system.all_classes) or "-"
        parity = ", ".join(system.parity) or "-"
        published = f"{system.published}, arXiv {system.arxiv}"
        rows.append((system.key, system.status, system.any_converter or "-", parity, classes, published))
    return table(rows)


def list_weights(*, as_json: bool) -> str:
    """The official weights that load by name."""
    # Imported here, so that the table of systems answers without torch.
    from hfgen.conversion import released

    if as_json:
        return json.dumps([dataclasses.asdict(row) | {"megabytes": row.megabytes} for row in released()], indent=2)
    rows = [WEIGHTS_HEADER]
    for row in released():
        revision = "" if row.revision == "main" else f"@{row.revision}"
        files = ", ".join(file.path for file in row.files)
        rows.append((row.name, row.system, f"{row.megabytes:,} MB", row.licence, row.repo + revision, files))
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
