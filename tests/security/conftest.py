"""Honest folders for the tests to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.instances import build_model, build_pipeline


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build_model("VARTransformer").save_pretrained(folder / "VARTransformer")
    build_model("MultiScaleVQVAE").save_pretrained(folder / "MultiScaleVQVAE")
    build_pipeline("VARPipeline").save_pretrained(folder / "VARPipeline")
    return folder


@pytest.fixture
def fresh(saved, tmp_path):
    """Copies the saved folder of a class."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(saved / name, tmp_path / name))

    return copy
