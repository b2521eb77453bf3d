"""The TiTok converter: all forms in both directions, published folders, configurations, and what it refuses."""

import copy
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from hfgen import TiTok
from hfgen.conversion import load_original, parts, released, to_original
from hfgen.conversion.converter import OriginalConfig
from hfgen.models.tokenizers.titok import SIZES
from support.golden import PUBLIC_CASES, read_case

SYSTEM = "titok"
STATES = {"legacy": "titok", "vq": "titok_vq", "vae": "titok_vae", "ta": "tatitok"}


def state_of(form):
    return dict(read_case(SYSTEM, PUBLIC_CASES).states[STATES[form]])


def config_of(form):
    config = read_case(SYSTEM, PUBLIC_CASES).config
    return copy.deepcopy(config[form] | {"vit_sizes": config["vit_sizes"]})


@pytest.mark.parametrize("form", STATES)
def test_round_trip(form):
    state = state_of(form)
    model = load_original(SYSTEM, state, original_config=config_of(form))
    assert not model.training
    back = to_original(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())


@pytest.mark.parametrize("form", STATES)
def test_configuration(form):
    official, model = config_of(form), load_original(SYSTEM, state_of(form), original_config=config_of(form))
    vq_model, config = official["model"]["vq_model"], model.config
    assert config.image_size == official["dataset"]["preprocessing"]["crop_size"]
    assert (config.num_latent_tokens, config.latent_channels) == (
        vq_model["num_latent_tokens"],
        vq_model["token_size"],
    )
    assert config.normalize_codes == vq_model["use_l2_norm"]
    assert config.two_stage == vq_model.get("is_legacy", True)
    assert (config.pixel_channels is not None) == vq_model["finetune_decoder"]
    assert model.codebook_size == (None if form == "vae" else vq_model["codebook_size"])
    assert (config.text_length, config.codebook_update) == ((7, "clustering") if form == "ta" else (0, "gradient"))
    for side, name in (("encoder", "vit_enc_model_size"), ("decoder", "vit_dec_model_size")):
        size = official["vit_sizes"][vq_model[name]]
        got = {key: config[f"{side}_{key}"] for key in ("width", "layers", "heads")}
        assert got == size


@pytest.mark.parametrize("preset", TiTok.presets)
def test_published_sizes_are_recognised_without_a_configuration(preset):
    """The bare files that were published have no configuration; their shapes tell it."""
    with torch.device("meta"):
        model = TiTok.from_preset(preset)
        state = parts(SYSTEM)["vq_model"].save(model)
    config = parts(SYSTEM)["vq_model"].config(state, OriginalConfig({}))
    assert config == {name: model.config[name] for name in config}


def published(preset):
    """The nested configuration in the repository of a released model, as its authors wrote it."""
    arguments = TiTok.presets[preset]
    names = {width: name for name, (width, _, _) in SIZES.items()}
    vq_model = {
        "token_size": arguments["latent_channels"],
        "vit_enc_model_size": names[arguments["encoder_width"]],
        "vit_dec_model_size": names[arguments["decoder_width"]],
        "vit_enc_patch_size": 16,
        "vit_dec_patch_size": 16,
        "num_latent_tokens": arguments["num_latent_tokens"],
        "finetune_decoder": preset in ("titok-l-32", "titok-b-64", "titok-s-128"),
    }
    if not vq_model["finetune_decoder"]:
        vq_model["is_legacy"] = False
    if preset.endswith("vae"):
        vq_model["quantize_mode"] = "vae"  # and nothing about a codebook
    else:
        vq_model |= {"codebook_size": arguments["num_codes"], "commitment_cost": 0.25}
        vq_model["use_l2_norm"] = vq_model["finetune_decoder"]
    if preset.startswith("ta") and preset.endswith("vq"):
        vq_model |= {"quantize_mode": "vq", "clustering_vq": False}
    experiment = {"tokenizer_checkpoint": f"{preset}.bin", "output_dir": preset}
    return {
        "experiment": experiment,
        "model": {"vq_model": vq_model},
        "dataset": {"preprocessing": {"crop_size": 256}},
    }


@pytest.mark.parametrize("preset", TiTok.presets)
def test_published_configurations(preset):
    with torch.device("meta"):
        model = TiTok.from_preset(preset)
        state = parts(SYSTEM)["vq_model"].save(model)
    original = OriginalConfig(published(preset))
    config = parts(SYSTEM)["vq_model"].config(state, original)
    original.finish()
    assert config == {name: model.config[name] for name in config}


def test_released_table():
    released_rows = [row for row in released() if row.system == SYSTEM]
    rows = {row.name: row for row in released_rows if len(row.files) == 1}
    assert rows.keys() == TiTok.presets.keys()
    for row in released_rows:  # a pipeline takes the file of a tokenizer, and a generator
        assert {file.part for file in row.files} <= parts(SYSTEM).keys()
        assert any(row.files[0] == tokenizer.files[0] for tokenizer in rows.values())
    for name, row in rows.items():
        with torch.device("meta"):
            model = TiTok.from_preset(name)
        num_bytes = 4 * sum(math.prod(parameter.shape) for parameter in model.parameters())
        assert 0.99 < row.megabytes * 1e6 / num_bytes < 1.01, (name, num_bytes)


