"""The VAR converters: both directions, what is read off the tensors, and what they refuse."""

import re

import pytest
import torch
from accelerate import init_empty_weights

from hfgen.conversion import load_original, parts, released, systems, to_original
from hfgen.conversion.converter import OriginalConfig
from hfgen.models.generators.var import VARTransformer
from hfgen.models.tokenizers.multiscale_vqvae import MultiScaleVQVAE
from support.golden import PUBLIC_CASES, read_case

CASES = [(system, part) for system in ("var", "var_vqvae") for part in read_case(system, PUBLIC_CASES).states]
TRANSFORMERS = [part for part in read_case("var", PUBLIC_CASES).states if part != "vae"]


def state_of(part="var", system="var"):
    return dict(read_case(system, PUBLIC_CASES).states[part])


def config_of(part="var", system="var"):
    return dict(read_case(system, PUBLIC_CASES).config[part])


def sides():
    return tuple(config_of()["patch_nums"])


def trainer_checkpoint():
    """What the official trainer writes."""
    config = {"patch_nums": sides(), "resos": tuple(16 * side for side in sides()), "label_smooth": 0.0}
    states = {"config": config, "var_wo_ddp": state_of("var"), "vae_local": state_of("vae")}
    return {"epoch": 3, "iter": 0, "trainer": states | {"var_opt": {"optimizer": {}}}, "args": {"depth": 2}}


@pytest.mark.parametrize(("system", "part"), CASES)
def test_round_trip(system, part):
    state = state_of(part, system)
    model = load_original("var", state, original_config=config_of(part, system))
    assert not model.training
    back = to_original(model)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].dtype == value.dtype
        if name != "quantize.ema_vocab_hit_SV":
            assert torch.equal(back[name], value), name
    again = load_original("var", back, original_config=config_of(part, system))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_tensor_stays_without_memory():
    for part in read_case("var", PUBLIC_CASES).states:
        model = load_original("var", state_of(part), original_config=config_of(part))
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_model_owns_its_memory():
    state = state_of()
    model = load_original("var", state)
    before = state["blocks.0.attn.mat_qkv.weight"].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(state["blocks.0.attn.mat_qkv.weight"], before)


@pytest.mark.parametrize("part", TRANSFORMERS)
def test_transformer_configuration_is_read_off_the_tensors(part):
    official, state = config_of(part), state_of(part)
    heads = {} if official["attn_l2_norm"] else {"num_heads": official["num_heads"]}
    config = load_original("var", state, original_config=heads).config
    assert config.num_layers == official["depth"]
    assert config.num_attention_heads == official["num_heads"]
    assert config.num_attention_heads * config.attention_head_dim == official["embed_dim"]
    assert config.num_classes == official["num_classes"]
    assert config.num_codes == state["head.weight"].shape[0]
    assert config.code_dim == state["word_embed.weight"].shape[1]
    assert config.mlp_ratio == official["mlp_ratio"]
    assert tuple(config.patch_nums) == tuple(official["patch_nums"])
    assert config.shared_modulation == official["shared_aln"]
    assert config.l2_norm_attention == official["attn_l2_norm"]


def test_arguments_that_tensors_do_not_tell():
    given = {"cond_drop_rate": 0.2, "drop_path_rate": 0.3, "norm_eps": 1e-5, "flash_if_available": False}
    config = load_original("var", state_of(), original_config=given).config
    assert (config.class_dropout, config.drop_path, config.norm_eps) == (0.2, 0.3, 1e-5)
    given = {"v_patch_nums": sides(), "beta": 0.5, "quant_resi": -0.7, "using_znorm": True, "test_mode": False}
    config = load_original("var", state_of("vae"), original_config=given).config
    assert (config.commitment_weight, config.residual_conv_ratio, config.cosine_codes) == (0.5, 0.7, True)


def test_patch_nums_without_the_table_of_scales():
    state = {name: value for name, value in state_of().items() if name not in ("lvl_1L", "attn_bias_for_masking")}
    with pytest.raises(ValueError, match="do not tell the sides of the 5 token maps with 55 tokens: .*patch_nums"):
        load_original("var", state)
    assert load_original("var", state, original_config={"patch_nums": list(sides())}).patch_nums == sides()


@pytest.mark.parametrize("given", [(1, 2, 3, 4, 6), (1, 2, 3, 4), (5, 4, 3, 2, 1), "1_2_3_4_5", 5, []])
def test_patch_nums_that_do_not_fit(given):
    with pytest.raises(ValueError, match="patch_nums"):
        load_original("var", state_of(), original_config={"patch_nums": given})


def test_number_of_heads_without_cosine_attention():
    with pytest.raises(ValueError, match="number of heads of width 32 .*num_heads"):
        load_original("var", state_of("var_plain"))
    with pytest.raises(ValueError, match="number of heads of width 32 .*given: 5"):
        load_original("var", state_of("var_plain"), original_config={"num_heads": 5})


def test_tokenizer_needs_its_scales():
    with pytest.raises(ValueError, match=r"v_patch_nums"):
        load_original("var", state_of("vae"))


@pytest.mark.parametrize(
    ("part", "given"),
    [
        ("var", {"depth": 3}),
        ("var", {"embed_dim": 64}),
        ("var", {"num_heads": 4}),
        ("var", {"attn_l2_norm": False}),
        ("var", {"shared_aln": True}),
        ("var", {"num_classes": 1000}),
        ("var", {"drop_rate": 0.1}),
        ("vae", {"vocab_size": 4096}),
        ("vae", {"ch": 160}),
        ("vae", {"quant_conv_ks": 1}),
        ("vae", {"share_quant_resi": 0}),
    ],
)
def test_contradicting_arguments(part, given):
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=rf"original_config\['{name}'\] is {value}"):
        load_original("var", state_of(part), original_config=config_of(part) | given)


