"""AutoPipeline and AutoModel on local folders: what loads, and what is refused."""

import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import hfgen
from support.instances import MODELS, PIPELINES, build_model, build_pipeline

PIPELINE = next(iter(PIPELINES))
MODEL = next(iter(MODELS))


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", PIPELINES)
def test_auto_pipeline(name, tmp_path):
    build_pipeline(name).save_pretrained(tmp_path)
    pipeline = hfgen.AutoPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(pipeline) is getattr(hfgen, name)
    assert pipeline.dtype == torch.bfloat16


def test_auto_pipeline_takes_components(tmp_path):
    build_pipeline(PIPELINE).save_pretrained(tmp_path)
    component, model = next(iter(PIPELINES[PIPELINE].components.items()))
    mine = build_model(model, **PIPELINES[PIPELINE].changes.get(component, {}))
    pipeline = hfgen.AutoPipeline.from_pretrained(tmp_path, components={component: mine})
    assert getattr(pipeline, component) is mine


@pytest.mark.parametrize("name", MODELS)
def test_auto_model(name, tmp_path):
    build_model(name).save_pretrained(tmp_path / "inside")
    model = hfgen.AutoModel.from_pretrained(tmp_path, subfolder="inside", dtype=torch.bfloat16)
    assert type(model) is getattr(hfgen, name)
    assert model.dtype == torch.bfloat16


# A public name that is no pipeline, a class of another library, a base class that hfgen forwards, a path, a list.
@pytest.mark.parametrize("class_name", [MODEL, "DDPMPipeline", "DiffusionPipeline", "os.system", ["pipeline", "X"]])
def test_auto_pipeline_refuses_other_classes(class_name, tmp_path):
    build_pipeline(PIPELINE).save_pretrained(tmp_path)
    edit_json(tmp_path / "model_index.json", _class_name=class_name)
    with pytest.raises(ValueError, match=f"names the class .*it has .*{PIPELINE}") as error:
        hfgen.AutoPipeline.from_pretrained(tmp_path)
    assert repr(class_name) in str(error.value)


@pytest.mark.parametrize("class_name", [PIPELINE, "VectorQuantizer", "UNet2DModel", "ModelMixin", None])
def test_auto_model_refuses_other_classes(class_name, tmp_path):
    build_model(MODEL).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", _class_name=class_name)
    with pytest.raises(ValueError, match=f"names the class .*it has .*{MODEL}"):
        hfgen.AutoModel.from_pretrained(tmp_path)


def test_code_and_pickles_in_a_repository_stay_unread(tmp_path):
    build_pipeline(PIPELINE).save_pretrained(tmp_path / "safe")
    (tmp_path / "safe" / "pipeline.py").write_text("raise SystemExit('the code of the repository ran')\n")
    assert type(hfgen.AutoPipeline.from_pretrained(tmp_path / "safe")).__name__ == PIPELINE

    model = build_model(MODEL)
    model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        hfgen.AutoModel.from_pretrained(tmp_path / "pickle")


def test_missing_configurations(tmp_path):
    build_model(MODEL).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"Could not read model_index.json .*hfgen.AutoModel"):
        hfgen.AutoPipeline.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"Could not read config.json .*subfolder=None"):
        hfgen.AutoModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("load", [hfgen.AutoPipeline, hfgen.AutoModel])
def test_a_hub_that_cannot_be_reached_is_said_to_be(load, monkeypatch):
    """diffusers would say that the repository lacks a file."""

    def offline(*arguments, **options):
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", offline)
    with pytest.raises(OSError, match="the Hub cannot be reached, and it was not downloaded before"):
        load.from_pretrained("user/name")