def test_published_folder(tmp_path):
    """One repository per model: nested configuration beside the weights."""
    config, state = config_of("legacy"), state_of("legacy")
    config["model"]["vq_model"]["commitment_cost"] = 0.5
    config |= {"experiment": {"project": "titok"}, "optimizer": {"name": "adamw"}, "training": {"seed": 42}}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = TiTok.from_single_file(tmp_path)
    assert (model.config.encoder_heads, model.config.commitment_weight) == (4, 0.5)
    del config["model"]["vq_model"]["token_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks model\.vq_model\.token_size"):
        TiTok.from_single_file(tmp_path)
    assert TiTok.from_single_file(tmp_path, original_config=config_of("legacy")).config.commitment_weight == 0.25


def test_bare_file(tmp_path):
    torch.save(state_of("legacy"), tmp_path / "titok.bin")
    model = TiTok.from_single_file(tmp_path / "titok.bin")
    assert model.config.normalize_codes and model.config.encoder_heads == 1  # heads of 64, as published
    torch.save(state_of("vae"), tmp_path / "titok.bin")
    with pytest.raises(ValueError, match="heads of the decoder, whose width is 96: pass vit_dec_model_size"):
        TiTok.from_single_file(tmp_path / "titok.bin")


REQUIRED = ("codebook_size", "token_size", "use_l2_norm", "commitment_cost", "vit_enc_model_size", "num_latent_tokens")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (("model",), "vq_model"),
        ((), "dataset"),
        (("dataset",), "preprocessing"),
        (("dataset", "preprocessing"), "crop_size"),
        *((("model", "vq_model"), name) for name in REQUIRED),
    ],
)
def test_nested_configuration_that_lacks_a_key(path, name):
    config = config_of("vq")
    section = config
    for step in path:
        section = section[step]
    del section[name]
    missing = "dataset.preprocessing" if name == "dataset" else ".".join((*path, name))
    with pytest.raises(ValueError, match=rf"original_config lacks {re.escape(missing)}, which the nested"):
        load_original(SYSTEM, state_of("vq"), original_config=config)


def test_optional_keys_have_the_official_defaults():
    config = config_of("legacy")
    for name in ("quantize_mode", "is_legacy", "finetune_decoder"):
        config["model"]["vq_model"].pop(name, None)
    assert load_original(SYSTEM, state_of("legacy"), original_config=config).config.pixel_channels is not None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("codebook_size", 64, "the tensors say 48"),
        ("token_size", 12, "the tensors say 10"),
        ("is_legacy", True, "the tensors say False"),
        ("quantize_mode", "vae", "the tensors say 'vq'"),
        ("finetune_decoder", True, "the tensors say False"),
        ("num_latent_tokens", 32, "the tensors say 16"),
        ("vit_enc_patch_size", 16, "the tensors say 8"),
        ("vit_enc_model_size", "mini", "'mini' with width 96 and 3 layers, but the encoder has width 64 and 2"),
        ("vit_enc_model_size", "huge", "'huge'; known are small, base, large, tiny"),
        ("codebook_sise", 48, "unknown arguments: codebook_sise"),
    ],
)
def test_contradicting_and_unknown_arguments(name, value, message):
    config = config_of("vq")
    config["model"]["vq_model"][name] = value
    with pytest.raises(ValueError, match=message):
        load_original(SYSTEM, state_of("vq"), original_config=config)


@pytest.mark.parametrize(
    ("sizes", "given", "message"),
    [
        (5, "base", "'vit_sizes'] is 5; expected names"),
        ({"odd": {"width": 64, "layers": 2}}, "odd", "lacks vit_sizes.odd.heads"),
        ({"odd": 64}, "odd", "lacks vit_sizes.odd.width"),
        ({}, ["base"], r"vit_enc_model_size = \['base'\]; known are small, base, large"),
    ],
)
def test_sizes_of_another_kind(sizes, given, message):
    config = config_of("vq") | {"vit_sizes": sizes}
    config["model"]["vq_model"]["vit_enc_model_size"] = given
    with pytest.raises(ValueError, match=message):
        load_original(SYSTEM, state_of("vq"), original_config=config)


def test_another_image_size_is_refused():
    config = config_of("vq")
    config["dataset"]["preprocessing"]["crop_size"] = 64
    with pytest.raises(ValueError, match=r"\['crop_size'\] is 64, but the tensors say 32"):
        load_original(SYSTEM, state_of("vq"), original_config=config)


def test_usage_statistic_of_training_files_is_dropped_for_inference():
    config = config_of("ta")
    config["model"]["vq_model"]["clustering_vq"] = False
    model = load_original(SYSTEM, state_of("ta"), original_config=config)
    assert model.config.codebook_update == "gradient"
    assert to_original(model).keys() == state_of("ta").keys() - {"quantize.embed_prob"}


@pytest.mark.parametrize("form", STATES)
def test_missing_unknown_and_misshapen_tensors(form):
    state, config, victim = state_of(form), config_of(form), "encoder.transformer.1.mlp.c_proj.bias"
    with pytest.raises(ValueError, match=f"1 missing: {re.escape(victim)}"):
        load_original(SYSTEM, {name: state[name] for name in state if name != victim}, original_config=config)
    with pytest.raises(ValueError, match=r"1 unknown: decoder\.extra"):
        load_original(SYSTEM, state | {"decoder.extra": torch.zeros(1)}, original_config=config)
    with pytest.raises(ValueError, match=f"1 wrong: {re.escape(victim)}"):
        load_original(SYSTEM, state | {victim: torch.zeros(30)}, original_config=config)


def test_positions_that_are_no_square():
    state = state_of("vq")
    with pytest.raises(ValueError, match="has 14 positions beside the class; expected a square"):
        load_original(SYSTEM, state | {"encoder.positional_embedding": torch.zeros(15, 64)})
