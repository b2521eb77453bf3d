"""The table of systems names what exists, and its status follows from that."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import diffusers
import pytest

import hfgen
from hfgen import conversion
from hfgen.systems import SYSTEMS, System, as_dict, main, with_table

ROOT = Path(__file__).resolve().parents[2]

BARE = System(key="any", title="Any", paper="", published="", arxiv="", code=None, weights_licence="MIT")


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.key)
def test_a_row_names_what_exists(system):
    for name in system.classes:
        assert name in hfgen.__all__ and isinstance(getattr(hfgen, name), type)
    if system.converter is not None:
        assert conversion.parts(system.converter)
        assert system.weights_licence, "a converter reads official weights, which have a licence"
    if system.also_converts is not None:
        assert conversion.parts(system.also_converts) and system.converter is None
    for name in system.diffusers:
        assert issubclass(getattr(diffusers, name), diffusers.ModelMixin)
    for path in system.examples:
        assert (ROOT / path).is_file(), path
    if system.zoo is not None:
        assert (ROOT / "zoo" / system.zoo / "model_index.json").is_file()
    if system.pipeline_arguments:
        parameters = inspect.signature(getattr(hfgen, system.pipeline).__init__).parameters
        assert system.pipeline_arguments.keys() <= parameters.keys()
    if system.autoencoder is not None:
        assert "vae" in inspect.signature(getattr(hfgen, system.pipeline).__init__).parameters
    assert system.title and system.paper and system.notes and system.published[-4:].isdigit()
    assert system.arxiv[4] == "." and system.arxiv.replace(".", "").isdigit()


def test_every_golden_case_of_a_row_is_tested():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "parity").glob("test_*.py"))
    for name in {name for system in SYSTEMS for name in system.parity}:
        assert (ROOT / "tests" / "parity" / "cases" / f"{name}.safetensors").is_file()
        assert re.search(rf'"{name}"', tests), f"no test reads the golden case {name}"


def test_keys_are_unique():
    keys = [system.key for system in SYSTEMS]
    assert len(set(keys)) == len(keys)


def test_every_public_model_pipeline_and_example_has_a_row():
    named = {name for system in SYSTEMS for name in system.classes}
    for name in hfgen.__all__:
        value = getattr(hfgen, name)
        module = getattr(value, "__module__", "")
        if module.startswith(("hfgen.models.tokenizers", "hfgen.models.generators", "hfgen.pipelines")):
            assert name in named, f"{name} is in no row of hfgen/systems.py"
    examples = {path for system in SYSTEMS for path in system.examples} | {"examples/train_text_tokenizer.py"}
    for script in (ROOT / "examples").glob("train_*.py"):
        assert f"examples/{script.name}" in examples, f"{script.name} is in no row of hfgen/systems.py"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ({}, "not yet"),
        ({"tokenizer": "T", "converter": "any", "parity": ("c",)}, "works"),
        ({"tokenizer": "T", "generator": "G", "converter": "any", "parity": ("c",)}, "not yet"),  # no pipeline
        ({"generator": "G", "pipeline": "P", "converter": "any", "parity": ("c",)}, "works"),
        ({"generator": "G", "pipeline": "P", "converter": "any", "examples": ("e.py",)}, "trains"),  # no golden case
        ({"generator": "G", "pipeline": "P", "examples": ("e.py",), "parity": ("c",)}, "trains"),
        ({"generator": "G", "pipeline": "P", "examples": ("e.py",), "weights_licence": None}, "trains"),
        (
            {"generator": "G", "pipeline": "P", "examples": ("e.py",), "weights_licence": None, "parity": ("c",)},
            "works",
        ),
        ({"diffusers": ("D",), "examples": ("e.py",)}, "trains"),
        ({"generator": "G", "pipeline": "P", "weights_licence": None}, "not yet"),
    ],
)
def test_the_status_is_derived(parts, status):
    assert dataclasses.replace(BARE, **parts).status == status


def test_a_row_does_not_change_and_becomes_json():
    row = next(row for row in SYSTEMS if row.pipeline_arguments)
    with pytest.raises(TypeError):
        row.pipeline_arguments["guidance_channels"] = 1
    assert BARE.pipeline_arguments == {} and hash(row) == hash(dataclasses.replace(row))
    assert json.loads(json.dumps(as_dict(row)))["pipeline_arguments"] == dict(row.pipeline_arguments)


def test_the_table_of_the_readme_is_up_to_date():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make readme`"


def test_the_table_is_rewritten_between_the_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("head\n<!-- systems: begin (written by `make readme`) -->\nold\n<!-- systems: end -->\ntail\n")
    main(["--markdown", str(path)])
    text = path.read_text()
    assert text.startswith("head\n") and text.endswith("\ntail\n") and "\nold\n" not in text
    assert all(f"| [{system.title}]" in text or f"| {system.title} |" in text for system in SYSTEMS)
    with pytest.raises(ValueError, match="markers"):
        with_table("a text without markers")
