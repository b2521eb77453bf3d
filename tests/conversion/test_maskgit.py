"""The converters of MaskGIT and of TiTok's generators: both directions, what is read off the tensors, refusals."""

import re

import pytest
import torch

from hfgen.conversion import load_original, to_original
from hfgen.models.generators.image_bert import ImageBert
from hfgen.models.generators.maskgit import MaskGITTransformer
from hfgen.models.generators.uvit import UViTBert
from hfgen.models.tokenizers.maskgit_vqgan import MaskGITVQGAN
from hfgen.official import assemble
from support.golden import PUBLIC_CASES, read_case

CASE = read_case("maskgit", PUBLIC_CASES)
SYSTEMS = {"jax_transformer": "maskgit", "bert": "titok", "uvit": "titok"}
CLASSES = {"jax_transformer": MaskGITTransformer, "bert": ImageBert, "uvit": UViTBert}


def official_config(part):
    """Of MaskGIT the arguments of the network, of the others the nested training configuration."""
    jax = CASE.config["jax"]
    return jax["transformer"] | {"num_class": jax["num_class"]} if part == "jax_transformer" else CASE.config[part]


def load(part, state=None, config=None):
    state = dict(CASE.states[part]) if state is None else state
    return load_original(SYSTEMS[part], state, original_config=official_config(part) if config is None else config)


@pytest.mark.parametrize("part", SYSTEMS)
def test_round_trip(part):
    state = CASE.states[part]
    model = load(part)
    assert type(model) is CLASSES[part] and not model.training
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    back = to_original(model)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].dtype == value.dtype and torch.equal(back[name], value), name
    again = load(part, back)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("part", SYSTEMS)
def test_from_single_file(part):
    model = CLASSES[part].from_single_file(CASE.states[part], original_config=official_config(part))
    assert type(model) is CLASSES[part]


def test_configurations_are_read_off_the_tensors():
    config = load("jax_transformer", config={"num_class": 10}).config
    jax = CASE.config["jax"]
    assert (config.num_codes, config.num_classes) == (jax["vqvae"]["codebook_size"], 10)
    assert config.num_tokens == jax["transformer"]["latent_size"] ** 2
    assert config.num_attention_heads == jax["transformer"]["num_heads"]
    for part in ("bert", "uvit"):
        official = CASE.config[part]["model"]["generator"]
        config = load(part, config={"num_attention_heads": official["num_attention_heads"]}).config
        assert config.num_codes == CASE.config[part]["model"]["vq_model"]["codebook_size"]
        assert config.num_tokens == official["image_seq_len"]
        assert config.num_classes == official["condition_num_classes"]
        assert config.num_layers == official["num_hidden_layers"]
        assert config.intermediate_size == official["intermediate_size"]


def test_arguments_that_tensors_do_not_tell():
    assert load("jax_transformer", config={"num_class": 10, "dropout_rate": 0.3}).config.dropout == 0.3
    flat = {"num_attention_heads": 8, "dropout": 0.2, "attn_drop": 0.3, "class_label_dropout": 0.4}
    config = load("bert", config=flat).config
    assert (config.num_attention_heads, config.dropout, config.attention_dropout) == (8, 0.2, 0.3)
    assert config.class_dropout == 0.4
    sampling = {"num_steps": 8, "randomize_temperature": 9.5, "guidance_scale": 4.5, "guidance_decay": "linear"}
    assert load("bert", config=flat | sampling).config == config


def test_positions_that_old_checkpoints_hold():
    state = CASE.states["bert"] | {"model.embeddings.position_ids": torch.arange(17)[None]}
    assert torch.equal(load("bert", state).lm_head.weight, CASE.states["bert"]["model.lm_head.weight"])


@pytest.mark.parametrize("part", SYSTEMS)
def test_missing_unknown_and_misshapen_tensors(part):
    state = dict(CASE.states[part])
    name = {
        "jax_transformer": "params.TransformerLayer_1.Mlp_0.layer_output.kernel",
        "bert": "model.encoder.layer.1.output.dense.weight",
        "uvit": "in_blocks.1.attn.proj.weight",
    }[part]
    without = {key: value for key, value in state.items() if key != name}
    with pytest.raises(ValueError, match=f"1 missing: {re.escape(name)}"):
        load(part, without)
    with pytest.raises(ValueError, match="1 unknown: .*extra"):
        load(part, state | {"params.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"1 wrong: {re.escape(name)}"):
        load(part, state | {name: torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=f"1 wrong: {re.escape(name)}"):
        load(part, state | {name: torch.zeros(3)})


@pytest.mark.parametrize(
    ("part", "given"),
    [
        ("jax_transformer", {"latent_size": 5}),
        ("jax_transformer", {"num_layers": 3}),
        ("jax_transformer", {"num_heads": 3}),
        ("jax_transformer", {"num_embeds": 64}),
        ("jax_transformer", {"codebook_size": 1024}),
        ("jax_transformer", {"mask_token_id": 7}),
        ("bert", {"model_type": "UViT"}),
        ("bert", {"image_seq_len": 32}),
        ("bert", {"codebook_size": 4096}),
        ("uvit", {"model_type": "ViT"}),
        ("uvit", {"num_hidden_layers": 5}),
        ("uvit", {"condition_num_classes": 1000}),
    ],
)
def test_contradicting_arguments(part, given):
    ((name, value),) = given.items()
    flat = {"num_class": 10} if part == "jax_transformer" else {"num_attention_heads": 4}
    with pytest.raises(ValueError, match=rf"original_config\['{name}'\] is '?{value}"):
        load(part, config=flat | given)


@pytest.mark.parametrize("part", SYSTEMS)
def test_unknown_arguments(part):
    flat = {"num_class": 10} if part == "jax_transformer" else {"num_attention_heads": 4}
    with pytest.raises(ValueError, match="unknown arguments: deepness. Known: "):
        load(part, config=flat | {"deepness": 2})


@pytest.mark.parametrize(("section", "key"), [("generator", "model_type"), ("vq_model", "codebook_size")])
@pytest.mark.parametrize("part", ["bert", "uvit"])
def test_nested_config_that_lacks_a_key(part, section, key):
    model = dict(CASE.config[part]["model"])
    model[section] = {name: value for name, value in model[section].items() if name != key}
    with pytest.raises(ValueError, match=rf"lacks model\.{section}\.{key}"):
        load(part, config={"model": model})


def test_classes_and_heads_must_be_given():
    with pytest.raises(ValueError, match="vocabulary of 51 has no room for 1000 classes.*num_class"):
        load("jax_transformer", config={})
    for part in ("bert", "uvit"):
        with pytest.raises(ValueError, match="number of heads of width 64 .*num_attention_heads"):
            load(part, config={})
        with pytest.raises(ValueError, match="number of heads of width 64 .*given: 5"):
            load(part, config={"num_attention_heads": 5})


def test_maskgit_with_its_tokenizer_makes_a_pipeline():
    transformer = load("jax_transformer")
    levels = len(CASE.config["jax"]["vqvae"]["channel_multipliers"])
    size = CASE.config["jax"]["transformer"]["latent_size"] * 2 ** (levels - 1)

    def both(size):
        tokenizer = load_original("maskgit", CASE.states["jax_tokenizer"], original_config={"resolution": size})
        assert type(tokenizer) is MaskGITVQGAN
        return {"vq_model": tokenizer, "transformer": transformer}

    assert assemble("maskgit", both(size)).scheduler.config.mask_schedule == "cosine"
    with pytest.raises(ValueError, match="numbers of codes per image: 64 and 16"):
        assemble("maskgit", both(2 * size))
