"""``hfgen pull``: a repository of the Hub into a folder."""

from __future__ import annotations

import argparse

from hfgen.downloads import download_repository


def run(options: argparse.Namespace) -> str:
    """Every file is compared with what the Hub says it is."""
    folder = download_repository(options.repo, output=options.output, revision=options.revision)
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts[len(folder.parts) :]]
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    return f"{folder}: {len(files)} files, {megabytes:.1f} MB, all as the Hub names them"
