"""A user of the Hub who pushes, pulls, trains and takes official weights while the network misbehaves.

``python -m support.publishing_client FOLDER`` runs in a process of its own, with the environment of a ``HubServer``,
and writes what happened to FOLDER/report.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from huggingface_hub import HfApi

import hfgen
from hfgen import publishing
from hfgen.cli import main
from hfgen.conversion import ReleasedCheckpoint, ReleasedFile, to_original, var
from support.hub_server import set_faults
from support.instances import PATCH_NUMS, build_model, build_pipeline

URL = os.environ["HF_ENDPOINT"]
LFS_UPLOAD, COMMIT = "PUT /lfs/", "POST /api/models/.*/commit/"


def hfgen_command(*arguments: object) -> dict[str, object]:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def push_and_pull(folder: Path) -> dict[str, object]:
    saved = folder / "pipeline"
    build_pipeline("VARPipeline", class_names=list("abcde")).save_pretrained(saved)
    report = {
        "push": hfgen_command("push", saved, "tester/cli", "--private"),
        "again": hfgen_command("push", saved, "tester/cli"),
        "half": hfgen_command(
            "push", saved, "tester/cli", "--revision", "half", "--dtype", "float16", "--variant", "fp16",
            "--with-pipeline-file",
        ),
        "pull request": hfgen_command("push", saved / "vq_model", "tester/cli", "--create-pr", "--message", "Mine"),
        "pull": hfgen_command("pull", "tester/cli", "--output", folder / "pulled"),
        "cache": hfgen_command("pull", "tester/cli"),
        "nothing": hfgen_command("push", folder / "no-such", "tester/other"),
        "foreign": hfgen_command("push", saved, "somebody/else"),
        "missing": hfgen_command("pull", "tester/missing"),
    }  # fmt: skip
    half = hfgen.AutoPipeline.from_pretrained("tester/cli", revision="half", variant="fp16", dtype=torch.float16)
    report["half dtype"] = str(half.transformer.dtype)
    report["offline"] = type(hfgen.AutoPipeline.from_pretrained("tester/cli", local_files_only=True)).__name__
    with mock.patch.dict(os.environ, {"HF_TOKEN": "hf_wrong"}):
        report["wrong token"] = hfgen_command("push", saved, "tester/cli")

    # A card that somebody edited on the Hub stays, unless it is to be replaced.
    HfApi().upload_file(path_or_fileobj=b"# mine\n", path_in_repo="README.md", repo_id="tester/cli")
    (saved / "README.md").write_text("# local\n")
    report["kept card"] = hfgen_command("push", saved, "tester/cli")
    report["card after push"] = Path(HfApi().hf_hub_download("tester/cli", "README.md")).read_text()
    report["replaced card"] = hfgen_command("push", saved, "tester/cli", "--replace-card")
    report["card after replacement"] = Path(HfApi().hf_hub_download("tester/cli", "README.md")).read_text()
    return report


def bad_network(folder: Path) -> dict[str, object]:
    saved = folder / "other"
    build_model("VARTransformer").save_pretrained(saved)
    set_faults(URL, drops={LFS_UPLOAD: 1, COMMIT: 1})
    report = {"interrupted": hfgen_command("push", saved, "tester/interrupted")}
    set_faults(URL, drops={COMMIT: 99})
    report["never"] = hfgen_command("push", saved, "tester/never")
    set_faults(URL)
    report["finished"] = hfgen_command(*report["never"]["err"].rpartition("Try again later: hfgen ")[2].split())

    set_faults(URL, corrupted=["diffusion_pytorch_model.safetensors"])
    report["corrupted"] = hfgen_command("pull", "tester/never", "--output", folder / "bad")
    report["deleted"] = not (folder / "bad" / "diffusion_pytorch_model.safetensors").exists()
    set_faults(URL)
    report["repaired"] = hfgen_command("pull", "tester/never", "--output", folder / "bad")
    return report


def training(folder: Path) -> dict[str, object]:
    """A run whose uploads all fail, and one whose token is wrong."""
    script = str(Path(__file__).resolve().parents[2] / "examples" / "train_var.py")
    arguments = [
        script, "--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / "cut"), "--debug",
        "--max_train_steps", "2", "--checkpointing_steps", "1", "--batch_size", "4", "--limit", "8",
        "--num_layers", "1", "--num_attention_heads", "1", "--attention_head_dim", "8",
        "--num_validation_images", "2", "--no_progress", "--push_to_hub", "--push_checkpoints",
    ]  # fmt: skip
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("hfgen").addHandler(handler)
    set_faults(URL, drops={COMMIT: 999})
    with mock.patch.object(sys, "argv", arguments):
        runpy.run_path(script, run_name="__main__")
    set_faults(URL)
    report = {"log": log.getvalue(), "files": sorted(path.name for path in (folder / "cut").iterdir())}
    report["loads"] = type(hfgen.AutoPipeline.from_pretrained(folder / "cut" / "final")).__name__

    arguments[4] = str(folder / "refused")
    with mock.patch.object(sys, "argv", arguments), mock.patch.dict(os.environ, {"HF_TOKEN": "hf_wrong"}):
        try:
            runpy.run_path(script, run_name="__main__")
        except PermissionError as error:
            report["refused"] = str(error)
    report["not started"] = not (folder / "refused").exists()
    return report


def official(folder: Path) -> dict[str, object]:
    """Files of the official layout in a repository of their authors, and a row for them in the table."""
    vq_model = build_model("MultiScaleVQVAE", base_channels=32, norm_num_groups=32)  # the official groups
    pipeline = hfgen.VARPipeline(vq_model=vq_model, transformer=build_model("VARTransformer"))
    (folder / "release").mkdir()
    torch.save(to_original(pipeline.transformer), folder / "release" / "var.pth")
    torch.save(to_original(pipeline.vq_model), folder / "release" / "vae.pth")
    HfApi().create_repo("tester/release")
    HfApi().upload_folder(repo_id="tester/release", folder_path=folder / "release")
    vae = ReleasedFile("vae", "vae.pth", 1, original_config={"v_patch_nums": PATCH_NUMS})
    files = (ReleasedFile("transformer", "var.pth", 1), vae)
    rows = (
        ReleasedCheckpoint("tiny", "var", "tester/release", files, "MIT"),
        ReleasedCheckpoint("tiny-vae", "var", "tester/release", (vae,), "MIT"),
        ReleasedCheckpoint(
            "tiny-wrong", "var", "tester/release", (ReleasedFile("transformer", "var.pth", 1, "0" * 64),), "MIT"
        ),
    )
    with mock.patch.object(var, "RELEASED", rows):
        set_faults(URL, corrupted=["vae.pth"])
        report = {"corrupted": hfgen_command("convert", "tiny", "--output", folder / "converted")}
        set_faults(URL)
        report["convert"] = hfgen_command("convert", "tiny", "--output", folder / "converted", "--dtype", "float16")
        report["card"] = (folder / "converted" / "README.md").read_text()
        first = hfgen.from_official("tiny")
        set_faults(URL, drops={".": 999})  # from here on nothing may ask the Hub
        second = hfgen.from_official("tiny", dtype=torch.float16)
        set_faults(URL)
        report["equal"] = all(
            torch.equal(value, model.state_dict()[name])
            for key in ("vq_model", "transformer")
            for model in (getattr(first, key),)
            for name, value in getattr(pipeline, key).state_dict().items()
        )
        report["second"] = str(second.dtype)
        report["model"] = type(hfgen.from_official("tiny-vae", cache_dir=folder / "cache")).__name__
        report["cache"] = [path.name for path in (folder / "cache" / "hfgen" / "official").iterdir()]
        report["wrong sum"] = hfgen_command("convert", "tiny-wrong", "--output", folder / "wrong")
        report["unknown"] = hfgen_command("convert", "tinny", "--output", folder / "wrong")
        report["table"] = hfgen_command("systems", "--weights")
    return report


def run(folder: Path) -> None:
    stages = {"cli": push_and_pull, "network": bad_network, "training": training, "official": official}
    report = {name: stage(folder) for name, stage in stages.items()}
    report["trained"] = type(hfgen.AutoPipeline.from_pretrained("tester/run")).__name__
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    publishing.RETRY_WAITS = (0.01, 0.02)
    with mock.patch("hfgen.training.history.History.plot"):  # a second per picture
        run(Path(sys.argv[1]))
