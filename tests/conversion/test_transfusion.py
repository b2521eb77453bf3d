"""The converter of the open implementation of Transfusion: both directions, official arguments, refusals."""

import re

import pytest
import torch

from hfgen import TransfusionFlowTransformer
from hfgen.conversion import load_original, to_original
from support.golden import PUBLIC_CASES, read_case
from support.instances import build_model

SYSTEM = "transfusion_pytorch"
CASE = read_case("transfusion", PUBLIC_CASES)
STATE, INIT = CASE.states["model"], CASE.config["init"]


def load(state=None, **changes):
    return load_original(SYSTEM, dict(STATE) if state is None else state, original_config=INIT | changes)


def assert_equal_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def test_round_trip():
    model = load()
    assert type(model) is TransfusionFlowTransformer and not model.training
    assert_equal_states(to_original(model), dict(STATE))


def test_configuration():
    config, transformer = load().config, INIT["transformer"]
    assert (config.num_text_tokens, config.latent_channels) == (INIT["num_text_tokens"], [INIT["dim_latent"]])
    assert (config.width, config.num_layers) == (transformer["dim"], transformer["depth"])
    assert (config.num_heads, config.head_dim) == (transformer["heads"], transformer["dim_head"])
    assert config.ff_dim == int(transformer["dim"] * 4 * 2 / 3)
    assert (config.channel_first, config.has_positions, config.num_axes) == ([False], [False], [2])
    assert load_original(SYSTEM, dict(STATE)).config == config  # the tensors tell it all


def test_modalities_of_several_kinds():
    """Channels first and last, with and without positions, and latents as wide as the model, which have no layer."""
    model = build_model(
        "TransfusionFlowTransformer",
        latent_channels=(3, 16, 5),
        num_axes=(2, 1, 3),
        channel_first=(True, True, False),
        has_positions=(True, False, True),
    )
    state = to_original(model)
    names = {"latent_to_model_projs.0.1.weight", "model_to_latent_projs.1.0.weight", "latent_to_model_projs.2.bias"}
    assert names | {"pos_emb_mlp.2.mlps.2.4.bias", "transformer.layers.1.0.weight"} <= state.keys()
    assert not any(name.startswith("latent_to_model_projs.1") for name in state)
    again = load_original(SYSTEM, state, original_config={"modality_default_shape": [[2, 2], [9], [2, 2, 2]]})
    assert_equal_states(again.state_dict(), model.state_dict())
    assert again.config.num_axes == [2, 1, 3] and again.config.channel_first == [True, True, False]


def test_file_of_a_trainer(tmp_path):
    torch.save({"model": dict(STATE), "step": 7}, tmp_path / "checkpoint.pt")
    model = TransfusionFlowTransformer.from_single_file(tmp_path / "checkpoint.pt")
    assert_equal_states(to_original(model), dict(STATE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_text_tokens": 21}, r"original_config\['num_text_tokens'\] is 21, but the tensors say 20"),
        ({"dim_latent": 4}, r"original_config\['dim_latent'\] is 4, but the tensors say \[6\]"),
        ({"channel_first_latent": True}, r"\['channel_first_latent'\] is True, but the tensors say \[False\]"),
        ({"add_pos_emb": True}, r"\['add_pos_emb'\] is True, but the tensors say \[False\]"),
        ({"modality_num_dim": [2, 1]}, r"tells \[2, 1\] axes"),
        ({"model_output_clean": True}, r"\['model_output_clean'\] is True; hfgen supports False only"),
        ({"transformer": {"depth": 4}}, r"original_config\['depth'\] is 4, but the tensors say 3"),
        ({"transformer": {"ff_expansion_factor": 3}}, "ff_expansion_factor=3 means 64 channels"),
        ({"transformer": {"attn_laser": True}}, r"\['attn_laser'\] is True; hfgen supports False only"),
        ({"transformer": {"dept": 3}}, "unknown arguments: dept"),
        ({"transformer": 3}, "expected a mapping"),
        ({"dim": 32}, "unknown arguments: dim"),
    ],
)
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        load(**changes)


def test_missing_unknown_and_misshapen_tensors():
    name = "transformer.layers.1.1.fn.to_qk.0.weight"
    with pytest.raises(ValueError, match=f"1 missing: {re.escape(name)}"):
        load({key: value for key, value in STATE.items() if key != name})
    with pytest.raises(ValueError, match="1 unknown: transformer.layers.1.1.fn.to_learned_value_residual.0.weight"):
        load(dict(STATE) | {"transformer.layers.1.1.fn.to_learned_value_residual.0.weight": torch.zeros(4, 32)})
    with pytest.raises(ValueError, match=f"1 wrong: {re.escape(name)}"):
        load(dict(STATE) | {name: torch.zeros(64, 31)})
    with pytest.raises(ValueError, match="rotary_emb.freqs are not"):
        load(dict(STATE) | {"rotary_emb.freqs": STATE["rotary_emb.freqs"] * 1.5})
