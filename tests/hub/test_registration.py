"""diffusers knows the library ``hfgen``. That it also does when it is imported later: ``test_roundtrip.py``."""

import importlib
import sys
from importlib.machinery import SourceFileLoader

import pytest
from diffusers.pipelines import pipeline_loading_utils

import hfgen
from hfgen.hub import BASE_CLASSES, register_library


def test_registered():
    assert pipeline_loading_utils.LOADABLE_CLASSES["hfgen"].keys() == BASE_CLASSES.keys()
    known = pipeline_loading_utils.ALL_IMPORTABLE_CLASSES
    for name, methods in pipeline_loading_utils.LOADABLE_CLASSES["hfgen"].items():
        assert methods == known[name], "a base class that the loader of diffusers does not try"


def test_registers_with_a_loader_that_is_already_imported(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(pipeline_loading_utils.LOADABLE_CLASSES, "hfgen")
    register_library()
    assert "hfgen" in pipeline_loading_utils.LOADABLE_CLASSES


def test_the_loader_module_is_otherwise_untouched():
    assert type(pipeline_loading_utils.__spec__.loader) is SourceFileLoader
    assert "LOADABLE_CLASSES" in pipeline_loading_utils.__spec__.loader.get_source(pipeline_loading_utils.__name__)


@pytest.mark.parametrize("name", BASE_CLASSES)
def test_base_classes_are_forwarded(name):
    assert getattr(hfgen, name) is getattr(importlib.import_module(BASE_CLASSES[name]), name)
    assert name not in hfgen.__all__
