"""The converters of DiT and SiT, also in the layout of diffusers: both directions, trainers' files, refusals."""

import json
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from hfgen import DiT
from hfgen.conversion import load_original, to_original
from support.golden import PUBLIC_CASES, read_case

CASE = read_case("dit", PUBLIC_CASES)
SYSTEMS = ("dit", "sit")
# Of SiT this layout has all tensors; the other one has channels that it never uses.
SIT_PLAIN = {
    name: value.unflatten(0, (4, 8))[:, :4].flatten(0, 1) if name.startswith("final_layer.linear") else value
    for name, value in CASE.states["sit"].items()
}


def state_of(system):
    return dict(CASE.states["dit"] if system == "dit" else SIT_PLAIN)


def config_of(system):
    return CASE.config[system] | ({"learn_sigma": False} if system == "sit" else {})


def assert_equal_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


@pytest.mark.parametrize("system", SYSTEMS)
def test_round_trip(system):
    state = state_of(system)
    model = load_original(system, state, original_config=config_of(system))
    assert type(model) is DiT and not model.training
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert_equal_states(to_original(model, system), state)


@pytest.mark.parametrize("system", SYSTEMS)
def test_configuration(system):
    official, config = config_of(system), load_original(system, state_of(system), original_config={"num_heads": 4})
    config = config.config
    for ours, theirs in (("sample_size", "input_size"), ("width", "hidden_size"), ("num_layers", "depth")):
        assert config[ours] == official[theirs]
    assert (config.num_classes, config.mlp_ratio) == (official["num_classes"], official["mlp_ratio"])
    assert (config.reverse_time, config.timestep_scale) == ((True, 1e-3) if system == "sit" else (False, 1.0))
    assert config.out_channels == (8 if system == "dit" else None)


def test_unused_channels_of_sit_are_left_out():
    """What was trained with learn_sigma computes channels that the official code drops."""
    model = load_original("sit", CASE.states["sit"], original_config=CASE.config["sit"])
    assert model.out_channels == 4
    assert_equal_states(to_original(model, "sit"), SIT_PLAIN)


@pytest.mark.parametrize("system", SYSTEMS)
def test_files_of_the_trainers(system, tmp_path):
    """They hold several state dicts, of which the averaged one is taken."""
    state = state_of(system)
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": other, "ema": state, "opt": {"lr": 1e-4}}, tmp_path / "0400000.pt")
    model = load_original(system, tmp_path / "0400000.pt", original_config={"num_heads": 4})
    assert_equal_states(to_original(model, system), state)
    torch.save({"model": state}, tmp_path / "0400000.pt")
    assert_equal_states(to_original(load_original(system, tmp_path, original_config={"num_heads": 4}), system), state)


def test_from_single_file(tmp_path):
    torch.save(CASE.states["dit"], tmp_path / "DiT-XL-2-256x256.pt")
    model = DiT.from_single_file(tmp_path / "DiT-XL-2-256x256.pt", original_config={"num_heads": 4})
    assert model.config.num_heads == 4


def test_published_widths_tell_the_heads():
    state = to_original(DiT(**DiT.presets["S/8"] | {"num_layers": 1, "num_classes": 5}))
    assert load_original("dit", state).config.num_heads == 6


@pytest.mark.parametrize("system", SYSTEMS)
def test_unknown_number_of_heads(system):
    width = CASE.config[system]["hidden_size"]
    with pytest.raises(ValueError, match=rf"heads of width {width} \(given: None\): pass a divisor"):
        load_original(system, state_of(system))
    with pytest.raises(ValueError, match=rf"heads of width {width} \(given: 5\): pass a divisor"):
        load_original(system, state_of(system), original_config={"num_heads": 5})


