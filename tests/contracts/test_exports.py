"""The public names: none escapes the contract suites, each has the library name that diffusers stores."""

import subprocess
import sys

import pytest
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from torch import nn

import hfgen
from support.instances import MODELS, PIPELINES, QUANTIZERS


def public(base: type) -> set[str]:
    values = {name: getattr(hfgen, name) for name in hfgen.__all__}
    return {name for name, value in values.items() if isinstance(value, type) and issubclass(value, base)}


def test_every_public_class_has_a_tiny_instance():
    assert public(ModelMixin) == set(MODELS)
    assert public(DiffusionPipeline) == set(PIPELINES)
    assert public(nn.Module) - public(ModelMixin) == set(QUANTIZERS)


@pytest.mark.parametrize("name", [*MODELS, *PIPELINES])
def test_saved_library_name(name):
    # A folder of hfgen that is named like a folder of diffusers.pipelines would take precedence over "hfgen".
    assert _fetch_class_library_tuple(getattr(hfgen, name)) == ("hfgen", name)


def test_public_names_are_listed_in_order():
    assert dir(hfgen) == sorted(dir(hfgen))
    assert set(hfgen.__all__) <= set(dir(hfgen))
    assert list(hfgen._EXPORTS) == sorted(hfgen._EXPORTS)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'VARTransfomer'"):
        hfgen.VARTransfomer  # noqa: B018


def test_import_takes_milliseconds():
    code = "import time; start = time.perf_counter(); import hfgen; print(time.perf_counter() - start)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(3)]
    assert min(seconds) < 0.3
