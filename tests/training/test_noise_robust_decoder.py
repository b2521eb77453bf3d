"""The script that fine-tunes decoders on noisy latents: what it changes, measures, saves and refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from hfgen import NoisyLatentQuantizer
from hfgen.evaluation.reconstruction import psnr
from hfgen.training import parse_config
from hfgen.training.noise_curve import noise_table, psnr_against_noise
from hfgen.training.noise_robust_decoder import NoiseRobustTrainingConfig
from hfgen.training.noisy_latents import add_noise
from support.example_runs import TINY, assert_equal_checkpoints, read_log, run_script
from support.small_autoencoder import save_autoencoder

SCRIPT = "finetune_noise_robust_decoder"
SMALL = ["--resolution", "16", "--sigma", "0.5", "--curve_sigmas", "0,0.5"]
CODES = ["--codebook_size", "8"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def _fit(folder: Path, vae: Path, *arguments: str) -> Path:
    return run_script(SCRIPT, folder, *TINY, *SMALL, "--vae", str(vae), *arguments)


@pytest.fixture(scope="module")
def tuned(vae, tmp_path_factory) -> Path:
    flags = ["--max_train_steps", "40", "--batch_size", "8", "--learning_rate", "1e-2", "--ema_decay", "0"]
    return _fit(tmp_path_factory.mktemp("tuned"), vae, *flags, "--checkpointing_steps", "0")


def test_without_matplotlib_the_curve_is_a_table(vae, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.is_matplotlib_available", lambda: False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it is an error
    _fit(tmp_path, vae)
    assert "| 0.5 |" in (tmp_path / "psnr_against_noise.md").read_text()
    assert not list(tmp_path.glob("validation/*psnr*"))


def test_only_the_decoder_changes(vae, tuned):
    before, after = AutoencoderKL.from_pretrained(vae), AutoencoderKL.from_pretrained(tuned)
    assert type(after) is AutoencoderKL and not (tuned / "quantizer").exists()
    changed = {
        name.partition(".")[0]
        for name, value in before.state_dict().items()
        if not torch.equal(value, after.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert (after.config.scaling_factor, after.config.shift_factor) == (0.5, 0.1)


def test_noisy_latents_are_decoded_better_and_that_is_reported(vae, tuned):
    record = read_log(tuned.parent)[-1]
    for sigma in ("0", "0.5"):
        assert record[f"validation/psnr_after_{sigma}"] > record[f"validation/psnr_before_{sigma}"] + 0.5
    table = (tuned.parent / "psnr_against_noise.md").read_text().splitlines()
    assert table[0] == "| sigma | before | after |"
    assert table[-1] == "| 0.5 | {:.2f} | {:.2f} |".format(
        *(record[f"validation/psnr_{name}_0.5"] for name in ("before", "after"))
    )
    assert (tuned.parent / "validation" / "step-0000040_psnr_against_noise.png").is_file()


def test_codes_are_learned_and_decoded(vae, tmp_path):
    flags = [*CODES, "--adversarial_weight", "0.5", "--discriminator_channels", "4", "--checkpointing_steps", "1"]
    final = _fit(tmp_path / "codes", vae, *flags, "--checkpoints_total_limit", "none")
    quantizer = NoisyLatentQuantizer.from_pretrained(final / "quantizer")
    assert (quantizer.codebook_size, quantizer.config.sigma) == (8, 0.5)
    first, last = (
        NoisyLatentQuantizer.from_pretrained(tmp_path / "codes" / f"checkpoint-{step}" / "quantizer")
        for step in (1, 2)
    )
    assert not torch.equal(first.codebook.embedding.weight, last.codebook.embedding.weight)
    assert torch.equal(quantizer.codebook.embedding.weight, last.codebook.embedding.weight)
    names = {name for record in read_log(tmp_path / "codes") for name in record}
    assert {"quantizer/loss", "discriminator/real", "validation/psnr_after_codes_0.5"} <= names
    # Learned codes are taken as they are, with their noise.
    again = _fit(tmp_path / "again", vae, "--quantizer", str(final / "quantizer"), "--sigma", "0.1")
    kept = NoisyLatentQuantizer.from_pretrained(again / "quantizer")
    assert torch.equal(kept.codebook.embedding.weight, quantizer.codebook.embedding.weight)
    assert '"sigma": 0.5' in (tmp_path / "again" / "training_config.json").read_text()


def test_resume_is_bit_exact(vae, tmp_path):
    flags = [*CODES, "--quantizer_type", "linear", "--max_train_steps", "4", "--checkpointing_steps", "2"]
    _fit(tmp_path, vae, *flags)
    (tmp_path / "checkpoint-4").rename(tmp_path / "kept")
    _fit(tmp_path, vae, *flags, "--resume", "latest")
    assert_equal_checkpoints(tmp_path / "kept", tmp_path / "checkpoint-4")


def test_curve_has_the_same_noise_at_every_level():
    latents = torch.zeros(3, 3, 4, 4)
    settings = {"noise_type": "additive", "batch_size": 2, "seed": 0}
    curve = psnr_against_noise(lambda noisy: noisy, latents, latents, [0.001, 0.01, 0.1], **settings)
    assert curve[0] - curve[1] == pytest.approx(20, abs=1e-3) == curve[1] - curve[2]
    expected = psnr(torch.full((1, 3, 4, 4), 0.01), torch.zeros(1, 3, 4, 4)).item()
    assert curve[1] == pytest.approx(expected, abs=1.5)
    assert noise_table([0.5], {"before": [1.234], "after": [5]}).splitlines()[-1] == "| 0.5 | 1.23 | 5.00 |"


@pytest.mark.parametrize("noise_type", ["additive", "variance_preserving"])
def test_noise_is_that_of_the_quantizer(noise_type):
    quantizer = NoisyLatentQuantizer(num_codes=4, latent_channels=3, sigma=0.6, noise_type=noise_type)
    latents, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(add_noise(latents, noise, 0.6, noise_type), quantizer.add_noise(latents, noise))


ERRORS = {
    "sigma": (["--sigma", "2", "--noise_type", "variance_preserving"], "--sigma is 2.0"),
    "curve": (["--curve_sigmas", "0,-1"], "--curve_sigmas is (0.0, -1.0)"),
    "codes": ([*CODES, "--quantizer", "x"], "give only one of them"),
    "perceptual": (["--perceptual_weight", "1"], "needs --perceptual_source"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_settings_that_cannot_work_end_the_program(case, capsys):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        parse_config(NoiseRobustTrainingConfig, ["--output_dir", "run", "--vae", "vae", *arguments])
    assert message in capsys.readouterr().err


def test_other_models_are_no_autoencoder(tmp_path):
    NoisyLatentQuantizer(num_codes=4, latent_channels=3).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="is a NoisyLatentQuantizer; expected diffusers' AutoencoderKL"):
        _fit(tmp_path / "run", tmp_path / "vae")