@pytest.mark.parametrize("system", SYSTEMS)
def test_positions_that_are_not_the_fixed_ones(system):
    state, config = state_of(system), {"num_heads": 4}
    with pytest.raises(ValueError, match="learned ones are not supported"):
        load_original(system, state | {"pos_embed": state["pos_embed"] + 1e-3}, original_config=config)
    with pytest.raises(ValueError, match=r"pos_embed has the shape \(1, 15, \d+\); expected \(1, side\^2, "):
        load_original(system, state | {"pos_embed": state["pos_embed"][:, 1:]}, original_config=config)
    # Half precision rounds them.
    half = {name: value.half() for name, value in state.items()}
    assert load_original(system, half, original_config=config).dtype == torch.float16


@pytest.mark.parametrize("system", SYSTEMS)
def test_missing_unknown_and_misshapen_tensors(system):
    state, config, name = state_of(system), {"num_heads": 4}, "blocks.1.attn.qkv.bias"
    with pytest.raises(ValueError, match=f"1 missing: {re.escape(name)}"):
        load_original(system, {key: state[key] for key in state if key != name}, original_config=config)
    with pytest.raises(ValueError, match="1 unknown: blocks.1.attn.q_norm.weight"):
        load_original(system, state | {"blocks.1.attn.q_norm.weight": torch.zeros(4)}, original_config=config)
    with pytest.raises(ValueError, match=f"1 wrong: {re.escape(name)}"):
        load_original(system, state | {name: torch.zeros(5)}, original_config=config)


@pytest.mark.parametrize(
    "given", [{"depth": 7}, {"hidden_size": 64}, {"num_classes": 1000}, {"input_size": 32}, {"patch_size": 4}]
)
def test_contradicting_arguments(given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=rf"original_config\['{name}'\] is {value}, but the tensors say"):
        load_original("dit", state_of("dit"), original_config={"num_heads": 4, **given})


def test_layouts_that_a_model_does_not_have():
    model = load_original("dit", state_of("dit"), original_config={"num_heads": 4})
    with pytest.raises(ValueError, match="dit has no layout 'flax' for a DiT; it has transformer, diffusers"):
        to_original(model, "dit", "flax")
    with pytest.raises(ValueError, match="var has no layout 'transformer' for a DiT; it has none"):
        to_original(model, "var")


@pytest.fixture(scope="module")
def of_diffusers():
    """Its model with one embedding for all blocks, as published, and the official frequencies and epsilon."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=5,
            norm_eps=1e-6,
        ).eval()
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def test_diffusers_computes_the_same(of_diffusers, tmp_path):
    of_diffusers.save_pretrained(tmp_path)
    model = load_original("dit", tmp_path)  # the configuration lies beside the weights
    draws = torch.Generator().manual_seed(0)
    latents, timestep, labels = torch.randn(2, 4, 8, 8, generator=draws), torch.tensor([999, 3]), torch.tensor([1, 5])
    with torch.no_grad():
        actual = model(latents, timestep, labels).sample
        expected = of_diffusers(latents, timestep, labels).sample
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_diffusers_round_trip(of_diffusers):
    state = of_diffusers.state_dict()
    model = load_original("dit", state, original_config=dict(of_diffusers.config))
    assert model.config.num_heads == 2
    assert_equal_states(to_original(model, "dit", "diffusers"), state)
    # The official layout follows, and from it the same.
    again = load_original("dit", to_original(model), original_config={"num_heads": 2})
    assert_equal_states(to_original(again, "dit", "diffusers"), state)


def test_copies_that_differ_are_refused(of_diffusers):
    state, name = dict(of_diffusers.state_dict()), "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    state[name] = state[name] + 1
    with pytest.raises(ValueError, match=f"{re.escape(name)}.*the copies in the blocks differ"):
        load_original("dit", state, original_config={"attention_head_dim": 8})


def test_heads_of_diffusers_without_its_configuration(of_diffusers, tmp_path):
    save_file(of_diffusers.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="heads of width 16 .*original_config={'attention_head_dim'"):
        load_original("dit", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": 8, "norm_type": "layer_norm"}))
    with pytest.raises(ValueError, match="'norm_type'.*hfgen supports 'ada_norm_zero' only"):
        load_original("dit", tmp_path)
