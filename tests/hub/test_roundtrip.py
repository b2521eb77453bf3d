"""Every model and pipeline goes to the Hub and comes back, through a server on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.hub_server import HubServer
from support.instances import MODELS, PIPELINES

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def hub_and_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        for stage in ("push", "pull"):
            home = folder / f"home-{stage}"  # the second process finds neither a cache nor a token of the first
            result = subprocess.run(
                [sys.executable, "-m", "support.hub_client", stage, str(folder)],
                env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", **hub.environment(str(home))},
                capture_output=True,
                text=True,
                timeout=240,
            )
            assert result.returncode == 0, result.stderr
    return hub, json.loads((folder / "report.json").read_text())


def test_diffusers_knows_the_library_before_any_class_is_imported(hub_and_report):
    assert hub_and_report[1]["registration"] == {"known": True, "lazy": True}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_come_back(name, hub_and_report):
    assert all(hub_and_report[1][name].values()), hub_and_report[1][name]


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back(name, hub_and_report):
    assert all(hub_and_report[1][name].values()), hub_and_report[1][name]


@pytest.mark.parametrize("name", MODELS)
def test_an_unchanged_push_makes_no_commit(name, hub_and_report):
    repository = hub_and_report[0].repositories[f"tester/{name}"]
    # The empty repository, the first push, the push to a folder, the branch and the pull request; not the second push.
    assert len(repository.commits) == 5
    assert set(repository.refs) == {"main", "shards", "refs/pr/1"}
    assert len([path for path in repository.files("shards") if "-of-" in path]) > 1
    card = repository.files()["README.md"].decode()
    assert "library_name: hfgen" in card and f'{name}.from_pretrained("tester/{name}")' in card
    assert repository.files("refs/pr/1")["README.md"].decode() == card  # an existing card is kept
    saved = hub_and_report[0].repositories[f"tester/{name}-saved"]
    assert saved.private and not repository.private
    assert b"library_name: hfgen" in saved.files()["README.md"]


@pytest.mark.parametrize("name", PIPELINES)
def test_repository_of_a_pipeline(name, hub_and_report):
    repository = hub_and_report[0].repositories[f"tester/{name}"]
    files = repository.commits[repository.refs["main"]]
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == name
    for component, model in PIPELINES[name].components.items():
        assert index[component] == ["hfgen", model]
        assert {f"{component}/config.json", f"{component}/diffusion_pytorch_model.safetensors"} <= files.keys()
    assert not [path for path in files if path.endswith((".py", ".bin", ".pt"))]
    assert b"library_name: hfgen" in files["README.md"]


def test_errors_say_what_went_wrong(hub_and_report):
    errors = hub_and_report[1]["errors"]
    assert errors["missing"].startswith("OSError: Could not read model_index.json of 'tester/missing'")
    assert "hfgen.AutoModel" in errors["model as pipeline"]
    assert errors["wrong token"].startswith("OSError: Could not read config.json")
