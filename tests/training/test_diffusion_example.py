"""The training script of diffusion: what it learns from, saves, resumes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel

from hfgen import DiT, ImageDiffusionPipeline
from hfgen.counters import generator
from hfgen.training import Draws, parse_config
from hfgen.training.diffusion import DiffusionTrainingConfig, diffusion_network
from support.example_runs import EXAMPLES, TINY, assert_equal_checkpoints, load_script, logged, read_log, run_script
from support.small_autoencoder import save_autoencoder

SCRIPT = "train_diffusion"
UNET = ["--channels", "8,16", "--norm_num_groups", "4", "--attention_levels", "1", "--attention_head_dim", "8"]
DIT = ["--model", "dit", "--width", "16", "--num_heads", "2", "--num_layers", "2", "--patch_size", "8"]
STEPS = ["--num_inference_steps", "3"]


def _fit(folder: Path, *arguments: str) -> Path:
    return run_script(SCRIPT, folder, *TINY, *STEPS, *arguments)


def _sample(pipeline: ImageDiffusionPipeline, label: int | str = 0, **changes) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(label, guidance_scale=2.0, generator=generator(1), output_type="pt", **changes)
    assert output.nfe == 3 and output.images.isfinite().all()
    return output.images


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.mark.parametrize(
    ("flags", "model", "variance"),
    [
        ([*UNET, "--prediction_type", "sample", "--beta_schedule", "scaled_linear"], UNet2DModel, "fixed_small"),
        ([*UNET, "--learned_variance", "--beta_schedule", "squaredcos_cap_v2"], UNet2DModel, "learned_range"),
        ([*DIT, "--learned_variance", "--sampler", "ddpm"], DiT, "learned_range"),
        ([*DIT, "--prediction_type", "v_prediction", "--snr_gamma", "5"], DiT, "fixed_small"),
    ],
    ids=["unet x0", "unet variance", "dit variance", "dit v"],
)
def test_pixels(flags, model, variance, tmp_path):
    pipeline = ImageDiffusionPipeline.from_pretrained(_fit(tmp_path, *flags))
    assert isinstance(pipeline.transformer, model) and pipeline.vae is None
    config = parse_config(DiffusionTrainingConfig, ["--output_dir", "run", *flags])
    scheduler = pipeline.scheduler.config
    assert (scheduler.prediction_type, scheduler.beta_schedule) == (config.prediction_type, config.beta_schedule)
    assert (scheduler.reverse_variance, scheduler.algorithm) == (variance, config.sampler)
    assert scheduler.clip_sample
    average = model.from_pretrained(tmp_path / "checkpoint-2" / "ema_transformer")
    expected = ImageDiffusionPipeline(average.eval(), pipeline.scheduler, class_names=pipeline.class_names)
    assert torch.equal(_sample(pipeline, "blue cross"), _sample(expected, "blue cross"))
    records = read_log(tmp_path)
    assert ("transformer/vb" in records[0]) == config.learned_variance
    assert "validation/judge_label" in records[-1]

    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    _sample(pipeline, num_inference_steps=3)


def test_latents_and_their_cache(vae, tmp_path):
    pipeline = ImageDiffusionPipeline.from_pretrained(_fit(tmp_path / "images", *DIT, "--vae", str(vae)))
    config = pipeline.transformer.config
    assert (config.in_channels, config.sample_size) == (4, 16) and pipeline.vae is not None
    assert not pipeline.scheduler.config.clip_sample
    assert _sample(pipeline).shape == (1, 3, 32, 32)

    flags = ["--limit", "8", "--batch_size", "4", "--resolution", "48", "--no_progress"]
    run_script("cache_latents", tmp_path / "cache", "--tokenizer", str(vae), *flags)
    final = _fit(tmp_path / "cached", *UNET, "--vae", str(vae), "--cache", str(tmp_path / "cache"))
    assert UNet2DModel.from_pretrained(final, subfolder="transformer").config.sample_size == 24


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_error_falls(prediction_type, tmp_path):
    flags = ["--max_train_steps", "40", "--logging_steps", "1", "--batch_size", "16", "--limit", "64"]
    flags += ["--resolution", "16", "--patch_size", "2", "--width", "32", "--num_layers", "1", "--num_heads", "2"]
    flags += ["--model", "dit", "--prediction_type", prediction_type, "--num_validation_images", "1"]
    _fit(tmp_path, *flags, "--learning_rate", "5e-3", "--checkpointing_steps", "0")
    errors = logged(tmp_path, "transformer/mse")
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])


@pytest.mark.parametrize("method", ["unet", "dit"])
def test_resume_is_bit_exact(method, vae, tmp_path):
    """With what each adds: dropout; the posterior's sample, the bound and weights. Both drop classes."""
    flags = {
        "unet": [*UNET, "--dropout", "0.3"],
        "dit": [*DIT, "--vae", str(vae), "--learned_variance", "--snr_gamma", "5"],
    }[method]
    flags += ["--class_dropout", "0.5", "--max_train_steps", "4", "--checkpointing_steps", "2"]
    _fit(tmp_path, *flags)
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    _fit(tmp_path, *flags, "--resume", "latest")
    assert_equal_checkpoints(tmp_path / "kept", tmp_path / "checkpoint-4")


