"""The training scripts of TiTok, MaskGIT's VQGAN and MaskGIT: what each learns from, saves, resumes and refuses."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfgen import ImageBert, MaskGITPipeline, MaskGITTransformer, MaskGITVQGAN, TiTok, UViTBert
from hfgen.losses.adversarial import r1_penalty
from hfgen.training import parse_config
from hfgen.training.titok import LeCamDiscriminator, questionable_settings
from support.example_runs import EXAMPLES, TINY, assert_equal_checkpoints, load_script, run_script

VQGAN = ["--base_channels", "8", "--norm_num_groups", "4", "--latent_channels", "4", "--num_codes", "16"]
VQGAN += ["--entropy_weight", "0.02"]
TITOK = ["--encoder", "16,1,2", "--decoder", "24,1,2", "--num_latent_tokens", "4", "--num_codes", "16"]
GAN = ["--adversarial_weight", "0.01", "--discriminator_channels", "8", "--discriminator_start", "1"]
MASKGIT = ["--hidden_size", "16", "--intermediate_size", "32", "--num_layers", "2", "--num_attention_heads", "2"]


def _fit(script: str, folder: Path, *arguments: str) -> Path:
    return run_script(script, folder, *TINY, *arguments)


def _log(final: Path) -> dict[str, float]:
    lines = (final.parent / "log.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("titok")


@pytest.fixture(scope="module")
def vqgan(folder) -> Path:
    return _fit("train_maskgit_vqgan", folder / "vqgan", *VQGAN, *GAN)


@pytest.fixture(scope="module")
def stage1(folder, vqgan) -> Path:
    return _fit("train_titok", folder / "stage1", "--stage", "1", "--vqgan", str(vqgan), *TITOK)


@pytest.fixture(scope="module")
def stage2(folder, vqgan, stage1) -> Path:
    return _fit("train_titok", folder / "stage2", "--stage", "2", "--vqgan", str(vqgan), "--stage1", str(stage1), *GAN)


def test_vqgan_script(vqgan):
    tokenizer = MaskGITVQGAN.from_pretrained(vqgan)
    assert tokenizer.num_tokens == 64 and tokenizer.codebook_size == 16
    assert {"tokenizer/l2", "tokenizer/entropy", "discriminator/r1", "validation/psnr"} <= _log(vqgan).keys()


def test_r1_is_that_of_pixels_between_0_and_1():
    pixels = torch.rand(2, 3, 4, 4, requires_grad=True)
    logits = 3 * ((pixels + 1) / 2).sum(dim=1, keepdim=True)  # (2, 1, 4, 4), the gradient of their mean is 3 / 16
    penalty = r1_penalty(logits, pixels)
    torch.testing.assert_close(penalty, torch.tensor(48 * (3 / 16) ** 2))


def test_stage1_predicts_the_codes_of_the_vqgan(stage1):
    tokenizer = TiTok.from_pretrained(stage1)
    assert tokenizer(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 64, 16)
    assert {"tokenizer/proxy", "tokenizer/accuracy", "validation/psnr"} <= _log(stage1).keys()


def test_stage2_trains_the_decoders_and_keeps_the_codes(vqgan, stage1, stage2):
    before = {**load_file(stage1 / "diffusion_pytorch_model.safetensors")}
    pixel = load_file(vqgan / "diffusion_pytorch_model.safetensors")
    before |= {f"pixel_{name}": value for name, value in pixel.items() if name.startswith("decoder.")} | {
        "pixel_codebook": pixel["quantizer.embedding.weight"]
    }
    after = load_file(stage2 / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "code_head", "pixel_decoder", "pixel_codebook"}
    assert TiTok.from_pretrained(stage2)(torch.zeros(1, 3, 32, 32)).sample.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("bottleneck", ["vq", "kl"])
def test_single_stage(bottleneck, tmp_path):
    arguments = ["--bottleneck", bottleneck, "--codebook_update", "clustering", *TITOK, *GAN]
    final = _fit("train_titok", tmp_path, *arguments)
    output = TiTok.from_pretrained(final)(torch.zeros(2, 3, 32, 32))
    assert output.sample.shape == (2, 3, 32, 32)
    assert (output.codes is None) == (bottleneck == "kl")
    log = _log(final)
    assert ("tokenizer/kl" in log) == (bottleneck == "kl")
    assert log["discriminator/lecam"] > 0


def test_discriminator_keeps_the_averages_of_lecam(tmp_path):
    discriminator = LeCamDiscriminator(8, 1)
    discriminator.lecam(torch.ones(4), -torch.ones(4))
    discriminator.save_pretrained(tmp_path)
    loaded = LeCamDiscriminator.from_pretrained(tmp_path)
    assert loaded.lecam.real > 0 > loaded.lecam.fake
    assert torch.equal(loaded.lecam.real, discriminator.lecam.real)


@pytest.mark.parametrize("method", ["vqgan", "kl", "stage 2", "maskgit"])
def test_scripts_resume_bit_exactly(method, vqgan, stage1, tmp_path):
    """With what each method adds: discriminator, R1, LeCam, posterior noise, a frozen part, masks and label drop."""
    script, *flags = {
        "vqgan": ["train_maskgit_vqgan", *VQGAN, *GAN],
        "kl": ["train_titok", "--bottleneck", "kl", *TITOK, *GAN],
        "stage 2": ["train_titok", "--stage", "2", "--vqgan", str(vqgan), "--stage1", str(stage1), *GAN],
        "maskgit": ["train_maskgit", "--tokenizer", str(vqgan), "--dropout", "0.2", *MASKGIT],
    }[method]
    flags += ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    _fit(script, tmp_path, *flags)
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    _fit(script, tmp_path, *flags, "--resume", "latest")
    assert_equal_checkpoints(tmp_path / "kept", tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("model", "scheduler", "data"),
    [("maskgit", "maskgit", []), ("image_bert", "titok-l32", ["--cache_codes"]), ("uvit", "titok-s128", [])],
)
def test_maskgit_script(model, scheduler, data, stage2, vqgan, tmp_path):
    tokenizer = vqgan if model == "uvit" else stage2  # a grid, and a sequence without places
    arguments = ["--model", model, "--scheduler", scheduler, "--num_inference_steps", "3", *data, *MASKGIT]
    final = _fit("train_maskgit", tmp_path, "--tokenizer", str(tokenizer), *arguments)
    pipeline = MaskGITPipeline.from_pretrained(final)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("red circle", output_type="pt")
    assert output.images.shape == (1, 3, 32, 32) and output.nfe == 3
    assert pipeline.transformer.config.num_classes == 24
    assert pipeline.scheduler.config.guidance_scale == 2.0
    log = _log(final)
    assert 0 < log["transformer/masked"] <= 1 and 0 <= log["transformer/accuracy"] <= 1
    assert "validation/judge_label" in log


def test_maskgit_learns_its_codes(stage2, tmp_path):
    """Where all images have the same codes, a few steps predict them."""
    arguments = ["--tokenizer", str(stage2), "--max_train_steps", "40", "--logging_steps", "1", "--limit", "4"]
    arguments += ["--learning_rate", "5e-3"]
    final = _fit("train_maskgit", tmp_path, *arguments, "--num_inference_steps", "2", *MASKGIT, "--seed", "3")
    losses = [json.loads(line).get("transformer/loss") for line in (final.parent / "log.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


ERRORS = {
    "no VQGAN": (["--stage", "1"], "--stage 1 needs --vqgan"),
    "no stage 1": (["--stage", "2", "--vqgan", "x"], "--stage1, the result of stage 1"),
    "KL in two stages": (["--stage", "1", "--vqgan", "x", "--bottleneck", "kl"], "use --stage single"),
    "GAN in stage 1": (["--stage", "1", "--vqgan", "x", *GAN], "--stage 1 has no images"),
    "no perceptual weights": (["--perceptual_weight", "1"], "needs --perceptual_source"),
    "unknown stage": (["--stage", "3"], "choose one of 1, 2, single"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_settings_that_cannot_work_end_the_program(case, capsys):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        parse_config(load_script("train_titok").Config, ["--output_dir", "run", *arguments])
    assert message in capsys.readouterr().err


def test_misfits_are_errors(vqgan, stage1, tmp_path):
    first = ["--stage", "1", "--vqgan", str(vqgan)]
    with pytest.raises(ValueError, match="--patch_size must be .*, 4"):
        _fit("train_titok", tmp_path, *first, "--patch_size", "8", *TITOK)
    second = ["--stage", "2", "--vqgan", str(vqgan), "--stage1", str(stage1)]
    with pytest.raises(ValueError, match="--resolution is 64; stage 1 was trained with 32"):
        _fit("train_titok", tmp_path, *second, "--resolution", "64")
    with pytest.raises(ValueError, match="9 steps are more than the 4 masked tokens"):
        tokenizer = _fit("train_titok", tmp_path / "single", *TITOK)
        _fit("train_maskgit", tmp_path / "9", "--tokenizer", str(tokenizer), "--num_inference_steps", "9", *MASKGIT)
    with pytest.raises(ValueError, match="--class_dropout 0 trains no unconditional class"):
        arguments = ["--class_dropout", "0", "--num_inference_steps", "2", *MASKGIT]
        _fit("train_maskgit", tmp_path / "0", "--tokenizer", str(tokenizer), *arguments)


def test_maskgit_needs_codes(tmp_path):
    final = _fit("train_titok", tmp_path / "kl", "--bottleneck", "kl", *TITOK)
    with pytest.raises(ValueError, match="is a continuous TiTok, which has no codebook"):
        _fit("train_maskgit", tmp_path / "maskgit", "--tokenizer", str(final), *MASKGIT)


TRAPS = {
    "--normalize_codes": ["--stage", "1", "--vqgan", "x", "--no_normalize_codes", "--codebook_update", "gradient"],
    "--codebook_update": ["--stage", "1", "--vqgan", "x", "--codebook_update", "clustering"],
    "--lpips_weight 0": [
        "--stage", "2", "--vqgan", "x", "--stage1", "x", "--perceptual_weight", "0.1", "--perceptual_source", "x",
    ],
    "--adversarial_weight 0.01": [
        "--stage", "2", "--vqgan", "x", "--stage1", "x", "--adversarial_weight", "0.1", "--discriminator_start", "5",
    ],
    "when images are good": ["--adversarial_weight", "0.1"],
    "behind the last step": ["--adversarial_weight", "0.1", "--discriminator_start", "9000"],
    "a sum, not a mean": ["--bottleneck", "kl", "--kl_weight", "1"],
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_warning(trap):
    config = parse_config(load_script("train_titok").Config, ["--output_dir", "run", *TRAPS[trap]])
    (message,) = questionable_settings(config)
    assert trap in message


def test_warnings_reach_the_log(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _fit("train_titok", tmp_path, "--bottleneck", "kl", "--kl_weight", "1", *TITOK)
    assert "--kl_weight weights a sum" in caplog.text


def _recipe(name: str, script: str, *arguments: str):
    file = EXAMPLES / "configs" / f"{name}.yaml"
    config = parse_config(load_script(script).Config, ["--config", str(file), "--output_dir", "run", *arguments])
    return config, int(file.read_text().split("--num_processes ")[1].split()[0])


@pytest.mark.parametrize(
    ("name", "preset", "steps", "warmup"),
    [
        ("titok_l32_stage1", "titok-l-32", 1_000_000, 10_000),
        ("titok_l32_stage2", "titok-l-32", 500_000, 5_000),
        ("titok_single_vq", "titok-bl-64-vq", 650_000, 10_000),
        ("titok_single_kl", "titok-bl-64-vae", 650_000, 10_000),
    ],
)
def test_titok_recipes_are_the_published_ones(name, preset, steps, warmup):
    arguments = [] if "single" in name else ["--vqgan", "x"] + (["--stage1", "x"] if "stage2" in name else [])
    needed = [] if "stage1" in name else ["--perceptual_source", "x"]
    config, processes = _recipe(name, "train_titok", *arguments, *needed)
    assert not questionable_settings(config)
    assert (config.max_train_steps, config.warmup_steps) == (steps, warmup)
    assert config.batch_size * config.gradient_accumulation_steps * processes == 256
    assert config.learning_rate * config.lr_final == pytest.approx(1e-5)
    if config.stage == "2":
        return  # the sizes are those of stage 1
    with torch.device("meta"):
        proxies = MaskGITVQGAN() if config.stage == "1" else None
        model = load_script("train_titok").new_model(config, proxies)
    expected = {name: value for name, value in TiTok.presets[preset].items() if name != "pixel_channels"}
    assert {name: model.config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "model", "scheduler", "batch", "final_rate"),
    [
        ("maskgit_imagenet256", MaskGITTransformer, "maskgit", 256, 1e-4),
        ("maskgit_titok_l32", ImageBert, "titok-l32", 2048, 1e-5),
        ("maskgit_titok_s128", UViTBert, "titok-s128", 2048, 1e-5),
    ],
)
def test_maskgit_recipes_are_the_published_ones(name, model, scheduler, batch, final_rate):
    config, processes = _recipe(name, "train_maskgit", "--tokenizer", "x")
    assert config.batch_size * config.gradient_accumulation_steps * processes == batch
    last = config.learning_rate * (1.0 if config.lr_schedule == "constant" else config.lr_final)
    assert last == pytest.approx(final_rate)
    assert config.scheduler == scheduler
    published = inspect.signature(model.__init__).parameters
    for size in ("num_layers", "num_attention_heads", "hidden_size", "intermediate_size"):
        assert getattr(config, size) == published[size].default, size
