"""Uploads of a run: what is sent, in which order, and which errors are worth another attempt."""

import logging
import shutil
import threading

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from hfgen import publishing
from hfgen.cli import PULL_EXAMPLES, PUSH_EXAMPLES, build_parser
from hfgen.training import TrainingConfig
from hfgen.training import publishing as run_publishing
from hfgen.training.publishing import Publisher


class Hub:
    """In place of the upload: remembers what each one found, and can be held."""

    def __init__(self) -> None:
        self.go, self.started = threading.Event(), threading.Event()
        self.go.set()
        self.uploads: list[tuple[str, list[str]]] = []

    def publish(self, folder, repo_id, **arguments) -> None:
        self.started.set()
        assert self.go.wait(10)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self.uploads.append((repo_id, files))


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(run_publishing, "publish", hub.publish)
    monkeypatch.setattr(run_publishing, "prepare_repository", lambda name, **arguments: f"user/{name}")
    return hub


@pytest.fixture
def publisher(hub, tmp_path):
    return Publisher(TrainingConfig(output_dir=str(tmp_path / "run"), push_to_hub=True, push_checkpoints=True))


def checkpoint(tmp_path, step):
    folder = tmp_path / "run" / f"checkpoint-{step}"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text(str(step))
    return folder


def test_a_checkpoint_may_be_deleted_while_it_is_uploaded(hub, publisher, tmp_path):
    hub.go.clear()
    folder = checkpoint(tmp_path, 1)
    publisher.push_checkpoint(folder)
    assert hub.started.wait(10)
    shutil.rmtree(folder)
    hub.go.set()
    (tmp_path / "run" / "final").mkdir()
    assert publisher.finish(tmp_path / "run" / "final")
    assert hub.uploads == [("user/run", ["checkpoint-1/model/weights"]), ("user/run", [])]
    assert not publisher.uploads.exists()


def test_of_waiting_checkpoints_only_the_newest_is_uploaded(hub, publisher, tmp_path):
    hub.go.clear()
    publisher.push_checkpoint(checkpoint(tmp_path, 1))
    assert hub.started.wait(10)
    for step in (2, 3, 4):
        publisher.push_checkpoint(checkpoint(tmp_path, step))
    assert sorted(path.name for path in publisher.uploads.iterdir()) == ["checkpoint-1", "checkpoint-4"]
    hub.go.set()
    publisher.finish(tmp_path / "run")
    assert [files for _, files in hub.uploads[:2]] == [["checkpoint-1/model/weights"], ["checkpoint-4/model/weights"]]


def test_a_stopped_run_does_not_wait_for_a_dead_network(hub, publisher, tmp_path, monkeypatch):
    monkeypatch.setattr(run_publishing, "_STOPPING_SECONDS", 0.05)
    hub.go.clear()
    publisher.push_checkpoint(checkpoint(tmp_path, 1))
    assert not publisher.finish(None) and not hub.uploads
    hub.go.set()


def test_no_error_of_an_upload_ends_the_run(hub, publisher, tmp_path, monkeypatch, caplog):
    def fail(folder, repo_id, **arguments):
        raise PermissionError("the token was revoked")

    monkeypatch.setattr(run_publishing, "publish", fail)
    publisher.push_checkpoint(checkpoint(tmp_path, 1))
    with caplog.at_level(logging.ERROR):
        assert not publisher.finish(tmp_path / "run" / "final")
    assert len(caplog.messages) == 2 and all("revoked" in message for message in caplog.messages)
    assert caplog.messages[0].endswith(f"hfgen push {tmp_path}/run/checkpoint-1 user/run --path-in-repo checkpoint-1")
    assert caplog.messages[1].endswith(f"hfgen push {tmp_path}/run/final user/run")


def test_checkpoints_are_only_pushed_with_the_result(tmp_path):
    with pytest.raises(ValueError, match="give --push_to_hub too"):
        TrainingConfig(output_dir=str(tmp_path), push_checkpoints=True)


class Response:
    headers, request = {}, None

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


def http_error(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(f"status {status}", response=Response(status))


def test_which_errors_are_tried_again():
    wrapped = RuntimeError("Error while uploading a file")
    wrapped.__cause__ = http_error(403)
    transient = [http_error(status) for status in (408, 412, 429, 500, 503)]
    transient += [HTTPError("disconnected"), ConnectionResetError(), TimeoutError(), RuntimeError("xet")]
    final = [http_error(status) for status in (400, 401, 403, 404)]
    final += [ValueError(), FileNotFoundError(), OfflineModeIsEnabled(), wrapped]
    assert [publishing._is_transient(error) for error in transient] == [True] * len(transient)
    assert [publishing._is_transient(error) for error in final] == [False] * len(final)


@pytest.mark.parametrize("line", [line for line in (PUSH_EXAMPLES + PULL_EXAMPLES).splitlines() if " hfgen " in line])
def test_the_examples_of_the_help_parse(line):
    assert build_parser().parse_args(line.split()[1:]).command in ("push", "pull")
