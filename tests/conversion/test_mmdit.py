"""SD3 files: the official layout in both directions, with and without its prefix, and as a pipeline folder."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import save_file

from hfgen import AutoPipeline, RectifiedFlowPipeline
from hfgen.cli import main
from hfgen.conversion import load_original, parts, to_original

PREFIX = "model.diffusion_model."


def mmdit(**changes) -> SD3Transformer2DModel:
    """Official sizes have heads of 64."""
    arguments = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 64,
        "num_attention_heads": 1,
        "joint_attention_dim": 16,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 4,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SD3Transformer2DModel(**arguments | changes).eval()


def official(model: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in to_original(model, "sd3", "transformer").items()}


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,), "num_layers": 3}],
    ids=["sd3", "sd3.5-large", "sd3.5-medium"],
)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_there_and_back(changes, prefix):
    model = mmdit(**changes)
    state = {prefix + name: value for name, value in official(model).items()}
    loaded = load_original("sd3", state)
    ours = {name: value for name, value in model.config.items() if not name.startswith("_")}
    assert {name: value for name, value in loaded.config.items() if not name.startswith("_")} == ours
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training


def test_layout():
    model = mmdit()
    state = official(model)
    shift, scale = state["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(model.norm_out.linear.weight, torch.cat([scale, shift]))
    shift, scale = state["joint_blocks.1.context_block.adaLN_modulation.1.bias"].chunk(2)
    assert torch.equal(model.transformer_blocks[1].norm1_context.linear.bias, torch.cat([scale, shift]))
    inside = state["joint_blocks.0.context_block.adaLN_modulation.1.weight"]
    assert torch.equal(model.transformer_blocks[0].norm1_context.linear.weight, inside)
    joint = model.transformer_blocks[0].attn
    joint = torch.cat([joint.add_q_proj.weight, joint.add_k_proj.weight, joint.add_v_proj.weight])
    assert torch.equal(state["joint_blocks.0.context_block.attn.qkv.weight"], joint)


def test_agrees_with_the_converter_of_diffusers():
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    model = mmdit(qk_norm="rms_norm", dual_attention_layers=(0,))
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(official(model))
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in theirs.items())


def test_other_models_in_the_file_are_left_out():
    state = {PREFIX + name: value for name, value in official(mmdit()).items()}
    state |= {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(2),
        "text_encoders.clip_l.logit_scale": torch.ones(1),
    }
    assert isinstance(load_original("sd3", state), SD3Transformer2DModel)


def test_what_is_missing_or_unknown_is_named():
    state = official(mmdit())
    del state["joint_blocks.1.x_block.mlp.fc2.bias"]
    state["joint_blocks.0.extra"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match="unknown: joint_blocks.0.extra; 1 missing: joint_blocks.1.x_block.mlp.fc2.bias"
    ):
        load_original("sd3", state)
    with pytest.raises(ValueError, match="no checkpoint of sd3"):
        load_original("sd3", {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"original_config\['depth'\] is 24, but the tensors say 2"):
        load_original("sd3", official(mmdit()), original_config={"depth": 24})


def test_a_class_of_diffusers_names_no_layout():
    with pytest.raises(ValueError, match="SD3Transformer2DModel names no official checkpoint layout: give system and"):
        to_original(mmdit())
    with pytest.raises(ValueError, match="names no official checkpoint layout: give part, "):
        to_original(mmdit(), "sd3")


def test_hfgen_convert_writes_a_pipeline(tmp_path):
    file = tmp_path / "sd3.safetensors"
    save_file({PREFIX + name: value.half() for name, value in official(mmdit()).items()}, file)
    assert main(["convert", "sd3", str(file), "--output", str(tmp_path / "pipeline")]) == 0
    loaded = AutoPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(loaded) is RectifiedFlowPipeline and type(loaded.transformer) is SD3Transformer2DModel
    assert parts("sd3").keys() == {"transformer"}


def test_hfgen_convert_adds_the_autoencoder(tmp_path, capsys):
    file, vae = tmp_path / "sd3.safetensors", AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    save_file(official(mmdit()), file)
    vae.save_pretrained(tmp_path / "vae")
    assert main(["convert", "sd3", str(file), "--output", str(tmp_path / "latents")]) == 0
    assert "gives latents; for images add --vae stabilityai/stable-diffusion-3-medium" in capsys.readouterr().out
    assert main(["convert", "sd3", str(file), "--vae", str(tmp_path / "vae"), "--output", str(tmp_path / "all")]) == 0
    pipeline = AutoPipeline.from_pretrained(tmp_path / "all")
    pipeline.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": torch.zeros(1, 2, 16), "pooled_prompt_embeds": torch.zeros(1, 8)}
    images = pipeline(**embeds, guidance_scale=1, num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 8, 8) and torch.equal(pipeline.vae.state_dict()["decoder.conv_in.weight"],
                                                        vae.state_dict()["decoder.conv_in.weight"])  # fmt: skip
