"""The training script of MeanFlow: what it learns from, saves, resumes and refuses."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfgen import DiT, MeanFlowPipeline
from hfgen.counters import generator
from hfgen.data.flow_pairs import INFO_FILE, PairsInfo, pairs_file, write_pairs_file
from hfgen.training import Draws, parse_config
from hfgen.training.mean_flow import MeanFlowTrainingConfig, questionable_settings
from support import mean_flow_runs
from support.example_runs import EXAMPLES, TINY, assert_equal_checkpoints, load_script, logged, read_log, run_script
from support.small_autoencoder import save_autoencoder
from support.torchrun import ROOT, torchrun

SCRIPT = "train_mean_flow"
SMALL = ["--width", "16", "--num_heads", "2", "--num_layers", "2", "--patch_size", "8"]


def _fit(folder: Path, *arguments: str) -> Path:
    return run_script(SCRIPT, folder, *TINY, *SMALL, *arguments)


def _sample(pipeline: MeanFlowPipeline, label: int | str = 0) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(label, generator=generator(1), output_type="pt")
    assert output.nfe == 1
    return output.images


def _pairs(folder: Path, shape: tuple[int, int, int] = (3, 32, 32), first_label: int = 0) -> Path:
    """Eight pairs whose samples are their noise, mirrored and darker."""
    info = PairsInfo(num_pairs=8, pairs_per_file=8, shape=shape, has_captions=False, source={"weights": "of a test"})
    noise = torch.randn(8, *shape, generator=generator(5))
    folder.mkdir(parents=True)
    (folder / INFO_FILE).write_text(info.to_json())
    labels = first_label + torch.arange(8)
    write_pairs_file(pairs_file(folder, info, info.blocks()[0]), noise, 0.3 * noise.flip(-1) - 0.2, labels, None)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def test_pixels(tmp_path):
    final = _fit(tmp_path)
    pipeline = MeanFlowPipeline.from_pretrained(final)
    assert pipeline.vae is None and pipeline.transformer.config.sample_size == 32
    assert pipeline.class_names[0] == "red circle"
    average = DiT.from_pretrained(tmp_path / "checkpoint-2" / "ema_transformer")
    expected = MeanFlowPipeline(average, class_names=pipeline.class_names)
    assert torch.equal(_sample(pipeline, "blue cross"), _sample(expected, "blue cross"))
    last = read_log(tmp_path)
    assert {"transformer/mse", "transformer/velocity_mse"} <= last[0].keys()
    assert "validation/judge_label" in last[-1]
    assert last[0]["transformer/loss"] == pytest.approx(1, abs=1e-3)  # the adaptive weight


def test_latents_and_their_cache(vae, tmp_path):
    pipeline = MeanFlowPipeline.from_pretrained(_fit(tmp_path / "images", "--vae", str(vae)))
    config = pipeline.transformer.config
    assert (config.in_channels, config.sample_size) == (4, 16) and pipeline.vae is not None
    assert _sample(pipeline).shape == (1, 3, 32, 32)

    flags = ["--limit", "8", "--batch_size", "4", "--resolution", "48", "--no_progress"]
    run_script("cache_latents", tmp_path / "cache", "--tokenizer", str(vae), *flags)
    final = _fit(tmp_path / "cached", "--vae", str(vae), "--cache", str(tmp_path / "cache"))
    assert DiT.from_pretrained(final, subfolder="transformer").config.sample_size == 24


def test_error_falls(tmp_path):
    """With patches that fit through the width; the loss itself stays at 1."""
    flags = ["--max_train_steps", "60", "--logging_steps", "1", "--batch_size", "16", "--limit", "64"]
    flags += ["--resolution", "16", "--patch_size", "2", "--width", "32", "--num_layers", "1"]
    _fit(tmp_path, *flags, "--learning_rate", "5e-3", "--checkpointing_steps", "0", "--kappa", "0")
    for name in ("mse", "velocity_mse"):
        errors = logged(tmp_path, f"transformer/{name}")
        assert sum(errors[-10:]) < 0.6 * sum(errors[:10]), name


@pytest.mark.parametrize("method", ["latents", "trajectory of pairs"])
def test_resume_is_bit_exact(method, vae, tmp_path):
    flags = {
        "latents": ["--vae", str(vae), "--class_dropout", "0.4", "--equal_share", "0.25"],
        "trajectory of pairs": ["--loss", "trajectory_matching", "--trajectory_steps", "2", "--pairs"],
    }[method]
    flags += [str(_pairs(tmp_path / "pairs"))] if method != "latents" else []
    flags += ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    _fit(tmp_path / "run", *flags)
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "kept")
    _fit(tmp_path / "run", *flags, "--resume", "latest")
    assert_equal_checkpoints(tmp_path / "kept", tmp_path / "run" / "checkpoint-4")


def test_two_processes_train_as_one(tmp_path):
    """Gradients are averaged although the derivative passes by the wrapper: equal to one process, two micro-steps."""
    mean_flow_runs.main(tmp_path / "one", 2)
    torchrun(ROOT / "tests" / "support" / "mean_flow_runs.py", tmp_path / "two")
    for method in mean_flow_runs.METHODS:
        part = Path(method, "checkpoint-4", "transformer", "diffusion_pytorch_model.safetensors")
        one, two = (load_file(tmp_path / run / part) for run in ("one", "two"))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def _task(*arguments: str, seed: int = 3):
    config = parse_config(MeanFlowTrainingConfig, ["--output_dir", "run", *SMALL, *arguments])
    task = load_script(SCRIPT).MeanFlowTask(config, None, 4, list("abcd"))
    for parameter in task.modules["transformer"].parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator(seed))
    return task


def _batch() -> dict[str, torch.Tensor]:
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=generator(2), dtype=torch.uint8)
    return {"pixels": pixels, "label": torch.arange(4)}


def _draws() -> Draws:
    return Draws(0, 0, 0, torch.device("cpu"))


def test_trajectory_is_the_one_that_is_sampled(tmp_path):
    """The loss of K steps compares the image that the pipeline makes of the same noise in K steps."""
    flags = ["--loss", "trajectory_matching", "--trajectory_steps", "3", "--class_dropout", "0", "--pairs", "pairs"]
    task = _task(*flags)
    noise, sample = (torch.randn(4, 3, 32, 32, generator=generator(seed)) for seed in (7, 8))
    batch = {"noise": noise, "sample": sample, "label": torch.arange(4)}
    ((_, loss, _),) = task.training_step(batch, _draws())
    pipeline = task.pipeline(task.modules)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([0, 1, 2, 3], latents=noise, num_inference_steps=3, output_type="latent").images
    torch.testing.assert_close(loss.detach(), (made - sample).square().mean())


def test_only_classes_that_are_kept_are_learned():
    task = _task("--class_dropout", "1")
    ((_, loss, _),) = task.training_step(_batch(), _draws())
    loss.backward()
    gradient = task.modules["transformer"].class_embed.weight.grad
    assert gradient[4].abs().max() > 0 and gradient[:4].abs().max() == 0


def test_images_without_a_class_train_the_unconditional_one():
    task = _task("--class_dropout", "0", "--kappa", "0")
    ((_, loss, _),) = task.training_step({**_batch(), "label": torch.tensor([0, -1, 1, -1])}, _draws())
    loss.backward()
    gradient = task.modules["transformer"].class_embed.weight.grad
    assert (gradient.abs().amax(dim=1) > 0).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(
    "changes", [["--kappa", "0.5"], ["--omega", "2"], ["--guidance_interval", "0.9,1", "--kappa", "0.5"]]
)
def test_guidance_settings_reach_the_target(changes):
    plain, guided = _task("--kappa", "0", "--class_dropout", "0.1"), _task("--class_dropout", "0.1", *changes)
    errors = [next(task.training_step(_batch(), _draws()))[2]["mse"] for task in (plain, guided)]
    assert (errors[0] == errors[1]).item() == ("--guidance_interval" in changes)


def test_collapse_has_its_warning(tmp_path, caplog):
    config = parse_config(MeanFlowTrainingConfig, ["--output_dir", "run", "--loss", "trajectory_matching"])
    assert questionable_settings(replace(config, pairs="pairs")) == []
    assert questionable_settings(replace(config, loss="mean_flow")) == []
    (message,) = questionable_settings(replace(config, pairs="pairs", trajectory_steps=4))
    assert "in the 4 steps of --trajectory_steps, not in the 1" in message
    with caplog.at_level(logging.WARNING):
        _fit(tmp_path, "--loss", "trajectory_matching")
    assert "collapse to one blurred image" in caplog.text


ERRORS = {
    "loss": (["--loss", "mean"], "choose one of mean_flow, trajectory_matching"),
    "density": (["--time_density", "mode"], "choose one of logit_normal, uniform"),
    "steps": (["--trajectory_steps", "0"], "--trajectory_steps is 0; it must be at least 1"),
    "share": (["--equal_share", "1.5"], "--equal_share is 1.5; it must be between 0 and 1"),
    "kappa": (["--kappa", "1"], "expected above 0 and in [0, 1)"),
    "interval": (["--guidance_interval", "0.8,0"], "expected two times in [0, 1] such as 0,0.8"),
    "weight": (["--norm_eps", "0"], "they must be positive"),
    "no null class": (["--class_dropout", "0"], "give --omega 1 --kappa 0"),
    "cache": (["--cache", "x"], "give --vae too"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_settings_that_cannot_work_end_the_program(case, capsys):
    arguments, message = ERRORS[case]
    with pytest.raises(SystemExit):
        parse_config(MeanFlowTrainingConfig, ["--output_dir", "run", *arguments])
    assert message in capsys.readouterr().err


def test_misfits_are_errors(vae, tmp_path):
    with pytest.raises(ValueError, match="multiple of patch_size=5"):
        _fit(tmp_path, "--patch_size", "5")
    with pytest.raises(ValueError, match="multiple of the factor of --vae, 2; got 33"):
        _fit(tmp_path, "--vae", str(vae), "--resolution", "33")
    with pytest.raises(ValueError, match=r"samples of shape \(4, 16, 16\), this run of \(3, 32, 32\)"):
        _fit(tmp_path, "--pairs", str(_pairs(tmp_path / "other", (4, 16, 16))))
    with pytest.raises(ValueError, match="has no classes"):
        _fit(tmp_path, "--pairs", str(_pairs(tmp_path / "unlabelled", first_label=-1)))


@pytest.mark.parametrize(("name", "preset", "scale"), [("b4", "MeanFlow-B/4", 2.0), ("l2", "L/2", 2.5)])
def test_recipes_are_the_published_ones(name, preset, scale):
    file = EXAMPLES / "configs" / f"mean_flow_{name}.yaml"
    config = parse_config(MeanFlowTrainingConfig, ["--config", str(file), "--output_dir", "run"])
    processes = int(file.read_text().split("--num_processes ")[1].split()[0])
    assert config.batch_size * config.gradient_accumulation_steps * processes == 256
    assert config.max_train_steps == 240 * (1281167 // 256)
    assert config.omega / (1 - config.kappa) == pytest.approx(scale)
    for size in ("patch_size", "num_layers", "width", "num_heads"):
        assert getattr(config, size) == DiT.presets[preset][size], size