def _task(*arguments: str):
    config = parse_config(DiffusionTrainingConfig, ["--output_dir", "run", *DIT, *arguments])
    task = load_script(SCRIPT).DiffusionTask(config, None, 4, list("abcd"))
    for parameter in task.modules["transformer"].parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator(3))
    return task


def _step(task, labels: torch.Tensor | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=generator(2), dtype=torch.uint8)
    batch = {"pixels": pixels, "label": torch.arange(4) if labels is None else labels}
    ((_, loss, log),) = task.training_step(batch, Draws(0, 0, 0, torch.device("cpu")))
    return loss, log


def test_weights_and_bound_are_in_the_loss():
    loss, log = _step(_task())
    assert loss == log["mse"] and "vb" not in log
    for gamma, equal in (("1e9", True), ("5", False)):  # without a limit the weights of the noise are 1
        weighted, same = _step(_task("--snr_gamma", gamma))
        assert torch.isclose(weighted, loss) == equal and same["mse"] == log["mse"]
    loss, log = _step(_task("--learned_variance"))
    torch.testing.assert_close(loss, log["mse"] + log["vb"])


def test_only_classes_that_are_kept_are_learned():
    for dropout, labels, learned in (
        ("1", torch.arange(4), [False, False, False, False, True]),
        ("0", torch.tensor([0, -1, 1, -1]), [True, True, False, False, True]),  # images without a class
    ):
        task = _task("--class_dropout", dropout, "--guidance_scale", "1")
        _step(task, labels)[0].backward()
        gradient = task.modules["transformer"].class_embed.weight.grad
        assert (gradient.abs().amax(dim=1) > 0).tolist() == learned


ERRORS = {
    "model": (["--model", "uvit"], "choose one of unet, dit"),
    "prediction": (["--prediction_type", "score"], "choose one of epsilon, v_prediction, sample"),
    "steps": (["--num_inference_steps", "1001"], "between 1 and the 1000 of --num_train_timesteps"),
    "gamma": (["--snr_gamma", "0"], "--snr_gamma is 0.0; it must be positive"),
    "dropout": (["--class_dropout", "-1"], "--class_dropout is -1.0"),
    "guidance": (["--class_dropout", "0"], "--guidance_scale must be 1"),
    "levels": (["--attention_levels", "3"], "--channels has the levels 0 to 2"),
    "norms": (["--channels", "16,36,64"], "--channels has [36]; they must be multiples of --norm_num_groups, 8"),
    "heads": (["--channels", "16,48,64", "--attention_levels", "1"], "multiples of --attention_head_dim, 32"),
    "cache": (["--cache", "x"], "give --vae too"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_settings_that_cannot_work_end_the_program(case, capsys):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        parse_config(DiffusionTrainingConfig, ["--output_dir", "run", *arguments])
    assert message in capsys.readouterr().err


def test_misfits_are_errors(tmp_path):
    with pytest.raises(ValueError, match="has 2 levels, which samples of side 33 cannot be halved for"):
        _fit(tmp_path, *UNET, "--resolution", "33")
    with pytest.raises(ValueError, match="Betas must satisfy"):
        _fit(tmp_path, *UNET, "--beta_end", "2")


@pytest.mark.parametrize(
    ("name", "batch", "parameters"),
    [
        ("dit_xl2_256", 256, 674.8e6),
        ("dit_xl2_512", 256, 674.8e6),
        ("unet_adm_64", 2048, 295.9e6),
        ("unet_adm_256", 256, 553.8e6),
    ],
)
def test_recipes_are_the_published_ones(name, batch, parameters):
    file = EXAMPLES / "configs" / f"{name}.yaml"
    config = parse_config(DiffusionTrainingConfig, ["--config", str(file), "--output_dir", "run"])
    processes = int(file.read_text().split("--num_processes ")[1].split()[0])
    assert config.batch_size * config.gradient_accumulation_steps * processes == batch
    sample = (3, config.resolution) if config.vae is None else (4, config.resolution // 8)
    with torch.device("meta"):
        model = diffusion_network(config, *sample, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=1e-3)
