"""Checkpoints of the rectified flow trainer: which weights are read, what the tensors tell, what is refused."""

from collections import OrderedDict

import pytest
import torch

from hfgen.conversion import load_original, to_original
from support.instances import build_model

SYSTEM = "rectified_flow"
SIGMAS = "module.sigmas"
POSITIONAL = {"time_embedding": "positional", "resampling": "box", "pyramid": False, "divide_by_time": False}
SIZE = {"data": {"image_size": 8}, "model": {"dropout": 0.0}}


def checkpoint(model):
    """What the official trainer saves, with an average that is one more than the weights."""
    official = OrderedDict({SIGMAS: torch.ones(3, dtype=torch.float64), **to_original(model)})
    trained = [value for name, value in official.items() if name not in (SIGMAS, "module.all_modules.0.W")]
    shadows = [value + 1 for value in trained]
    average = {"decay": 0.999999, "num_updates": 7, "shadow_params": shadows}
    return {"optimizer": {"state": {}}, "model": official, "ema": average, "step": 7}


def buffers(model):
    return dict(model.named_buffers())


@pytest.mark.parametrize("changes", [{}, POSITIONAL], ids=["ncsnpp", "ddpmpp"])
def test_the_average_is_read_and_the_weights_on_request(changes, tmp_path):
    model = build_model("NCSNpp", **changes)
    saved = checkpoint(model)
    torch.save(saved, tmp_path / "checkpoint_8.pth")
    averaged = load_original(SYSTEM, tmp_path / "checkpoint_8.pth", original_config=SIZE)
    raw = load_original(SYSTEM, saved["model"], original_config=SIZE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(averaged.get_parameter(name), parameter + 1)
        assert torch.equal(raw.get_parameter(name), parameter)
    for loaded in (averaged, raw):
        assert all(torch.equal(buffers(loaded)[name], value) for name, value in buffers(model).items())
        names = {name for name in model.config if not name.startswith("_")}
        assert {name: loaded.config[name] for name in names} == {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in model.config.items()
            if name in names
        }


def test_deeper_networks_are_recognised():
    sizes = {"channel_multipliers": (1, 1, 2), "layers_per_block": 2, "attention_levels": (0, 2), "sample_size": 16}
    model = build_model("NCSNpp", **sizes)
    loaded = load_original(SYSTEM, to_original(model), original_config={"data": {"image_size": 16}})
    assert {name: loaded.config[name] for name in sizes} == sizes


def test_images_of_lsun_are_in_the_unit_range():
    state = to_original(build_model("NCSNpp"))
    assert load_original(SYSTEM, state, original_config={"data": {"centered": False}}).config.unit_range


def test_an_average_that_does_not_fit_is_refused():
    saved = checkpoint(build_model("NCSNpp"))
    saved["ema"]["shadow_params"].pop()
    with pytest.raises(ValueError, match=r"'ema'.* does not fit"):
        load_original(SYSTEM, saved)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {"nf": 16}}, "'nf'.* is 16, but the tensors say 8"),
        ({"model": {"ch_mult": [1, 4]}}, "'ch_mult'"),
        ({"model": {"resblock_type": "ddpm"}}, "supports 'biggan' only"),
        ({"model": {"fir_kernel": [1, 2, 1]}}, "'fir_kernel'"),
        ({"model": {"nfs": 8}}, "unknown arguments: nfs"),
        ({"modell": {}}, "unknown arguments: modell"),
    ],
)
def test_settings_that_contradict_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        load_original(SYSTEM, to_original(build_model("NCSNpp")), original_config=config)


def test_missing_layers_are_named():
    state = to_original(build_model("NCSNpp"))
    del state["module.all_modules.4.Conv_1.bias"]
    with pytest.raises(ValueError, match="1 missing: module.all_modules.4.Conv_1.bias"):
        load_original(SYSTEM, state, original_config=SIZE)
