"""What every public model promises: configuration, saving and loading, outputs."""

import json

import pytest
import torch
from torch import Tensor

import hfgen
from support.instances import MODELS, build_model

pytestmark = pytest.mark.parametrize("name", MODELS)


def assert_same(actual, expected) -> None:
    """Bit equality of nested outputs."""
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected):
            assert_same(one, other)
    else:
        assert actual == expected


def assert_same_weights(actual, expected) -> None:
    assert_same(dict(actual.state_dict()), dict(expected.state_dict()))


def test_config_round_trip(name, tmp_path):
    model = build_model(name)
    model.save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == name
    rebuilt = type(model).from_config(type(model).load_config(tmp_path))
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    as_json = [json.dumps({k: v for k, v in m.config.items() if k[0] != "_"}) for m in (rebuilt, model)]
    assert as_json[0] == as_json[1]


def test_save_and_load(name, tmp_path):
    model = build_model(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    loaded.save_config(tmp_path)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()
    assert_same_weights(loaded, model)
    with torch.no_grad():
        inputs = MODELS[name].inputs(2)
        assert_same(loaded(**inputs).to_tuple(), model(**inputs).to_tuple())


def test_loaded_parameters_are_real_and_separate(name, tmp_path):
    model = build_model(name)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors if tensor.numel()}) == len([t for t in tensors if t.numel()])


def test_sharded_variant(name, tmp_path):
    model = build_model(name).half()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="10KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").is_file()
    assert len(list(tmp_path.glob("diffusion_pytorch_model.fp16-*.safetensors"))) > 1
    assert_same_weights(type(model).from_pretrained(tmp_path, variant="fp16", dtype=torch.float16), model)


def test_bfloat16_load(name, tmp_path):
    model = build_model(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(key), parameter.bfloat16()), key
    for key, table in model.named_buffers():
        assert_same(loaded.get_buffer(key), table)  # tables are not computed in bfloat16
    inputs = MODELS[name].inputs(2)
    with torch.no_grad():
        exact, rounded = MODELS[name].smooth(model, inputs), MODELS[name].smooth(loaded, inputs)
    error = (rounded.float() - exact).abs().max() / exact.abs().max()
    assert 0 < error < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_dtypes(name, dtype):
    model = build_model(name).to(dtype)
    inputs = MODELS[name].inputs(2)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        output = model(**inputs)
    for field, value in output.items():
        if not isinstance(value, Tensor):
            continue
        if not value.is_floating_point():
            assert value.dtype == torch.int64, field
        else:
            assert value.dtype == (torch.float32 if field in MODELS[name].float32_outputs else dtype), field


def test_return_dict(name):
    model = build_model(name)
    inputs = MODELS[name].inputs(2)
    with torch.no_grad():
        as_tuple, output = model(**inputs, return_dict=False), model(**inputs)
    assert type(as_tuple) is tuple
    assert_same(as_tuple, output.to_tuple())


def test_evaluation_is_deterministic_and_draws_nothing(name):
    model = build_model(name)
    inputs = MODELS[name].inputs(2)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = model(**inputs), model(**inputs)
    assert_same(second.to_tuple(), first.to_tuple())
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(dict(model.state_dict()), weights)


def test_images_of_a_batch_are_independent(name):
    model = build_model(name)
    batch, single = MODELS[name].inputs(3), MODELS[name].inputs(1)
    with torch.no_grad():
        together, alone = MODELS[name].smooth(model, batch)[:1], MODELS[name].smooth(model, single)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_published_sizes_build(name):
    model_class = getattr(hfgen, name)
    for preset in model_class.presets:
        with torch.device("meta"):
            model_class.from_preset(preset)
    with pytest.raises(ValueError, match="no-such-size"):
        model_class.from_preset("no-such-size")
