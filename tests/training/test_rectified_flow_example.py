"""The training script of rectified flows: what it learns from, saves, resumes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import T5EncoderModel

from hfgen import DiT, RectifiedFlowPipeline
from hfgen.counters import generator
from hfgen.data.sources import load_images
from hfgen.training import parse_config
from hfgen.training.flow import FlowTrainingConfig
from hfgen.training.flow_conditions import CaptionCondition, LabelCondition
from support import text_encoders
from support.example_runs import EXAMPLES, TINY, assert_equal_checkpoints, load_script, logged, read_log, run_script
from support.small_autoencoder import save_autoencoder

SCRIPT = "train_rectified_flow"
SMALL = ["--width", "16", "--num_heads", "2", "--num_layers", "2", "--patch_size", "8", "--num_inference_steps", "2"]
TEXT = ["--model", "mmdit", "--dataset", "shapes:mixed", "--limit", "64", "--vocab_size", "60", "--text_width", "16"]
TEXT += ["--text_layers", "1", "--text_heads", "2"]


def _fit(folder: Path, *arguments: str) -> Path:
    return run_script(SCRIPT, folder, *TINY, *SMALL, *arguments)


def _sample(pipeline: RectifiedFlowPipeline, **condition) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**condition, num_inference_steps=2, generator=generator(1), output_type="pt").images


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def text_flow(tmp_path_factory) -> Path:
    # Five steps: the network starts at zero, so that gradients reach the text encoder one layer after the other.
    flags = ["--max_train_steps", "5", "--checkpointing_steps", "1", "--checkpoints_total_limit", "none"]
    return _fit(tmp_path_factory.mktemp("text"), *TEXT, *flags, "--shift", "3")


def test_class_flow_in_pixels(tmp_path):
    final = _fit(tmp_path)
    pipeline = RectifiedFlowPipeline.from_pretrained(final)
    assert isinstance(pipeline.transformer, DiT) and pipeline.vae is None
    assert pipeline.class_names[0] == "red circle" and pipeline.transformer.config.sample_size == 32
    average = DiT.from_pretrained(tmp_path / "checkpoint-2" / "ema_transformer")
    expected = _sample(
        RectifiedFlowPipeline(average, pipeline.scheduler, class_names=pipeline.class_names),
        class_labels="blue cross",
    )
    assert torch.equal(_sample(pipeline, class_labels="blue cross"), expected)
    last = read_log(tmp_path)[-1]
    assert {"validation/error_0.1", "validation/error", "validation/judge_label"} <= last.keys()


def test_text_flow_in_pixels(text_flow):
    pipeline = RectifiedFlowPipeline.from_pretrained(text_flow)
    assert isinstance(pipeline.transformer, SD3Transformer2DModel) and pipeline.scheduler.config.shift == 3
    parts = [
        model.from_pretrained(text_flow.parent / "checkpoint-5" / f"ema_{name}")
        for name, model in (("transformer", SD3Transformer2DModel), ("text_encoder", T5EncoderModel))
    ]
    expected = RectifiedFlowPipeline(
        parts[0], pipeline.scheduler, text_encoder=parts[1].eval(), tokenizer=pipeline.tokenizer
    )
    prompt = "a small red circle at the top left"
    assert torch.equal(_sample(pipeline, prompt=prompt), _sample(expected, prompt=prompt))
    assert {"validation/judge_cell", "validation/judge_pair"} <= read_log(text_flow.parent)[-1].keys()


def test_text_encoder_learns_with_the_flow(text_flow):
    first, second = (
        load_file(text_flow.parent / f"checkpoint-{step}" / "text_encoder" / "model.safetensors") for step in (1, 5)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_training_conditions_are_those_of_the_pipeline(text_flow):
    """A caption is a prompt, a dropped one the negative prompt, padded to the same length."""
    pipeline = RectifiedFlowPipeline.from_pretrained(text_flow)
    draws = torch.Generator().manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draws) / max(parameter.shape[-1], 4) ** 0.5
    config = FlowTrainingConfig(output_dir="run", model="mmdit", text_tokenizer=str(text_flow / "tokenizer"))
    condition = CaptionCondition(config, load_images("shapes:mixed", resolution=32, limit=64))
    caption = "a large blue cross in the centre"
    with torch.no_grad():
        modules = {"text_encoder": pipeline.text_encoder}
        inputs = condition.inputs({"caption": [caption] * 2}, torch.tensor([True, False]), modules)
    states, pooled = inputs["encoder_hidden_states"], inputs["pooled_projections"]
    assert not torch.equal(*pooled)
    embeds = {"prompt_embeds": states[1:], "pooled_prompt_embeds": pooled[1:]}
    embeds |= {"negative_prompt_embeds": states[:1], "negative_pooled_prompt_embeds": pooled[:1]}
    expected, actual = (
        _sample(pipeline, guidance_scale=3.0, **arguments) for arguments in ({"prompt": caption}, embeds)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    unguided = _sample(pipeline, guidance_scale=1.0, prompt=caption)
    assert (unguided - expected).abs().max() > 1e-2


def test_dropped_and_unlabelled_images_have_no_class():
    config = FlowTrainingConfig(output_dir="run")
    condition = LabelCondition(config, load_images("shapes", resolution=8, limit=2))
    batch = {"label": torch.tensor([3, 4, -1])}
    inputs = condition.inputs(batch, torch.tensor([True, False, False]), {})
    assert inputs["class_labels"].tolist() == [24, 4, 24]


def test_muon_takes_the_blocks_of_both_networks(tmp_path):
    for name, flags in {"classes": [], "captions": TEXT}.items():
        _fit(tmp_path / name, *flags, "--optimizer", "muon", "--learning_rate", "1e-3")
        assert read_log(tmp_path / name)[-1]["step"] == 2


def test_network_starts_at_zero():
    config = parse_config(FlowTrainingConfig, ["--output_dir", "run", *TEXT, "--width", "16", "--num_layers", "2"])
    condition = CaptionCondition(config, load_images("shapes:mixed", resolution=32, limit=64))
    network = condition.network(3, 32)
    batch, sample = {"caption": ["a red circle"]}, torch.ones(1, 3, 32, 32)
    inputs = condition.inputs(batch, torch.tensor([False]), {})
    assert network(sample, timestep=torch.tensor([500.0]), **inputs).sample.abs().max() == 0
    assert network.pos_embed.proj.weight.std() > 0


def test_frozen_text_encoder(tmp_path):
    source = tmp_path / "t5"
    text_encoders.t5().save_pretrained(source)
    text_encoders.tokenizer(max_length=40).save_pretrained(source)
    final = _fit(tmp_path / "run", *TEXT, "--text_encoder", str(source), "--text_tokens", "30")
    assert not (tmp_path / "run" / "checkpoint-2" / "text_encoder").exists()
    pipeline = RectifiedFlowPipeline.from_pretrained(final)
    assert pipeline.tokenizer.model_max_length == 30
    before = T5EncoderModel.from_pretrained(source).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in pipeline.text_encoder.state_dict().items())


def test_latents_and_their_cache(vae, tmp_path):
    final = _fit(tmp_path / "images", "--vae", str(vae))
    pipeline = RectifiedFlowPipeline.from_pretrained(final)
    assert pipeline.transformer.config.in_channels == 4 and pipeline.transformer.config.sample_size == 16
    assert _sample(pipeline, class_labels=0).shape == (1, 3, 32, 32)

    cache = tmp_path / "cache"
    flags = ["--limit", "8", "--batch_size", "4", "--resolution", "48", "--no_progress"]
    run_script("cache_latents", cache, "--tokenizer", str(vae), *flags)
    final = _fit(tmp_path / "cached", "--vae", str(vae), "--cache", str(cache))
    assert DiT.from_pretrained(final, subfolder="transformer").config.sample_size == 24
    with pytest.raises(ValueError, match="the tokenizer is .*weights|does not fit this run"):
        other = tmp_path / "other"
        AutoencoderKL.from_pretrained(vae, latent_channels=4).to(torch.float16).save_pretrained(other)
        _fit(tmp_path / "wrong", "--vae", str(other), "--cache", str(cache))


@pytest.mark.parametrize("method", ["classes in latents", "captions"])
def test_resume_is_bit_exact(method, vae, tmp_path):
    """With what each adds: the posterior's sample and dropped labels; a second trained model and dropped captions."""
    flags = {
        "classes in latents": ["--vae", str(vae), "--time_density", "mode", "--condition_dropout", "0.5"],
        "captions": [*TEXT, "--condition_dropout", "0.5", "--weighting", "cosmap", "--precondition"],
    }[method]
    flags += ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    _fit(tmp_path, *flags)
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    _fit(tmp_path, *flags, "--resume", "latest")
    assert_equal_checkpoints(tmp_path / "kept", tmp_path / "checkpoint-4")


