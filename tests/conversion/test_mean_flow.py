"""The converter of MeanFlow: the official flax tree in the forms in which it is stored, and the PyTorch form."""

import re

import pytest
import torch

from hfgen import DiT
from hfgen.conversion import load_original, parts, to_original
from support.golden import PUBLIC_CASES, read_case

SYSTEM = "mean_flow"
CASE = read_case(SYSTEM, PUBLIC_CASES)
PARTS = {"jax": ("jax", "dit"), "torch": ("sit", "sit")}  # state and configuration of the case


def state_of(part):
    return dict(CASE.states[PARTS[part][0]])


def load(part, state=None, **changes):
    config = CASE.config[PARTS[part][1]] | changes
    return load_original(SYSTEM, state_of(part) if state is None else state, original_config=config)


def assert_equal_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@pytest.mark.parametrize("part", PARTS)
def test_round_trip(part):
    model = load(part)
    assert type(model) is DiT and model.config.has_duration and not model.training
    assert_equal_states(to_original(model, SYSTEM, part), state_of(part))


def test_both_forms_of_one_model():
    """A model from the flax tree can be saved for the PyTorch code and comes back."""
    model = load("jax")
    again = load("torch", to_original(model, SYSTEM, "torch"))
    assert again.config == model.config
    assert_equal_states(to_original(again, SYSTEM, "jax"), state_of("jax"))


def nested(state):
    tree = {}
    for name, value in state.items():
        *path, leaf = name.split("/")
        node = tree
        for step in path:
            node = node.setdefault(step, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize("form", ["nested", "dots", "slashes"])
def test_checkpoints_of_the_trainer(form):
    """Averaged and plain parameters, with the state of the optimizer; the averaged ones are taken."""
    state = state_of("jax")
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    if form == "nested":
        content = {
            "step": torch.tensor(5),
            "params": nested(other),
            "ema_params": nested(state),
            "opt_state": {"0": {}},
        }
    else:
        content = {f"params/{name}": value for name, value in other.items()}
        content |= {f"ema_params/{name}": value for name, value in state.items()} | {"step": torch.tensor(5)}
        if form == "dots":  # as the reader of flax files joins them
            content = {name.replace("/", "."): value for name, value in content.items()}
    assert_equal_states(to_original(load("jax", content), SYSTEM, "jax"), state)
    only = {"params": nested(state)}
    assert_equal_states(to_original(load("jax", only), SYSTEM, "jax"), state)


def test_a_map_inside_itself():
    tree = {"params": nested(state_of("jax"))}
    tree["params"]["net"]["again"] = tree
    with pytest.raises(ValueError, match="no checkpoint of mean_flow"):
        load_original(SYSTEM, {"weights": tree})
    assert_equal_states(to_original(load("jax", tree), SYSTEM, "jax"), state_of("jax"))


def test_files_of_the_pytorch_form(tmp_path):
    torch.save({"model": {"pos_embed": torch.zeros(1)}, "ema": state_of("torch"), "steps": 7}, tmp_path / "0400000.pt")
    model = load_original(SYSTEM, tmp_path, original_config=CASE.config["sit"])
    assert_equal_states(to_original(model, SYSTEM, "torch"), state_of("torch"))


def test_size_of_training_is_an_argument_of_the_flax_form():
    config = {"num_heads": 4}
    assert load_original(SYSTEM, state_of("jax"), original_config=config).config.sample_size == 32
    assert load_original(SYSTEM, state_of("torch"), original_config=config).config.sample_size == 8


@pytest.mark.parametrize(
    ("part", "name"),
    [("jax", "net/blocks/layers_1/mlp/fc2/_flax_linear/kernel"), ("torch", "blocks.1.mlp.fc2.weight")],
)
def test_missing_unknown_and_misshapen_tensors(part, name):
    state = state_of(part)
    with pytest.raises(ValueError, match=f"1 missing: {re.escape(name)}"):
        load(part, {key: state[key] for key in state if key != name})
    with pytest.raises(ValueError, match=f"1 unknown: {re.escape(name)}_scale"):
        load(part, state | {f"{name}_scale": torch.zeros(3)})
    for wrong in (torch.zeros(3, 5), torch.zeros(3)):
        with pytest.raises(ValueError, match=f"1 wrong: {re.escape(name)}"):
            load(part, state | {name: wrong})


@pytest.mark.parametrize(
    ("part", "given", "message"),
    [
        ("jax", {"depth": 3}, "is 3, but the tensors say 2"),
        ("jax", {"num_classes": 1000}, "is 1000, but the tensors say 10"),
        ("torch", {"qk_norm": True}, "is True; hfgen supports False only"),
        ("torch", {"decoder_hidden_size": 64}, "is 64, but the tensors say 32"),
    ],
)
def test_contradicting_arguments(part, given, message):
    with pytest.raises(ValueError, match=message):
        load(part, **given)


def test_other_checkpoints_are_named():
    with pytest.raises(ValueError, match=r"no checkpoint of mean_flow.*net/x_embedder/proj/kernel \(jax\)"):
        load_original(SYSTEM, {"weight": torch.zeros(3)})
    assert (
        parts(SYSTEM)["jax"].find(state_of("torch")) is None and parts(SYSTEM)["torch"].find(state_of("jax")) is None
    )