@pytest.mark.parametrize("part", ["var", "vae"])
def test_unknown_arguments(part):
    with pytest.raises(ValueError, match="unknown arguments: deepness, widht. Known: .*"):
        load_original("var", state_of(part), original_config=config_of(part) | {"widht": 1, "deepness": 2})


@pytest.mark.parametrize("part", ["var", "vae"])
def test_missing_unknown_and_misshapen_tensors(part):
    state, config = state_of(part), config_of(part)
    victim = {"var": "blocks.1.ffn.fc2.bias", "vae": "encoder.mid.attn_1.qkv.bias"}[part]
    with pytest.raises(ValueError, match=f"1 missing: {re.escape(victim)}"):
        load_original("var", {name: state[name] for name in state if name != victim}, original_config=config)
    with pytest.raises(ValueError, match="1 unknown: blocks.extra"):
        load_original("var", state | {"blocks.extra": torch.zeros(1)}, original_config=config)
    with pytest.raises(ValueError, match=f"1 wrong: {re.escape(victim)}"):
        load_original("var", state | {victim: torch.zeros(30)}, original_config=config)


def test_every_tensor_of_a_checkpoint_is_needed():
    derived = re.compile(r"lvl_1L|attn_bias_for_masking|.*zero_k_bias|quantize\.ema_vocab_hit_SV")
    for part in ("var_saln", "var_plain"):
        for name in state_of(part):
            less = {other: value for other, value in state_of(part).items() if other != name}
            if derived.fullmatch(name):
                load_original("var", less, part="transformer", original_config=config_of(part))
            else:
                with pytest.raises(ValueError, match=re.escape(name)):
                    load_original("var", less, part="transformer", original_config=config_of(part))


@pytest.mark.parametrize("name", ["blocks.1.attn.zero_k_bias", "attn_bias_for_masking", "lvl_1L"])
def test_derived_tensors_with_other_values(name):
    state = state_of()
    changed = state[name].clone()
    changed.view(-1)[-1] = 1 if name != "lvl_1L" else 0
    with pytest.raises(ValueError, match=name):
        load_original("var", state | {name: changed}, original_config=config_of())


def test_wrapped_trainer_checkpoint(tmp_path):
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save(trainer_checkpoint(), path)
    transformer = load_original("var", path, part="transformer")
    assert isinstance(transformer, VARTransformer)
    assert torch.equal(transformer.proj_out.weight, state_of()["head.weight"])
    vae = load_original("var", path, part="vae")
    assert isinstance(vae, MultiScaleVQVAE)
    assert tuple(vae.config.patch_nums) == sides()  # from the trainer's own record
    with pytest.raises(ValueError, match="several parts of var: name one with part=transformer or vae"):
        load_original("var", path)


def test_half_precision_checkpoints_stay_in_half_precision():
    state = {name: value.half() if value.is_floating_point() else value for name, value in state_of().items()}
    assert load_original("var", state).dtype == torch.float16


def test_from_single_file(tmp_path):
    torch.save(state_of("vae"), tmp_path / "vae.pth")
    model = MultiScaleVQVAE.from_single_file(tmp_path / "vae.pth", original_config=config_of("vae"))
    assert model.config.num_codes == config_of("vae")["vocab_size"]
    with pytest.raises(ValueError, match="checkpoint lacks lvl_embed.weight, pos_1LC, word_embed.weight; it holds"):
        VARTransformer.from_single_file(tmp_path / "vae.pth")


def test_foreign_checkpoint():
    with pytest.raises(ValueError, match=r"no checkpoint of var: it should hold .* but holds conv1\.w"):
        load_original("var", {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})


def test_unknown_system_and_part():
    with pytest.raises(ValueError, match=f"no converter for 'varr'; choose one of {', '.join(systems())}"):
        load_original("varr", {})
    with pytest.raises(ValueError, match="no part 'decoder'; choose one of transformer, vae"):
        load_original("var", {}, part="decoder")


def test_models_without_an_official_layout():
    class Own(VARTransformer):
        original_system = None

    with pytest.raises(ValueError, match="Own names no official checkpoint layout"):
        to_original(Own(num_layers=1, num_attention_heads=1, patch_nums=(1, 2), num_codes=8, code_dim=4))


@pytest.mark.parametrize("preset", VARTransformer.presets)
def test_published_sizes_are_recognised(preset):
    """The state dict of a published size has the shapes from which the converter reads that size."""
    with init_empty_weights():
        model = VARTransformer.from_preset(preset)
        part = parts("var")["transformer"]
        state = {name: value for name, value in part.save(model).items() if name != "lvl_1L"}
    config = part.config(state, OriginalConfig({}))
    expected = {name: model.config[name] for name in config}
    assert config == expected | {"patch_nums": tuple(expected["patch_nums"])}


def test_released_table():
    rows = released()
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert {file.part for file in row.files} <= parts(row.system).keys()
        assert row.system != "var" or row.licence == "MIT"
    sizes = {row.name: row.files[0].megabytes for row in rows if row.name in VARTransformer.presets}
    assert len(sizes) >= 5
    for name, megabytes in sizes.items():
        with torch.device("meta"):
            model = VARTransformer.from_preset(name)
        num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        assert 0.98 < megabytes * 1e6 / num_bytes < 1.04, (name, num_bytes)
