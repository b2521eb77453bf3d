"""The trainings behind docs/tokens.md: the example scripts with these settings, each once, one after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfgen.auto import AutoModel
from hfgen.models.modeling import HFGenModel
from hfgen.training.history import write_text

ROOT = Path(__file__).resolve().parent.parent
NUM_CODES = 512
SINGLE_PATCH_SIZE = 8
PROXY_PATCH_SIZE = 4  # the VQGAN's pixels per code, which stage 1 shares

COMMON = {
    "batch_size": 32,
    "lr_schedule": "cosine",
    "ema_decay": 0.995,
    "l1_weight": 0.05,
    "num_codes": NUM_CODES,
    "checkpointing_steps": 0,
    "validation_steps": 0,
    "num_validation_images": 32,
    "logging_steps": 50,
}
TITOK = COMMON | {
    "optimizer": "muon",
    "learning_rate": 1e-2,
    "adamw_ratio": 0.1,
    "latent_channels": 4,
    "codebook_update": "clustering",
    "quantizer_weight": 0.1,
}
VQGAN = COMMON | {
    "learning_rate": 2.5e-3,
    "max_grad_norm": 5,
    "entropy_weight": 0,
    "restart_after": 100,
    "quantizer_weight": 0.08,
}
PROXY_VQGAN = {"base_channels": 16, "channel_multipliers": "1,2,2"}
# Grids with nearly the parameters of a TiTok with as many tokens (the page states both).
GRIDS = {
    4: {"base_channels": 24, "channel_multipliers": "1,1,2,2,4"},
    16: {"base_channels": 24, "channel_multipliers": "1,1,3,4"},
}


@dataclass(frozen=True)
class Training:
    """A run of an example script.

    Attributes:
        name: of its folder.
        script: in ``examples/``, without ``.py``.
        settings: its flags, without ``--output_dir``.
        after: trainings whose results it reads; it is repeated when one of them changes.
    """

    name: str
    script: str
    settings: Mapping[str, object]
    after: tuple[Training, ...] = ()

    def arguments(self) -> list[str]:
        return [part for name, value in self.settings.items() for part in (f"--{name}", str(value))]

    def key(self) -> list:
        """All that decides the result, for JSON."""
        return [self.script, self.arguments(), [each.key() for each in self.after]]


@dataclass(frozen=True)
class Runs:
    """The folder of all trainings.

    Attributes:
        folder: holds for each training ``NAME/final``, the output ``NAME.log``, and once it is done ``NAME.json``.
        launcher: words before the command, such as ``("nice",)``.
        extra: more arguments for every script, such as those of a trial.
    """

    folder: Path
    launcher: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def final(self, training: Training) -> Path:
        return self.folder / training.name / "final"

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
        self.folder.mkdir(parents=True, exist_ok=True)
        output = ["--output_dir", str(self.folder / training.name), "--overwrite", "--no_progress"]
        before, start = os.times(), time.perf_counter()
        launch(self.launcher, training.script, [*output, *training.arguments(), *self.extra], self.log(training))
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        record = {"key": key, "cpu_seconds": cpu, "wall_seconds": time.perf_counter() - start}
        write_text(done, json.dumps(record, indent=1) + "\n")
        return cpu

    def log(self, training: Training) -> Path:
        return self.folder / f"{training.name}.log"

    def load(self, training: Training) -> HFGenModel:
        return AutoModel.from_pretrained(self.final(training)).eval()


def launch(launcher: Sequence[str], script: str, arguments: Sequence[str], log: Path) -> None:
    """Run an example in a process of its own, with one thread, and its output in ``log``."""
    command = [*launcher, sys.executable, str(ROOT / "examples" / f"{script}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(log, "w", encoding="utf-8") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT).returncode
    if status:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)}\nended with status {status}; the end of {log}:\n{end}")


def titok(tokens: int, steps: int, patch_size: int = SINGLE_PATCH_SIZE, seed: int = 0) -> Training:
    """A TiTok in a single stage."""
    settings = TITOK | {"stage": "single", "num_latent_tokens": tokens, "patch_size": patch_size}
    name = f"titok-{tokens}-patch{patch_size}-seed{seed}"
    return Training(name, "train_titok", settings | _length(steps, seed, 0.2))


def grid(tokens: int, steps: int) -> Training:
    """A MaskGIT-VQGAN with a square of so many codes."""
    return Training(f"grid-{tokens}", "train_maskgit_vqgan", VQGAN | GRIDS[tokens] | _length(steps, 0, 0.4))


def proxy_vqgan(steps: int) -> Training:
    """The MaskGIT-VQGAN whose codes stage 1 predicts."""
    return Training("proxy-vqgan", "train_maskgit_vqgan", VQGAN | PROXY_VQGAN | _length(steps, 0, 0.4))


def two_stages(
    tokens: int, steps: int, seed: int, vqgan: Path, after: tuple[Training, ...], runs: Runs
) -> tuple[Training, Training]:
    """Stage 1 on the codes of ``vqgan`` and stage 2, ``steps`` each."""
    # The weight of the quantizer's loss beside the cross-entropy is the published one; stage 2 has none.
    shared = TITOK | {"num_latent_tokens": tokens, "patch_size": PROXY_PATCH_SIZE, "quantizer_weight": 1.0}
    shared |= {"vqgan": vqgan} | _length(steps, seed, 0.2)
    first = Training(f"stage1-{tokens}-seed{seed}", "train_titok", shared | {"stage": 1}, after)
    second = shared | {"stage": 2, "stage1": runs.final(first)}
    return first, Training(f"stage2-{tokens}-seed{seed}", "train_titok", second, (first,))


def _length(steps: int, seed: int, warmup: float) -> dict[str, int]:
    return {"max_train_steps": steps, "warmup_steps": int(warmup * steps), "seed": seed}
