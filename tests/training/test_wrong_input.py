"""What newcomers type: every wrong input ends a script with one line that names it, and nothing is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hfgen.training import CacheConfig, Trainer, build_cache, parse_config
from hfgen.training.output_folder import check_output_folder
from hfgen.training.run_folder import check_run_folder
from support.example_runs import TINY, load_script
from support.instances import build_model

ZOO = Path(__file__).resolve().parents[2] / "zoo"
VAR, TITOK = str(ZOO / "var-shapes" / "vq_model"), str(ZOO / "titok-shapes" / "vq_model")
TRANSFUSION, FLOW = str(ZOO / "transfusion-shapes"), str(ZOO / "flow-shapes")
VAE = str(ZOO / "transfusion-shapes" / "vae")


def fail(name: str, capsys, *arguments: str | Path) -> str:
    """The line with which a script ends that gets these arguments."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        load_script(name).main()
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


WRONG = {
    "VAR, large images": ("train_var", ["--tokenizer", VAR, "--resolution", "64"], "give --resolution 32"),
    "VAR, odd images": ("train_var", ["--tokenizer", VAR, "--resolution", "33"], "give --resolution 32"),
    "VAR, codes of large images": (
        "train_var", ["--tokenizer", VAR, "--resolution", "64", "--cache_codes"], "give --resolution 32",
    ),
    "MaskGIT, large images": ("train_maskgit", ["--tokenizer", TITOK, "--resolution", "64"], "give --resolution 32"),
    "VQVAE, odd images": ("train_multiscale_vqvae", ["--resolution", "33"], "give --resolution 32, or choose a mul"),
    "VQVAE, large images": (
        "train_multiscale_vqvae", ["--resolution", "48"], "give --resolution 32, or end --patch_nums with 12",
    ),
    "VQVAE, few scales": ("train_multiscale_vqvae", ["--patch_nums", "1,2"], "--patch_nums ends with 2 and the 3"),
    "VQVAE, few levels": ("train_multiscale_vqvae", ["--channel_multipliers", "1,2"], "divide images by 2: give"),
    "decoder, odd images": (
        "finetune_noise_robust_decoder", ["--vae", VAE, "--resolution", "33"], "a multiple of the factor of --vae, 4",
    ),
    "VAR without layers": ("train_var", ["--tokenizer", VAR, "--num_layers", "0"], "--num_layers is 0; it must be at"),
    "VAR without heads": ("train_var", ["--tokenizer", VAR, "--num_attention_heads", "0"], "--num_attention_heads is"),
    "TiTok without tokens": ("train_titok", ["--num_latent_tokens", "0"], "--num_latent_tokens is 0; it must be at"),
    "TiTok without codes": ("train_titok", ["--num_codes", "0"], "--num_codes is 0; it must be at least 1"),
    "TiTok, two parts": ("train_titok", ["--encoder", "64,4"], "--encoder is 64,4; expected three numbers, width"),
    "TiTok without heads": ("train_titok", ["--decoder", "64,4,0"], "--decoder is 64,4,0; each of its numbers must"),
    "U-Net without blocks": ("train_diffusion", ["--layers_per_block", "0"], "--layers_per_block is 0; it must be"),
    "VQGAN without channels": ("train_maskgit_vqgan", ["--latent_channels", "0"], "--latent_channels is 0; it must"),
    "MaskGIT without layers": ("train_maskgit", ["--tokenizer", TITOK, "--num_layers", "0"], "--num_layers is 0; it"),
    "MeanFlow without layers": ("train_mean_flow", ["--num_layers", "0"], "--num_layers is 0; it must be at least 1"),
    "few words": ("train_text_tokenizer", ["--vocab_size", "3"], "--vocab_size is 3; it must be at least 5"),
    "a transformer for latents": (
        "cache_latents", ["--tokenizer", TRANSFUSION, "--subfolder", "transformer"],
        "transformer is a TransfusionTransformer, which does not encode images",
    ),
    "a pipeline for latents": ("cache_latents", ["--tokenizer", TRANSFUSION], f"give a part of it, {VAE}."),
    "a continuous tokenizer for MaskGIT": (
        "train_maskgit", ["--tokenizer", VAE], "is a continuous AutoencoderKL.*cache_latents.py.*a TiTok",
    ),
    "a continuous tokenizer for codes": ("cache_tokens", ["--tokenizer", VAE], "is a continuous AutoencoderKL"),
    "a pipeline for codes": ("cache_tokens", ["--tokenizer", str(ZOO / "titok-shapes")], f"a part of it, {TITOK}."),
    "a pipeline for MaskGIT": ("train_maskgit", ["--tokenizer", str(ZOO / "titok-shapes")], f"a part of it, {TITOK}."),
    "a TiTok for VAR": ("train_var", ["--tokenizer", TITOK], "vq_model is a TiTok; give .* of a MultiScaleVQVAE"),
    "a VQVAE as VQGAN": (
        "train_titok", ["--stage", "1", "--vqgan", VAR], "--vqgan .*model is a MultiScaleVQVAE; give .*MaskGITVQGAN",
    ),
    "a tokenizer as output of stage 1": (
        "train_titok", ["--stage", "2", "--vqgan", VAR, "--stage1", VAR], "give .* of a MaskGITVQGAN",
    ),
    "8 bits without torchao": ("train_mean_flow", [*TINY, "--optimizer", "adamw8bit"], "error: .*torchao"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_wrong_input_is_one_line(tmp_path, capsys, monkeypatch, case):
    name, arguments, message = case
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    line = fail(name, capsys, *arguments, "--output_dir", tmp_path / "run", "--no_progress")
    assert line.startswith(f"{name}.py: error: ")
    assert re.search(message, line), line
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", str(ZOO)], f"model_index.json of '{ZOO}'"),
        (["--pipeline", FLOW], "is a RectifiedFlowPipeline; expected a VARPipeline"),
        (["--images-per-class", "0"], "--images-per-class is 0; it must be at least 1"),
        (["--output", __file__], "is a file; expected a folder"),
    ],
)
def test_the_demo_with_a_wrong_input(arguments, message, capsys):
    line = fail("demo", capsys, *arguments)
    assert re.match("demo.py: error: .*" + re.escape(message), line), line


