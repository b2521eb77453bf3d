"""A model_index.json cannot name code that is run, and what is no component is an error."""

from __future__ import annotations

import pytest

from hfgen import AutoPipeline, VARPipeline
from support.bounded import assert_refused
from support.hostile import edit_json

COMPONENTS = {
    "function": ["os", "system"],
    "process": ["subprocess", "Popen"],
    "builtin": ["builtins", "eval"],
    "command-line": ["hfgen.cli", "main"],
    "other-class-of-hfgen": ["hfgen", "AutoPipeline"],
    "torch": ["torch", "load"],
    "transformers": ["transformers", "AutoModel"],
    "not-installed": ["evil_package", "Evil"],
    "module-inside-diffusers": ["pipeline_utils", "os"],
    "file-of-the-repository": ["evil", "Evil"],
    "file-outside": ["../evil", "Evil"],
    "numbers": [1, 2],
    "text": "os",
    "null": None,
    "object": {"os": "system"},
    "long": ["hfgen", "VARTransformer", "os"],
}


def plant(folder, trace) -> None:
    """Python files wherever a loader might look for custom code."""
    for path in (folder / "evil.py", folder / "pipeline.py", folder / "transformer" / "evil.py"):
        path.write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: ...\n")


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_are_models_of_known_libraries(fresh, tmp_path, name):
    folder, trace = fresh("VARPipeline"), tmp_path / "executed"
    plant(folder, trace)
    edit_json(folder / "model_index.json", transformer=COMPONENTS[name])
    for loader in (AutoPipeline, VARPipeline):
        with pytest.raises((ValueError, OSError)):
            loader.from_pretrained(folder)
    assert not trace.exists()


@pytest.mark.parametrize("class_name", ["os.system", "VARTransformer", "__import__", ["pipeline", "Evil"], None])
def test_only_public_pipelines_are_built(fresh, tmp_path, class_name):
    folder, trace = fresh("VARPipeline"), tmp_path / "executed"
    plant(folder, trace)
    edit_json(folder / "model_index.json", _class_name=class_name)
    with pytest.raises(ValueError, match="names the class"):
        AutoPipeline.from_pretrained(folder)
    if not isinstance(class_name, str):  # a class that the caller names does not depend on the file's name for it
        with pytest.raises(ValueError):
            VARPipeline.from_pretrained(folder)
    assert not trace.exists()


def test_code_beside_a_pipeline_is_not_run(fresh, tmp_path):
    folder, trace = fresh("VARPipeline"), tmp_path / "executed"
    plant(folder, trace)
    assert type(AutoPipeline.from_pretrained(folder)) is VARPipeline
    assert not trace.exists()


def test_unknown_components_are_not_loaded(fresh, saved):
    folder = fresh("VARPipeline")
    edit_json(folder / "model_index.json", **{"../../VARTransformer": ["hfgen", "VARTransformer"]})
    assert set(AutoPipeline.from_pretrained(folder).components) == {"transformer", "vq_model"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"a": [' + "[]," * 3_000_000 + "0]}", "at most 4,194,304"),
        ("[]", "holds a JSON list"),
    ],
    ids=["nested", "large", "no-object"],
)
@pytest.mark.parametrize("loader", [AutoPipeline, VARPipeline])
def test_files_that_are_no_index(fresh, loader, text, message):
    folder = fresh("VARPipeline")
    (folder / "model_index.json").write_text(text)
    assert_refused(lambda: loader.from_pretrained(folder), message)


def test_components_are_checked_like_models(fresh):
    folder = fresh("VARPipeline")
    edit_json(folder / "transformer" / "config.json", num_codes=10**12)
    assert_refused(lambda: AutoPipeline.from_pretrained(folder), "more than 100,000,000,000 parameters")
