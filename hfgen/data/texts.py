"""Texts to train a language model on, from a file, a folder or the Hub, through ``datasets``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Texts(Sequence[str]):
    """The texts of one column of a data set, read when they are asked for.

    Args:
        data: with the column.
        column: of texts.
        first, last: which rows; all by default.
    """

    def __init__(self, data: datasets.Dataset, column: str, first: int = 0, last: int | None = None) -> None:
        self._data, self._column = data, column
        self._rows = range(len(data))[first:last]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return self._data[self._rows[index]][self._column]

    def split(self, count: int) -> tuple[Texts, Texts]:
        """The first ``count`` texts, and the others."""
        start, middle, end = self._rows.start, self._rows.start + count, self._rows.stop
        return Texts(self._data, self._column, start, middle), Texts(self._data, self._column, middle, end)


def load_texts(
    source: str,
    *,
    column: str = "text",
    split: str = "train",
    config_name: str | None = None,
    revision: str | None = None,
) -> Texts:
    """Texts by name.

    Args:
        source: a file of lines (.txt) or of rows (.jsonl, .json, .csv, .parquet), a folder of such files, or the id of
            a data set on the Hub.
        column: with the text.
        split: of a folder or a data set of the Hub.
        config_name, revision: of a data set of the Hub.

    Raises:
        ValueError: the source cannot be opened, has no such column, another type there, or no rows.
    """
    path = Path(source).expanduser()
    try:
        if path.is_file():
            if path.suffix not in _READERS:
                raise ValueError(f"files are read by their ending, {', '.join(_READERS)}; got {path.suffix!r}")
            data = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        else:
            data = datasets.load_dataset(source, config_name, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"text source {source!r} with split {split!r} cannot be opened: expected a file, a folder, or the id of a "
            f"data set on the Hub. {type(error).__name__}: {error}"
        ) from error
    kind = data.features.get(column)
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ValueError(
            f"text source {source!r} has no column {column!r} of texts: name one of {', '.join(data.features)}"
        )
    if len(data) == 0:
        raise ValueError(f"text source {source!r} has no rows")
    return Texts(data, column)
