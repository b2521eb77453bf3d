"""The example scripts run under accelerate launch, and the recipes in examples/configs fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hfgen.training import parse_config
from hfgen.training.history import History
from support.example_runs import EXAMPLES, TINY, assert_equal_checkpoints, load_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(EXAMPLES.glob("train_*.py"))
RECIPES = (
    {"multiscale_vqvae_paper": "train_multiscale_vqvae", "maskgit_vqgan_paper": "train_maskgit_vqgan"}
    | {f"var_{size}": "train_var" for size in ("d16", "d20", "d24", "d30", "d36")}
    | {f"titok_{stage}": "train_titok" for stage in ("l32_stage1", "l32_stage2", "single_vq", "single_kl")}
    | {f"maskgit_{name}": "train_maskgit" for name in ("imagenet256", "titok_l32", "titok_s128")}
    | {f"mean_flow_{size}": "train_mean_flow" for size in ("b4", "l2")}
    | dict.fromkeys(("dit_xl2_256", "dit_xl2_512", "unet_adm_64", "unet_adm_256"), "train_diffusion")
    | {f"sit_{size}": "train_rectified_flow" for size in ("b2", "xl2")}
    | dict.fromkeys(("autoencoder_kl_f8", "transfusion_vae"), "train_autoencoder_kl")
    | {f"transfusion_{size}": "train_transfusion" for size in ("0.16b", "0.37b", "0.76b", "1.4b", "7b", "7b_unet")}
)
# Flags that a recipe cannot give, because they name what the user has.
OWN = {
    "train_var": ["--tokenizer", "tokenizer"],
    "train_maskgit": ["--tokenizer", "tokenizer"],
    "train_autoencoder_kl": ["--perceptual_source", "weights"],
    "train_transfusion": ["--vae", "vae", "--text_dataset", "texts"],
    "train_titok": ["--vqgan", "vqgan", "--stage1", "stage1", "--perceptual_source", "weights"],
}
SMALL_TOKENIZER = ["--base_channels", "8", "--norm_num_groups", "4", "--layers_per_block", "1", "--num_codes", "16"]


def _launch(script: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", str(EXAMPLES / f"{script}.py"), *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    adversarial = ["--adversarial_weight", "0.5", "--discriminator_start", "1", "--discriminator_channels", "4"]
    _launch("train_multiscale_vqvae", "--output_dir", str(folder), *TINY, *SMALL_TOKENIZER, *adversarial)
    return folder


def test_tokenizer_script(tokenizer_run):
    from hfgen import MultiScaleVQVAE

    tokenizer = MultiScaleVQVAE.from_pretrained(tokenizer_run / "final")
    assert tokenizer.config.num_codes == 16
    with torch.no_grad():
        assert tokenizer(torch.zeros(1, 3, 32, 32)).sample.shape == (1, 3, 32, 32)
    assert (tokenizer_run / "training_curve.png").is_file()
    assert (tokenizer_run / "validation" / "step-0000002_reconstructions.png").is_file()
    log = (tokenizer_run / "log.jsonl").read_text()
    for quantity in ("tokenizer/l1", "tokenizer/commitment", "tokenizer/adaptive_weight", "discriminator/loss"):
        assert f'"{quantity}"' in log
    assert '"validation/psnr"' in log


def test_var_script(tokenizer_run, tmp_path):
    from hfgen import VARPipeline

    arguments = ["--tokenizer", str(tokenizer_run / "final"), "--output_dir", str(tmp_path), "--cache_codes"]
    model = ["--num_layers", "1", "--attention_head_dim", "8", "--final_dtype", "float16"]
    _launch("train_var", *arguments, *TINY, *model)
    weights = load_file(tmp_path / "final" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    pipeline = VARPipeline.from_pretrained(tmp_path / "final")
    assert pipeline.transformer.config.num_classes == 24
    images = pipeline("red circle", top_k=1, guidance_scale=1.0, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)
    log = (tmp_path / "log.jsonl").read_text()
    for quantity in ("transformer/accuracy", "transformer/loss_8x8", "validation/judge_label"):
        assert f'"{quantity}"' in log
    assert (tmp_path / "validation" / "step-0000002_samples.png").is_file()


def _fit(module, arguments: list[str]) -> None:
    sys.argv = ["script", "--debug", *arguments]
    module.main()


def test_scripts_resume_bit_exactly(tokenizer_run, tmp_path, monkeypatch):
    """With what each method adds: dropout, code restarts and a discriminator; label drop and stochastic depth."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(History, "plot", lambda self: None)
    methods = {
        "train_multiscale_vqvae": [
            *SMALL_TOKENIZER, "--dropout", "0.2", "--restart_after", "1",
            "--adversarial_weight", "0.5", "--discriminator_channels", "4",
        ],
        "train_var": [
            "--tokenizer", str(tokenizer_run / "final"), "--num_layers", "2", "--attention_head_dim", "8",
            "--drop_path", "0.3", "--class_dropout", "0.5",
        ],
    }  # fmt: skip
    for script, flags in methods.items():
        folder, kept = tmp_path / script, tmp_path / f"{script}_checkpoint-4"
        arguments = [
            "--output_dir",
            str(folder),
            *TINY,
            "--max_train_steps",
            "4",
            "--checkpointing_steps",
            "2",
            *flags,
        ]
        module = load_script(script)
        _fit(module, arguments)
        (folder / "checkpoint-4").rename(kept)
        _fit(module, [*arguments, "--resume", "latest"])
        assert_equal_checkpoints(kept, folder / "checkpoint-4")


