"""Trainings with the scripts of examples/, each once: what is there with the same settings is not repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfgen.auto import AutoModel
from hfgen.models.modeling import HFGenModel
from hfgen.training.history import write_text

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Training:
    """A run of an example script.

    Attributes:
        name: of its folder; may have a parent folder, as in ``"seed-0/flow"``.
        script: in ``examples/``, without ``.py``.
        settings: its flags, without ``--output_dir``; None for a flag without a value.
        after: trainings whose results it reads; it is repeated when one of them changes.
        result: what its folder holds once it is done.
    """

    name: str
    script: str
    settings: Mapping[str, object]
    after: tuple[Training, ...] = ()
    result: str = "final"

    def arguments(self) -> list[str]:
        flags = ([f"--{name}", *([] if value is None else [str(value)])] for name, value in self.settings.items())
        return [word for flag in flags for word in flag]

    def key(self) -> list:
        """All that decides the result, for JSON."""
        return [self.script, self.arguments(), [each.key() for each in self.after]]


@dataclass(frozen=True)
class Runs:
    """The folder of all trainings.

    Attributes:
        folder: holds for each training ``NAME/final``, or another result, the output ``NAME.log``, and once it is done
            ``NAME.json``; what was measured of it is in ``NAME-measures.json``.
        launcher: words before the command, such as ``("nice",)``.
        extra: more arguments for every script, such as those of a trial.
        threads: CPU threads of a training.
    """

    folder: Path
    launcher: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    threads: int = 1

    def final(self, training: Training) -> Path:
        return self.folder / training.name / training.result

    def train(self, training: Training) -> float:
        """CPU seconds that the training took, now or in an earlier call with the same settings.

        Raises:
            RuntimeError: the script failed; the message has the end of its output.
        """
        done = self.folder / f"{training.name}.json"
        key = [training.key(), list(self.extra)]
        if done.exists() and self.final(training).exists():
            record = json.loads(done.read_text(encoding="utf-8"))
            if record["key"] == key:
                return record["cpu_seconds"]
        done.unlink(missing_ok=True)
        done.parent.mkdir(parents=True, exist_ok=True)
        output = ["--output_dir", str(self.folder / training.name), "--overwrite", "--no_progress"]
        before, start = os.times(), time.perf_counter()
        arguments = [*output, *training.arguments(), *self.extra]
        launch(self.launcher, training.script, arguments, self.log(training), self.threads)
        after = os.times()
        cpu = (after.children_user - before.children_user) + (after.children_system - before.children_system)
        record = {"key": key, "cpu_seconds": cpu, "wall_seconds": time.perf_counter() - start}
        write_text(done, json.dumps(record, indent=1) + "\n")
        return cpu

    def measured(self, training: Training, settings: Mapping[str, object], measure: Callable[[], dict]) -> dict:
        """What ``measure`` says of the result of a training, kept in ``NAME-measures.json`` with both settings."""
        path = self.folder / f"{training.name}-measures.json"
        wanted = json.loads(json.dumps({"training": training.key(), "measuring": settings}))
        if path.is_file():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if {name: kept[name] for name in wanted} == wanted:
                return kept["measures"]
        measures = measure()
        write_text(path, json.dumps(wanted | {"measures": measures}, indent=1) + "\n")
        return measures

    def log(self, training: Training) -> Path:
        return self.folder / f"{training.name}.log"

    def load(self, training: Training) -> HFGenModel:
        return AutoModel.from_pretrained(self.final(training)).eval()


def launch(launcher: Sequence[str], script: str, arguments: Sequence[str], log: Path, threads: int = 1) -> None:
    """Run an example in a process of its own, with its output in ``log``.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    command = [*launcher, sys.executable, str(ROOT / "examples" / f"{script}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with open(log, "w", encoding="utf-8") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if status:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)}\nended with status {status}; the end of {log}:\n{end}")
