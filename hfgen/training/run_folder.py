"""Opening the folder of a run: new, continued or overwritten."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

from hfgen.data.flow_pairs import INFO_FILE as PAIRS_FILE
from hfgen.training.checkpoints import STATE_FILE, list_checkpoints, resolve_checkpoint, restore_replaced
from hfgen.training.config import TrainingConfig
from hfgen.training.guard import BAD_BATCH_FILE
from hfgen.training.history import CURVE_FILE, LOG_FILE, write_text
from hfgen.training.output_folder import check_output_folder
from hfgen.training.streams import STREAM_FILE
from hfgen.training.trackers import TRACKERS_FOLDER

logger = logging.getLogger(__name__)

CONFIG_FILE = "training_config.json"
FINAL_FOLDER = "final"
VALIDATION_FOLDER = "validation"


# What a run may leave before it has a log: the tokens and pairs of a first start are worth keeping.
_PARTS = (
    CONFIG_FILE, CURVE_FILE, BAD_BATCH_FILE, LOG_FILE, STREAM_FILE, VALIDATION_FOLDER, TRACKERS_FOLDER, FINAL_FOLDER,
    "cache", "pairs", "checkpoint-*",
)  # fmt: skip


def check_run_folder(folder: Path) -> None:
    """Refuse to begin or continue a run in a folder that holds something else.

    Raises:
        ValueError: ``folder`` is a file, or neither empty nor that of a run.
    """
    marks = [LOG_FILE, *(f"{path.name}/{STATE_FILE}" for _, path in list_checkpoints(folder))]
    pairs = [path.parent.name for path in folder.glob(f"*/{PAIRS_FILE}")]  # --pairs may give them another name
    check_output_folder(folder, "run", marks=marks, parts=[*_PARTS, *pairs])


def open_run(config: TrainingConfig) -> Path | None:
    """Check and prepare ``config.output_dir``; return the checkpoint to continue from, or None for a new run.

    Call on the main process only.

    Raises:
        ValueError: if the folder holds a run and the config neither resumes nor overwrites it, or if it holds
            checkpoints after the one to resume.
    """
    folder = Path(config.output_dir)
    restore_replaced(folder)
    log = folder / LOG_FILE
    # An empty log is what a run leaves that failed before its first line: nothing is lost.
    holds_run = (log.exists() and log.stat().st_size > 0) or bool(list_checkpoints(folder))
    checkpoint = None
    if config.resume is not None:
        checkpoint = resolve_checkpoint(folder, config.resume)
        if checkpoint is None:
            logger.info("--resume latest: %s has no complete checkpoint, so the run starts at step 0.", folder)
        else:
            step = int(checkpoint.name.removeprefix("checkpoint-"))
            later = [path.name for number, path in list_checkpoints(folder) if number > step]
            if later:
                raise ValueError(
                    f"--resume {config.resume}: {folder} also holds the later {', '.join(later)}. Delete them to "
                    "repeat that part of the run, use --resume latest, or choose another --output_dir."
                )
    elif holds_run and not config.overwrite:
        raise ValueError(
            f"--output_dir {folder} already holds a run. Continue it with --resume latest, delete it with "
            "--overwrite, or choose another folder."
        )
    elif config.overwrite:
        _delete_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _record_config(config, folder, resumed=checkpoint is not None)
    return checkpoint


def _delete_run(folder: Path) -> None:
    """Delete what a run writes and nothing else."""
    for name in (LOG_FILE, CURVE_FILE, CONFIG_FILE, BAD_BATCH_FILE):
        (folder / name).unlink(missing_ok=True)
    for path in [*folder.glob("checkpoint-*"), folder / FINAL_FOLDER, folder / TRACKERS_FOLDER]:
        if path.is_dir():
            shutil.rmtree(path)
    for picture in (folder / VALIDATION_FOLDER).glob("step-*.png"):
        picture.unlink()


def _record_config(config: TrainingConfig, folder: Path, *, resumed: bool) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    path = folder / CONFIG_FILE
    if resumed and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in values if name != "resume" and before.get(name, values[name]) != values[name]]
        for name in changed:
            logger.warning("Resuming with --%s %s; the run had %s.", name, values[name], before[name])
    # Without the two switches that belong to one start only, the file can be given to --config.
    write_text(path, json.dumps({**values, "resume": None, "overwrite": False}, indent=2) + "\n")