def test_every_recipe_belongs_to_a_script():
    assert {path.stem for path in (EXAMPLES / "configs").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_parses(recipe):
    config_class = load_script(RECIPES[recipe]).Config
    required = ["--output_dir", "run", *OWN.get(RECIPES[recipe], [])]
    # The images of Transfusion were licensed for it.
    data = ["--dataset", "IMAGES"] if recipe.startswith("transfusion") else []
    config = parse_config(config_class, ["--config", str(EXAMPLES / "configs" / f"{recipe}.yaml"), *required, *data])
    assert config.dataset == ("IMAGES" if data else "ILSVRC/imagenet-1k")
    assert config.warmup_steps < config.max_train_steps


@pytest.mark.parametrize(
    ("size", "peak", "batch", "epochs", "parameters"),
    [
        ("d16", 3e-4, 768, 200, 310.28e6),
        ("d20", 3e-4, 768, 250, 600.9e6),
        ("d24", 2.4e-4, 768, 350, 1033.4e6),
        ("d30", 3.2e-4, 1024, 350, 2010.0e6),
        ("d36", 2.4e-4, 768, 350, 2353.9e6),
    ],
)
def test_var_recipe_is_the_published_one(size, peak, batch, epochs, parameters):
    from hfgen import VARTransformer
    from hfgen.models.generators.var import PATCH_NUMS_256, PATCH_NUMS_512

    file = EXAMPLES / "configs" / f"var_{size}.yaml"
    config = parse_config(
        load_script("train_var").Config, ["--config", str(file), "--output_dir", "run", "--tokenizer", "tokenizer"]
    )
    processes = int(file.read_text().split("--num_processes ")[1].split()[0])
    assert config.learning_rate == pytest.approx(peak)
    assert config.batch_size * config.gradient_accumulation_steps * processes == batch
    assert config.max_train_steps == epochs * (1281167 // batch)
    assert config.warmup_steps == pytest.approx(config.max_train_steps / 50, rel=1e-3)
    with torch.device("meta"):
        model = VARTransformer(
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            shared_modulation=config.shared_modulation,
            patch_nums=PATCH_NUMS_512 if config.resolution == 512 else PATCH_NUMS_256,
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_is_short_and_its_help_works(script, capsys):
    assert len(script.read_text().splitlines()) <= 150
    with pytest.raises(SystemExit) as caught:
        parse_config(load_script(script.stem).Config, ["--help"])
    assert caught.value.code == 0
    assert "--output_dir" in capsys.readouterr().out


def test_var_without_a_tokenizer_is_an_error(capsys):
    with pytest.raises(SystemExit):
        parse_config(load_script("train_var").Config, ["--output_dir", "run"])
    assert "Missing --tokenizer" in capsys.readouterr().err


def test_perceptual_loss_without_weights_is_an_error(tmp_path):
    module = load_script("train_multiscale_vqvae")
    config = parse_config(module.Config, ["--output_dir", str(tmp_path), "--perceptual_weight", "1", *SMALL_TOKENIZER])
    with pytest.raises(ValueError, match="--perceptual_weight needs --perceptual_source"):
        module.MultiScaleVQVAETask(config)


def _image_folder(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(index))
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{index}.png")
    (folder / "dog" / "broken.png").write_bytes(b"not an image")
    return folder


def test_own_images(tmp_path, monkeypatch):
    """A folder per class; the unreadable file is counted, and with --strict it stops the run."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(History, "plot", lambda self: None)
    module, images = load_script("train_multiscale_vqvae"), _image_folder(tmp_path / "images")
    arguments = [
        "--output_dir", str(tmp_path / "run"), "--dataset", str(images), "--crop", "random", "--flip",
        "--resize_ratio", "1.125", "--max_train_steps", "4", "--batch_size", "4", "--no_progress", *SMALL_TOKENIZER,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="No validation images.*--validation_split; 'train' shows"):
        _fit(module, arguments)
    missing = [str(tmp_path / "nothing") if value == str(images) else value for value in arguments]
    with pytest.raises(ValueError, match="nothing' is not a folder: check the path") as error:
        _fit(module, missing)
    assert "--validation_split" not in str(error.value)
    _fit(module, [*arguments, "--validation_split", "train"])
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[0]["skipped_images"] >= 1
    with pytest.raises(ValueError, match="broken.png"):
        _fit(module, [*arguments, "--validation_split", "train", "--strict", "--overwrite"])


def test_cached_codes_need_data_without_augmentation(tokenizer_run, tmp_path, monkeypatch):
    module = load_script("train_var")
    arguments = ["--output_dir", str(tmp_path), "--tokenizer", str(tokenizer_run / "final")]
    monkeypatch.setattr(
        sys, "argv", ["train_var.py", "--debug", *arguments, "--cache_codes", "--crop", "random", *TINY]
    )
    with pytest.raises(ValueError, match="--cache_codes keeps one version"):
        module.main()
