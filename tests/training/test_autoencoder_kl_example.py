"""The training script of the KL autoencoder: its loss, its scale, what it saves, resumes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from hfgen.data.transforms import to_pixels
from hfgen.training import parse_config, validation_images
from hfgen.training.autoencoder_kl import AutoencoderKLTrainingConfig, measure_scaling_factor, new_autoencoder
from support.example_runs import EXAMPLES, TINY, assert_equal_checkpoints, logged, read_log, run_script

SMALL = ["--resolution", "16", "--channels", "8,8", "--norm_num_groups", "4", "--num_scaling_images", "16"]
GAN = ["--adversarial_weight", "0.5", "--discriminator_channels", "4", "--discriminator_start", "1"]


def _fit(folder: Path, *arguments: str) -> Path:
    return run_script("train_autoencoder_kl", folder, *TINY, *SMALL, *arguments)


def _config(*arguments: str) -> AutoencoderKLTrainingConfig:
    return parse_config(AutoencoderKLTrainingConfig, ["--output_dir", "run", *SMALL, *arguments])


@pytest.fixture(scope="module")
def final(tmp_path_factory) -> Path:
    return _fit(tmp_path_factory.mktemp("vae"), *GAN)


def test_result_is_the_average_with_latents_of_unit_scale(final):
    vae = AutoencoderKL.from_pretrained(final)
    assert type(vae) is AutoencoderKL
    average = AutoencoderKL.from_pretrained(final.parent / "checkpoint-2" / "ema_autoencoder").state_dict()
    assert all(torch.equal(value, average[name]) for name, value in vae.state_dict().items())
    pixels = to_pixels(validation_images(_config("--num_validation_images", "16")))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        latents = torch.cat([posterior.sample(torch.Generator().manual_seed(seed)) for seed in range(20)])
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.02)
    log = {name for record in read_log(final.parent) for name in record}
    assert {"autoencoder/kl", "autoencoder/adaptive_weight", "discriminator/real", "validation/psnr"} <= log


def test_flow_takes_the_result(final, tmp_path):
    flags = ["--vae", str(final), "--width", "16", "--num_heads", "2", "--num_layers", "1"]
    run_script("train_rectified_flow", tmp_path, *TINY, *flags, "--num_inference_steps", "1")
    assert (tmp_path / "final" / "vae" / "config.json").is_file()


def test_loss_is_the_published_one_per_value(tmp_path):
    _fit(tmp_path, "--kl_weight", "2", "--reconstruction", "l2", "--max_train_steps", "1", "--logging_steps", "1")
    record = read_log(tmp_path)[0]
    expected = record["autoencoder/l2"] + 2 * record["autoencoder/kl"] / (3 * 16 * 16)
    assert record["autoencoder/loss"] == pytest.approx(expected, rel=1e-5)
    assert record["autoencoder/kl"] > 1


def test_training_pass_is_that_of_diffusers():
    model = new_autoencoder(_config()).eval()
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        sample, moments = model(pixels, generator=torch.Generator().manual_seed(1))
        plain = model.plain(2.0)
        expected = plain(pixels, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample
        assert torch.equal(sample, expected)
        assert torch.equal(moments, plain.encode(pixels).latent_dist.parameters)
    assert plain.config.scaling_factor == 2.0


def test_scale_counts_mean_and_variance():
    model = new_autoencoder(_config())
    with torch.no_grad():
        model.quant_conv.weight.zero_()
        model.quant_conv.bias[:4] = torch.tensor([1.0, -1.0, 1.0, -1.0])  # variance 1 between channels
        model.quant_conv.bias[4:] = torch.log(torch.tensor(3.0))  # and 3 of the posterior
    assert measure_scaling_factor(model, _config()) == pytest.approx(0.5, rel=1e-5)


def test_resume_is_bit_exact(tmp_path):
    flags = [*GAN, "--max_train_steps", "4", "--checkpointing_steps", "2"]
    _fit(tmp_path, *flags)
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    _fit(tmp_path, *flags, "--resume", "latest")
    assert_equal_checkpoints(tmp_path / "kept", tmp_path / "checkpoint-4")


def test_loss_falls(tmp_path):
    flags = [
        "--max_train_steps",
        "40",
        "--logging_steps",
        "1",
        "--learning_rate",
        "3e-3",
        "--checkpointing_steps",
        "0",
    ]
    _fit(tmp_path, *flags)
    losses = logged(tmp_path, "autoencoder/loss")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


ERRORS = {
    "groups": (["--channels", "8,10"], "must be multiples of --norm_num_groups, 4"),
    "levels": (["--resolution", "18", "--channels", "8,8,8"], "--resolution 18 cannot be halved 2 times"),
    "perceptual": (["--perceptual_weight", "1"], "--perceptual_weight needs --perceptual_source"),
    "channels": (["--latent_channels", "0"], "--latent_channels is 0"),
    "error": (["--reconstruction", "huber"], "choose one of l1, l2"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_settings_that_cannot_work_end_the_program(case, capsys):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        _config(*arguments)
    assert message in capsys.readouterr().err


def test_recipe_is_the_published_autoencoder():
    file = EXAMPLES / "configs" / "autoencoder_kl_f8.yaml"
    arguments = ["--config", str(file), "--output_dir", "run", "--perceptual_source", "weights"]
    config = parse_config(AutoencoderKLTrainingConfig, arguments)
    with torch.device("meta"):
        model = new_autoencoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863  # of Stable Diffusion
    assert (config.kl_weight, config.adversarial_weight, config.discriminator_start) == (1e-6, 0.5, 50001)