@pytest.mark.parametrize("text", [False, True], ids=["classes", "captions"])
def test_loss_falls(text, tmp_path):
    flags = ["--max_train_steps", "40", "--logging_steps", "1", "--batch_size", "16", "--learning_rate", "3e-3"]
    flags += ["--resolution", "16", "--patch_size", "2", "--width", "32", "--checkpointing_steps", "0"]
    _fit(tmp_path, *(TEXT if text else []), "--limit", "64", *flags)
    losses = logged(tmp_path, "transformer/loss")
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_validation_is_a_function_of_the_weights(tmp_path):
    _fit(tmp_path, "--learning_rate", "0", "--validation_steps", "1")
    for name in ("error_0.1", "error_0.9", "error"):
        first, second = logged(tmp_path, f"validation/{name}")
        assert first == second > 0


ERRORS = {
    "density": (["--time_density", "beta"], "choose one of uniform, logit_normal, mode, cosmap"),
    "standard deviation": (["--logit_std", "0"], "logit_std must be above 0"),
    "shift": (["--shift", "-1"], "shift must be above 0"),
    "dropout": (["--condition_dropout", "1.5"], "a probability from 0 to 1"),
    "guidance": (["--condition_dropout", "0"], "set --guidance_scale 1"),
    "cache": (["--cache", "x"], "give --vae too"),
    "text": (["--text_encoder", "x"], "--model dit reads no text"),
    "times": (["--model", "mmdit", "--reverse_time"], "are of dit"),
    "heads": (["--width", "30"], "must be a multiple of --num_heads 4"),
    "text heads": (["--text_width", "30"], "must be a multiple of --text_heads 4"),
    "text length": (["--text_tokens", "2"], "--text_tokens is 2"),
    "steps": (["--num_inference_steps", "0"], "--num_inference_steps is 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_settings_that_cannot_work_end_the_program(case, capsys):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        parse_config(FlowTrainingConfig, ["--output_dir", "run", *arguments])
    assert message in capsys.readouterr().err


def test_captions_decide_about_the_length(caplog):
    data = load_images("shapes:mixed", resolution=32, limit=64)
    config = parse_config(FlowTrainingConfig, ["--output_dir", "run", *TEXT])
    tokenizer = CaptionCondition(config, data).tokenizer
    longest = max(len(tokenizer(data[index]["caption"])["input_ids"]) for index in range(64))
    assert tokenizer.model_max_length == longest and not caplog.records
    config.text_tokens = 5
    assert CaptionCondition(config, data).tokenizer.model_max_length == 5
    assert f"up to {longest} tokens and are cut to 5" in caplog.text


def test_misfits_are_errors(tmp_path):
    with pytest.raises(ValueError, match="--patch_size 5 does not divide the side of the samples, 32"):
        _fit(tmp_path, "--patch_size", "5")
    with pytest.raises(ValueError, match="no classes"):
        _fit(tmp_path, "--dataset", "shapes:double")
    with pytest.raises(ValueError, match="vocab_size 5000 is too large"):
        _fit(tmp_path, *TEXT, "--vocab_size", "5000")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (32, 32)).save(images / "0.png")
    with pytest.raises(ValueError, match="has no captions, which --model mmdit learns from"):
        _fit(tmp_path / "run", "--model", "mmdit", "--dataset", str(images), "--validation_split", "train")


@pytest.mark.parametrize(("name", "size"), [("sit_b2", "B/2"), ("sit_xl2", "XL/2")])
def test_sit_recipes_are_the_published_ones(name, size):
    file = EXAMPLES / "configs" / f"{name}.yaml"
    arguments = ["--config", str(file), "--output_dir", "run", "--vae", "vae"]
    config = parse_config(load_script(SCRIPT).Config, arguments)
    processes = int(file.read_text().split("--num_processes ")[1].split()[0])
    assert config.batch_size * config.gradient_accumulation_steps * processes == 256
    assert (config.learning_rate, config.ema_decay, config.max_grad_norm) == (1e-4, 0.9999, 0)
    published = DiT.presets[size]
    assert {name: getattr(config, name) for name in published} == dict(published)
    assert (config.timestep_scale, config.reverse_time, config.time_density) == (1e-3, True, "uniform")
