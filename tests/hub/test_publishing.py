"""The command line, training runs and official weights against a Hub whose network can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.hub_server import HubServer
from support.instances import build_model

TESTS = Path(__file__).resolve().parents[1]
TRAIN = [
    "--max_train_steps", "3", "--checkpointing_steps", "1", "--batch_size", "4", "--limit", "8", "--num_layers", "1",
    "--num_attention_heads", "1", "--attention_head_dim", "8", "--num_validation_images", "2", "--no_progress",
]  # fmt: skip


@pytest.fixture(scope="module")
def hub_and_report(tmp_path_factory):
    """A published training run, then everything that ``support.publishing_client`` does."""
    folder = tmp_path_factory.mktemp("hub")
    # Images of 32 pixels, as the captioned shapes are.
    build_model("MultiScaleVQVAE", channel_multipliers=(1, 1, 1, 2)).save_pretrained(folder / "tokenizer")
    with HubServer() as hub:
        train = [
            "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "examples/train_var.py",
            "--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / "run"), *TRAIN,
            "--push_to_hub", "--push_checkpoints", "--hub_model_id", "tester/run", "--hub_private",
            "--hub_license", "apache-2.0",
        ]  # fmt: skip
        for name, arguments in (("train", train), ("client", ["-m", "support.publishing_client", str(folder)])):
            environment = {
                **os.environ,
                **hub.environment(str(folder / f"home-{name}")),
                "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
                "ACCELERATE_USE_CPU": "true",
                "OMP_NUM_THREADS": "1",
            }
            result = subprocess.run(
                [sys.executable, *arguments], cwd=TESTS.parent, env=environment, capture_output=True, text=True,
                timeout=300,
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
        report = json.loads((folder / "report.json").read_text())
    return hub, report, folder


def section(name):
    @pytest.fixture
    def read(hub_and_report):
        return hub_and_report[1][name]

    return read


cli, network, training, official = (section(name) for name in ("cli", "network", "training", "official"))


def files_of(hub_and_report, repo, revision="main"):
    return hub_and_report[0].repositories[repo].files(revision)


def test_a_training_run_is_published(hub_and_report):
    hub, report, folder = hub_and_report
    assert report["trained"] == "VARPipeline"
    files, repository = files_of(hub_and_report, "tester/run"), hub.repositories["tester/run"]
    final = {path.relative_to(folder / "run" / "final").as_posix() for path in (folder / "run" / "final").rglob("*")}
    assert {"README.md", "samples.png", "training_curve.png", "training_config.json"} <= final & files.keys()
    # The newest checkpoint alone, complete, with what its files hold; the links of the upload are gone.
    assert {path.partition("/")[0] for path in files if path.startswith("checkpoint-")} == {"checkpoint-3"}
    checkpoint = folder / "run" / "checkpoint-3"
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        assert files[f"checkpoint-3/{path.relative_to(checkpoint).as_posix()}"] == path.read_bytes()
    assert not (folder / "run" / "hub-uploads").exists()
    assert repository.private


def test_the_card_of_a_run_tells_how_it_was_made(hub_and_report):
    _, _, folder = hub_and_report
    card = files_of(hub_and_report, "tester/run")["README.md"].decode()
    head = card.split("---")[1]
    for line in ("library_name: hfgen", "license: apache-2.0", "pipeline_tag: text-to-image", "- var"):
        assert line in head
    assert 'VARPipeline.from_pretrained("tester/run")' in card and 'class_labels="red circle"' in card
    assert "accelerate launch examples/train_var.py" in card and "--num_layers 1" in card
    assert "--tokenizer" in card and str(folder) not in card
    assert "| judge" in card and "after step 3" in card and "2404.02905" in card
    assert str(folder) not in files_of(hub_and_report, "tester/run")["training_config.json"].decode()


def test_push_and_pull(hub_and_report, cli):
    hub, _, folder = hub_and_report
    repository = hub.repositories["tester/cli"]
    assert cli["push"]["code"] == cli["half"]["code"] == cli["pull"]["code"] == 0
    assert repository.private and "tester/cli: http" in cli["push"]["out"]
    half = repository.files("half")
    assert "vq_model/diffusion_pytorch_model.fp16.safetensors" in half and cli["half dtype"] == "torch.float16"
    assert half["pipeline.py"] == b"from hfgen import VARPipeline\n"
    assert {"main", "half", "refs/pr/1"} == repository.refs.keys() and "discussions/1" in cli["pull request"]["out"]
    assert cli["offline"] == "VARPipeline"
    for path in (folder / "pipeline").rglob("*.safetensors"):
        assert (folder / "pulled" / path.relative_to(folder / "pipeline")).read_bytes() == path.read_bytes()


def test_an_existing_card_is_kept(cli):
    assert cli["card after push"] == "# mine\n" and cli["kept card"]["code"] == 0
    assert cli["card after replacement"] == "# local\n"


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("nothing", "neither a saved model or pipeline"),
        ("foreign", "may not write to 'somebody/else'"),
        ("wrong token", "hf auth login"),
        ("missing", "tester/missing"),
    ],
)
def test_errors_say_what_to_do(cli, case, told):
    assert cli[case]["code"] == 2 and told in cli[case]["err"] and "Traceback" not in cli[case]["err"]


def test_an_interrupted_upload_is_repeated(hub_and_report, network):
    assert network["interrupted"]["code"] == 0
    assert "diffusion_pytorch_model.safetensors" in files_of(hub_and_report, "tester/interrupted")


def test_an_upload_that_never_works_names_the_command_that_finishes_it(hub_and_report, network):
    assert network["never"]["code"] == 2 and "3 attempts" in network["never"]["err"]
    assert network["finished"]["code"] == 0, network["finished"]["err"]
    assert "diffusion_pytorch_model.safetensors" in files_of(hub_and_report, "tester/never")


def test_a_corrupted_download_is_found(network):
    assert network["corrupted"]["code"] == 2 and "is damaged: its sha256" in network["corrupted"]["err"]
    assert network["deleted"] and network["repaired"]["code"] == 0


def test_a_run_survives_a_network_that_does_not(hub_and_report, training):
    assert training["loads"] == "VARPipeline"
    assert {"checkpoint-1", "checkpoint-2", "final", "log.jsonl"} <= set(training["files"])
    assert "hub-uploads" not in training["files"]
    folder = hub_and_report[2] / "cut"
    assert "checkpoint-2 was not uploaded" in training["log"]
    last = training["log"].splitlines()[-1]
    assert "training is complete" in last and last.endswith(f"hfgen push {folder / 'final'} tester/cut")


def test_a_wrong_token_is_found_before_training(training):
    assert "hf auth login" in training["refused"] and training["not started"]


def test_official_weights_by_name(official):
    assert official["convert"]["code"] == 0 and "licence of the official weights: MIT" in official["convert"]["out"]
    assert "license: mit" in official["card"] and "tester/release" in official["card"]
    assert official["equal"] and official["second"] == "torch.float16" and official["model"] == "MultiScaleVQVAE"
    assert any(name.startswith("tiny-vae-") for name in official["cache"])
    assert not [name for name in official["cache"] if name.endswith(".tmp")]


def test_official_weights_are_checked(official):
    assert official["corrupted"]["code"] == 2 and "vae.pth is damaged" in official["corrupted"]["err"]
    assert "var.pth is damaged: its sha256" in official["wrong sum"]["err"]
    assert "Did you mean 'tiny'" in official["unknown"]["err"]
    assert "tiny-vae" in official["table"]["out"] and "MIT" in official["table"]["out"]
