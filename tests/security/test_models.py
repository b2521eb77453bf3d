"""Model folders made to harm: every one ends in a clear error, in little time and memory, and nothing is run."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfgen import AutoModel, VARTransformer
from support.bounded import assert_refused
from support.hostile import LYING_HEADERS, Payload, edit_json, write_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"

CONFIGS = {
    "terabytes": ("VARTransformer", {"num_codes": 10**12}, "more than 100,000,000,000 parameters"),
    "gigabytes": ("VARTransformer", {"num_codes": 10**9}, "does not fit into memory"),
    "wide": ("VARTransformer", {"num_attention_heads": 10**9}, "parameters"),
    "endless-depth": ("VARTransformer", {"num_layers": 10**9}, "more than 5,000 tensors"),
    "overflow": ("VARTransformer", {"patch_nums": [1, 10**9]}, "cannot be built"),
    "many-digits": ("VARTransformer", {"num_codes": 10**300}, "cannot be built"),
    "negative": ("VARTransformer", {"num_codes": -1}, "cannot be built"),
    "text": ("VARTransformer", {"num_layers": "2"}, "num_layers = '2'; expected int"),
    "bool": ("VARTransformer", {"num_layers": True}, "num_layers = True; expected int"),
    "float": ("VARTransformer", {"num_codes": 16.0}, "num_codes = 16.0; expected int"),
    "null": ("VARTransformer", {"num_codes": None}, "num_codes = None; expected int"),
    "list": ("VARTransformer", {"num_codes": [16]}, "num_codes = [16]; expected int"),
    "nan": ("VARTransformer", {"norm_eps": float("nan")}, "norm_eps = nan; expected a finite float"),
    "infinity": ("VARTransformer", {"mlp_ratio": float("inf")}, "mlp_ratio = inf; expected a finite float"),
    "text-for-float": ("VARTransformer", {"norm_eps": "1e-6"}, "norm_eps = '1e-6'"),
    "text-in-list": ("VARTransformer", {"patch_nums": [1, "2", 4]}, "patch_nums = [1, '2', 4]"),
    "unknown-quantization": ("VARTransformer", {"quantization_config": {"quant_method": "evil"}}, "evil"),
    "codebook": ("MultiScaleVQVAE", {"num_codes": 10**12}, "parameters"),
    "channels": ("MultiScaleVQVAE", {"base_channels": 10**6}, "parameters"),
    "long-list": ("MultiScaleVQVAE", {"channel_multipliers": [1] * 20_000}, "channel_multipliers = [1, 1"),
    "zero-groups": ("MultiScaleVQVAE", {"norm_num_groups": 0}, "cannot be built"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_cannot_be_meant(fresh, name):
    model, changes, message = CONFIGS[name]
    folder = fresh(model)
    edit_json(folder / "config.json", **changes)
    assert_refused(lambda: AutoModel.from_pretrained(folder), message)


TEXTS = {
    "nested": ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    "large": ('{"a": [' + "[]," * 3_000_000 + "0]}", "at most 4,194,304"),
    "no-object": ("[]", "holds a JSON list"),
    "long-number": ('{"num_codes": ' + "9" * 10_000 + "}", "digits"),
    "no-json": ("{", "not a valid JSON"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_configuration(fresh, name):
    folder = fresh("VARTransformer")
    text, message = TEXTS[name]
    (folder / "config.json").write_text(text)
    assert_refused(lambda: VARTransformer.from_pretrained(folder), message)
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("class_name", ["os.system", "VARPipeline", "__class__", ["evil", "Evil"], None])
def test_only_public_models_are_built(fresh, class_name):
    folder = fresh("VARTransformer")
    edit_json(folder / "config.json", _class_name=class_name)
    with pytest.raises(ValueError, match="names the class"):
        AutoModel.from_pretrained(folder)


def test_code_beside_a_model_is_not_run(fresh, tmp_path):
    folder, trace = fresh("VARTransformer"), tmp_path / "executed"
    edit_json(folder / "config.json", auto_map={"AutoModel": "evil.Evil", "VARTransformer": "evil.Evil"})
    for name in ("evil.py", "hfgen.py", "modeling.py", "__init__.py"):
        (folder / name).write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: ...\n")
    assert type(AutoModel.from_pretrained(folder)) is VARTransformer
    assert not trace.exists()


@pytest.mark.parametrize("name", LYING_HEADERS)
def test_safetensors_headers_that_lie(fresh, name):
    folder = fresh("VARTransformer")
    write_safetensors(folder / WEIGHTS, *LYING_HEADERS[name])
    assert_refused(lambda: AutoModel.from_pretrained(folder), WEIGHTS)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickled_weights_are_never_run(fresh, tmp_path, form):
    folder, trace = fresh("VARTransformer"), tmp_path / "executed"
    (folder / WEIGHTS).unlink()
    path = folder / "diffusion_pytorch_model.bin"
    if form == "plain":
        path.write_bytes(pickle.dumps(Payload(trace)))
    else:
        torch.save({"a": Payload(trace)}, path, _use_new_zipfile_serialization=form == "zip")
    trace.unlink(missing_ok=True)
    with pytest.raises(OSError, match=WEIGHTS):  # hfgen's own loader reads safetensors only
        AutoModel.from_pretrained(folder)
    with pytest.raises(OSError, match="diffusion_pytorch_model.bin"):
        VARTransformer.from_pretrained(folder)
    assert not trace.exists()


@pytest.mark.parametrize("shard", ["../VARTransformer/model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_outside_the_folder(fresh, shard):
    folder = fresh("VARTransformer")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="not allowed"):
        AutoModel.from_pretrained(folder)


def test_a_checkpoint_of_other_shapes_or_with_holes(fresh):
    folder = fresh("VARTransformer")
    state = load_file(folder / WEIGHTS)
    edit_json(folder / "config.json", num_codes=10**6)
    assert_refused(lambda: AutoModel.from_pretrained(folder), "proj_out")
    edit_json(folder / "config.json", num_codes=16, num_layers=3)
    with pytest.raises(ValueError, match=r"lacks \d+ tensors of its VARTransformer, such as blocks\.2\."):
        AutoModel.from_pretrained(folder)
    edit_json(folder / "config.json", num_layers=1)
    with pytest.raises(ValueError, match=r"tensors that its VARTransformer does not have, such as blocks\.1\."):
        AutoModel.from_pretrained(folder)
    edit_json(folder / "config.json", num_layers=2)
    save_file({name: value for name, value in state.items() if name != "proj_out.bias"}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its VARTransformer, such as proj_out\.bias"):
        AutoModel.from_pretrained(folder)