# ------------------------------------------------------------------------------------------------------ output folders


def _fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("log.jsonl", "notes.txt"),  # a run in which somebody writes
        ("checkpoint-2/training_state.pt", "notes.txt"),
        ("train.log", "slurm-1.out", ".lock", "nfs.lock"),  # what launches leave
        ("training_config.json", "validation/cache_check.png"),  # interrupted before the first line of the log
        ("cache/cache.json", "cache/codes.npy"),
        ("straight/pairs.json",),
        ("final/config.json", "checkpoint-4.tmp/x"),
    ],
)
def test_folders_for_a_run(tmp_path, names):
    check_run_folder(_fill(tmp_path, *names))
    check_run_folder(tmp_path / "new" / "folder")


@pytest.mark.parametrize(
    "names",
    [
        ("cat/1.png", "dog/1.png"),
        ("cache.json", "codes.npy", "labels.npy"),  # a cache
        ("var-shapes/model_index.json",),
        ("model_index.json", "vq_model/config.json"),
        ("run1/log.jsonl", "run2/log.jsonl"),  # the parent of runs
        ("notes.txt", "checkpoint-2/notes.txt"),  # no complete checkpoint
    ],
)
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume": "latest"}])
def test_a_run_leaves_other_folders_alone(tmp_path, toy, names, changes):
    _fill(tmp_path, *names)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{tmp_path} holds no run of hfgen but other things .*{names[0][:3]}"):
        Trainer(toy.config(tmp_path, **changes))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_is_no_folder(tmp_path, toy, below):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ValueError, match=f"folder of a run: {file} is a file"):
        Trainer(toy.config(file / below))
    with pytest.raises(ValueError, match=f"folder of a cache: {file} is a file"):
        check_output_folder(file / below, "cache", marks=(), parts=())


def _cache(folder: Path, **changes) -> CacheConfig:
    values = {"tokenizer": "tiny", "resolution": 8, "batch_size": 4, "limit": 6, "progress": False}
    return CacheConfig(output_dir=str(folder), **(values | changes))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("names", [("cat/1.png",), ("labels.npy", "notes.txt"), ("training_config.json",)])
def test_a_cache_leaves_other_folders_alone(tmp_path, names, overwrite):
    _fill(tmp_path, *names)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no cache of hfgen"):
        build_cache(_cache(tmp_path, overwrite=overwrite), build_model("MultiScaleVQVAE"))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()) == [
        Path(name) for name in names
    ]


@pytest.mark.parametrize("names", [(), ("codes.npy", "unfinished/plan.json", "job.log")])
def test_a_cache_begins_in_an_empty_folder_or_where_a_start_was_interrupted(tmp_path, names):
    _fill(tmp_path, *names)
    build_cache(_cache(tmp_path), build_model("MultiScaleVQVAE"))
    assert (tmp_path / "cache.json").is_file()


def test_cache_scripts_offer_no_flags_of_streams(capsys):
    with pytest.raises(SystemExit):
        parse_config(CacheConfig, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--shuffle_buffer" not in text and "--num_classes" not in text and "no tar files" in text
