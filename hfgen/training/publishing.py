"""A run on the Hub: the card of its result, and uploads that neither stop the training nor lose anything."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import shlex
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import hfgen
from hfgen import publishing
from hfgen.cards import PLACEHOLDER, portable, write_run_card
from hfgen.publishing import prepare_repository, publish, push_command
from hfgen.training.config import TrainingConfig
from hfgen.training.task import Task

logger = logging.getLogger(__name__)

UPLOADS_FOLDER = "hub-uploads"
# What does not belong to the recipe.
_NOT_IN_COMMAND = ("output_dir", "resume", "overwrite", "progress", "push_to_hub", "push_checkpoints")
_STOPPING_SECONDS = 20.0  # how long a run that was told to stop waits for an upload


class Publisher:
    """Uploads the checkpoints of a run in the background and its result at the end.

    Creating one checks the token and the rights, so that a run does not find out after days that it cannot publish.

    Args:
        config: its ``hub_*`` settings, ``push_checkpoints`` and ``output_dir``.

    Raises:
        PermissionError: no token, a wrong one, or one that may not write to the repository.
        ConnectionError: the Hub cannot be reached.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.revision = config.hub_revision
        self.repo_id = prepare_repository(
            config.hub_model_id or Path(config.output_dir).resolve().name,
            private=config.hub_private or None,
            revision=config.hub_revision,
        )
        self.push_checkpoints = config.push_checkpoints
        self.uploads = Path(config.output_dir) / UPLOADS_FOLDER
        shutil.rmtree(self.uploads, ignore_errors=True)  # of a run that was killed
        self._waiting: queue.Queue[Path | None] = queue.Queue()
        self._stop = threading.Event()
        # A daemon: a process that fails or is told to stop does not hang on a network that does not answer.
        self._thread = threading.Thread(target=self._upload_checkpoints, name="hub-uploads", daemon=True)
        logger.info("Publishing to %s.", self.repo_id)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Upload a complete checkpoint in the background; one that still waits for its turn is replaced by it.

        The repository keeps the newest checkpoint. Later deletion of ``checkpoint`` does not matter.
        """
        if not self.push_checkpoints:
            return
        snapshot = self.uploads / checkpoint.name
        # Files of a checkpoint never change, so links are as good as copies and cost nothing.
        shutil.copytree(checkpoint, snapshot / checkpoint.name, copy_function=_link_or_copy)
        try:
            shutil.rmtree(self._waiting.get_nowait())
        except queue.Empty:
            pass
        self._waiting.put(snapshot)
        if not self._thread.is_alive():
            self._thread.start()

    def finish(self, result: Path | None) -> bool:
        """Wait for the checkpoints and upload ``result``, None if the run was told to stop before its end.

        A network that fails is no error of the run: the log then names the command that finishes the upload.

        Returns:
            Whether everything was uploaded.
        """
        self._waiting.put(None)
        if self._thread.is_alive():
            if result is None:
                self._thread.join(_STOPPING_SECONDS)
            else:
                logger.info("Waiting for the upload of the last checkpoint.")
                self._thread.join()
        self._stop.set()
        if result is None:
            return False
        shutil.rmtree(self.uploads, ignore_errors=True)
        try:
            publish(
                result,
                self.repo_id,
                revision=self.revision,
                commit_message=f"Upload the result of {result.parent.name}",
                waits=publishing.RETRY_WAITS,
            )
        except Exception as error:
            command = push_command(result, self.repo_id, revision=self.revision)
            logger.error("The training is complete, its upload is not: %s. Finish it with: %s", error, command)
            return False
        logger.info("Published %s as %s.", result, self.repo_id)
        return True

    def _upload_checkpoints(self) -> None:
        while (snapshot := self._waiting.get()) is not None:
            try:
                publish(
                    snapshot,
                    self.repo_id,
                    revision=self.revision,
                    path_in_repo="",
                    commit_message=f"Upload {snapshot.name}",
                    delete_patterns=["checkpoint-*"],
                    waits=publishing.RETRY_WAITS,
                    pause=self._stop.wait,
                )
                logger.info("Uploaded %s to %s.", snapshot.name, self.repo_id)
            except Exception as error:  # whatever it is, the training goes on
                command = push_command(snapshot.parent.parent / snapshot.name, self.repo_id, revision=self.revision)
                command += f" --path-in-repo {snapshot.name}"
                logger.error("%s was not uploaded: %s. The training goes on; to upload it: %s", snapshot.name, error,
                             command)  # fmt: skip
            shutil.rmtree(snapshot, ignore_errors=True)


def make_publisher(config: TrainingConfig, accelerator: Accelerator) -> Publisher | None:
    """The publisher of the main process if the run is to be published, else None."""
    return Publisher(config) if config.push_to_hub and accelerator.is_main_process else None


def write_result(folder: Path, result: Any, task: Task, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Save what a run trained, with a card that tells how."""
    result.save_pretrained(folder)
    # The script is where the method is defined; `sys.argv` may name a launcher.
    script = Path(type(task).training_step.__code__.co_filename)
    write_run_card(
        folder,
        Path(config.output_dir),
        command=_command(script, config, accelerator.num_processes),
        environment=_environment(accelerator),
        repo_id=config.hub_model_id if config.hub_model_id and "/" in config.hub_model_id else PLACEHOLDER,
        example=f"examples/{script.name}",
        licence=config.hub_license,
    )


def _command(script: Path, config: TrainingConfig, num_processes: int) -> str:
    """The command line that repeats the run, with the settings that differ from the defaults of the script."""
    launch = "accelerate launch" + (f" --num_processes {num_processes}" if num_processes > 1 else "")
    parts = [f"{launch} {script.parent.name}/{script.name}", f"--output_dir runs/{Path(config.output_dir).name}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _NOT_IN_COMMAND or field.name.startswith("hub_") or value == field.default:
            continue
        if isinstance(value, bool):
            parts.append(f"--{field.name}" if value else f"--no_{field.name}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(portable(value))
            parts.append(f"--{field.name} {shlex.quote(text)}")
    return " \\\n  ".join(parts)


def _environment(accelerator: Accelerator) -> str:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    count = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
    return f"With hfgen {hfgen.__version__} and torch {torch.__version__}, {count} on {name}."


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
