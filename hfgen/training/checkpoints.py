"""Checkpoint folders that are either complete or ignored.

Everything is written into ``checkpoint-N.tmp``, flushed to the disk and renamed to ``checkpoint-N``. A process that
dies before the rename leaves only a ``.tmp`` folder, which the next save removes. A folder that is replaced or deleted
is first renamed, too, so that at no moment half of one has the name of a checkpoint.

    checkpoint-N/<component>/       config.json and weights, loadable with from_pretrained
    checkpoint-N/ema_<component>/   the averaged weights, likewise
    checkpoint-N/training_state.pt  step, optimizers, gradient scaler, log window
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

STATE_FILE = "training_state.pt"
TEMPORARY_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".old.tmp"
_NAME = re.compile(r"checkpoint-(\d+)")


def _flush_to_disk(folder: Path) -> None:
    """fsync every file and folder below ``folder``, so that the rename cannot become visible before the contents."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary folder and rename it to ``target``, replacing a folder of that name.

    If anything fails, ``target`` is what it was and the temporary folder is gone.
    """
    temporary = target.with_name(target.name + TEMPORARY_SUFFIX)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        _flush_to_disk(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = target.with_name(target.name + REPLACED_SUFFIX)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    temporary.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_folder(folder: Path) -> None:
    """Delete a folder that nobody may find half deleted."""
    doomed = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def restore_replaced(output_dir: Path) -> None:
    """Give back their names to folders whose replacement was interrupted between its two renames."""
    for replaced in output_dir.glob(f"*{REPLACED_SUFFIX}"):
        target = replaced.with_name(replaced.name.removesuffix(REPLACED_SUFFIX))
        if not target.exists():
            replaced.rename(target)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        match = _NAME.fullmatch(folder.name)
        if match and (folder / STATE_FILE).is_file():
            found.append((int(match.group(1)), folder))
    return sorted(found)


def resolve_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The folder that ``--resume`` means; None when it is ``latest`` and there is no complete checkpoint."""
    if resume == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1][1] if checkpoints else None
    folder = Path(resume)
    if not (folder / STATE_FILE).is_file():
        available = ", ".join(str(path) for _, path in list_checkpoints(output_dir)) or "none"
        raise ValueError(
            f"--resume {resume}: not a complete checkpoint (it has no {STATE_FILE}). Complete ones: {available}. "
            "Use --resume latest for the newest."
        )
    return folder


def save_checkpoint(
    output_dir: Path,
    step: int,
    components: Mapping[str, nn.Module],
    state: Mapping[str, Any],
    *,
    total_limit: int | None = None,
) -> Path:
    """Write ``checkpoint-<step>``; older checkpoints beyond ``total_limit`` are deleted only after that succeeded."""
    for leftover in output_dir.glob(f"checkpoint-*{TEMPORARY_SUFFIX}"):
        logger.warning("Removing %s, left by a save that did not finish.", leftover)
        shutil.rmtree(leftover)

    def write(folder: Path) -> None:
        for name, module in components.items():
            module.save_pretrained(folder / name)
        torch.save({**state, "step": step}, folder / STATE_FILE)

    target = output_dir / f"checkpoint-{step}"
    try:
        write_folder(target, write)
    except OSError as error:
        previous = list_checkpoints(output_dir)
        remaining = (
            f"{previous[-1][1]} is intact; continue from it with --resume latest" if previous else "none exists"
        )
        raise OSError(
            error.errno,
            f"Could not write {target} ({error}). Free space or check the disk. The previous one: {remaining}.",
        ) from error
    if total_limit is not None:
        for _, folder in list_checkpoints(output_dir)[:-total_limit]:
            _remove_folder(folder)
    return target


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load into ``module``, in place, what its ``save_pretrained`` wrote."""
    module.load_state_dict(type(module).from_pretrained(folder).state_dict())


def load_checkpoint(
    folder: Path,
    components: Mapping[str, nn.Module],
    *,
    load: Callable[[nn.Module, Path], None] = load_weights,
) -> dict[str, Any]:
    """Load weights into ``components`` in place, by ``load(module, folder)``, and return the training state."""
    for name, module in components.items():
        path = folder / name
        if not path.is_dir():
            present = ", ".join(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
            raise ValueError(
                f"{folder} has no {name!r}, only {present}. It was written with other settings (for example another "
                "--ema_decay); resume with those of its run, recorded in training_config.json."
            )
        load(module, path)
    path = folder / STATE_FILE
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values and was therefore not read: {reason} "
            "Resume from another checkpoint."
        ) from error
