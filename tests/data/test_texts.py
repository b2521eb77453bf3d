"""Texts from files."""

from __future__ import annotations

import datasets
import pytest

from hfgen.data.texts import load_texts


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_lines_and_rows(tmp_path):
    (tmp_path / "a.txt").write_text("first\nsecond\nthird\n")
    texts = load_texts(str(tmp_path / "a.txt"))
    assert list(texts) == ["first", "second", "third"]
    kept, others = texts.split(1)
    assert list(kept) == ["first"] and list(others) == ["second", "third"] and len(others) == 2
    (tmp_path / "b.jsonl").write_text('{"body": "one", "n": 1}\n{"body": "two", "n": 2}\n')
    assert load_texts(str(tmp_path / "b.jsonl"), column="body")[1] == "two"


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"body": "one", "n": 1}\n')
    with pytest.raises(ValueError, match="no column 'text' of texts: name one of body, n"):
        load_texts(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="no column 'n' of texts"):
        load_texts(str(tmp_path / "b.jsonl"), column="n")
    (tmp_path / "c.bin").write_text("")
    with pytest.raises(ValueError, match="files are read by their ending"):
        load_texts(str(tmp_path / "c.bin"))
    with pytest.raises(ValueError, match="cannot be opened: expected a file, a folder"):
        load_texts(str(tmp_path / "missing"))
