"""The methods that benchmarks/paradigms.py compares, and their training with the scripts of examples/."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hfgen.training.history import write_text

logger = logging.getLogger(__name__)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STAMP_FILE = "stamp.json"
ADAMW_RATIO = 0.2  # learning rate of AdamW, which trains U-Nets and the outer layers of DiT, to that of Muon


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        title: its name in tables.
        script: of examples/, without ending.
        flags: of the script, in addition to those of all methods.
        parent: the method whose result it starts from, or whose pairs it learns from.
        samplers: names of ``paradigms_sampling.SAMPLERS``.
        few: it is made for few steps, so that more are not measured.
    """

    title: str
    script: str
    flags: tuple[str, ...]
    parent: str | None = None
    samplers: tuple[str, ...] = ("euler",)
    few: int | None = None


DIFFUSION = ("ddim", "dpm-solver++")


def _unet(channels: str, head_dim: int) -> tuple[str, ...]:
    return ("--model", "unet", "--channels", channels, "--attention_head_dim", str(head_dim))


# U-Net and DiT have three sizes of about equal numbers of parameters: 0.14, 0.42 and 1.0 million.
METHODS = {
    "unet": Method("U-Net, diffusion", "train_diffusion", _unet("16,40,72", 24), samplers=DIFFUSION),
    "dit": Method("DiT, diffusion", "train_diffusion", ("--model", "dit", "--width", "112"), samplers=DIFFUSION),
    "flow": Method("DiT, rectified flow", "train_rectified_flow", ("--width", "112"), samplers=("euler", "heun")),
    "reflow": Method("2-rectified flow", "reflow", ("--mode", "reflow"), parent="flow"),
    "distilled": Method("2-rectified flow, distilled", "reflow", ("--mode", "distill"), parent="reflow", few=1),
    "mean_flow": Method("MeanFlow", "train_mean_flow", ("--width", "112"), samplers=("mean-flow",), few=4),
    "matching": Method(
        "trajectory matching, independent pairs",
        "train_mean_flow",
        ("--width", "112", "--loss", "trajectory_matching"),
        samplers=("mean-flow",),
        few=1,
    ),
    "matching_pairs": Method(
        "trajectory matching, pairs of the flow",
        "train_mean_flow",
        ("--width", "112", "--loss", "trajectory_matching"),
        parent="reflow",
        samplers=("mean-flow",),
        few=1,
    ),
    "unet_s": Method("U-Net, diffusion, small", "train_diffusion", _unet("8,16,24", 24), samplers=("ddim",)),
    "unet_m": Method("U-Net, diffusion, medium", "train_diffusion", _unet("8,24,48", 24), samplers=("ddim",)),
    "dit_s": Method(
        "DiT, diffusion, small", "train_diffusion", ("--model", "dit", "--width", "40"), samplers=("ddim",)
    ),
    "dit_m": Method(
        "DiT, diffusion, medium", "train_diffusion", ("--model", "dit", "--width", "72"), samplers=("ddim",)
    ),
}


@dataclass(frozen=True)
class TrainingSettings:
    """What all methods share.

    Attributes:
        budget: optimizer steps of each method; reflow and distillation spend theirs on top of their parent's.
        batch_size: images per step.
        resolution: side of the images in pixels.
        patch_size: of the transformers.
        learning_rate: peak of the cosine schedule, for matrices; a fifth of it for the rest.
        guidance: w; pairs are made with it and MeanFlow learns it.
        num_pairs: of noise and image, for reflow and distillation.
        pair_steps: Euler steps that make them.
    """

    budget: int
    batch_size: int
    resolution: int
    patch_size: int
    learning_rate: float
    guidance: float
    num_pairs: int
    pair_steps: int


def with_parents(names: Sequence[str]) -> list[str]:
    """The methods and those that they need, each after its parent."""
    ordered: list[str] = []
    for name in names:
        chain = [name]
        while METHODS[chain[-1]].parent is not None:
            chain.append(METHODS[chain[-1]].parent)
        ordered += [each for each in reversed(chain) if each not in ordered]
    return ordered


def training_flags(name: str, seed: int, settings: TrainingSettings, runs: Path) -> list[str]:
    """The command line of a method's script, without the script."""
    method, folder = METHODS[name], run_folder(runs, name, seed)
    flags = {
        "output_dir": folder,
        "seed": seed,
        "max_train_steps": settings.budget,
        "batch_size": settings.batch_size,
        "lr_schedule": "cosine",
        "warmup_steps": settings.budget // 20,
        "ema_decay": 0.99,
        "weight_decay": 0.0,
        "checkpointing_steps": 0,
        "validation_steps": 0,
        "num_validation_images": 24,
        "logging_steps": max(settings.budget // 20, 1),
        "resume": "latest",
    }
    if method.script == "reflow":
        teacher = run_folder(runs, method.parent, seed)
        # The guidance of the first pairs is learned with them.
        guidance = settings.guidance if method.parent == "flow" else 1.0
        flags |= {
            "model": teacher / "final",
            "pairs": pairs_folder(runs, name, seed),
            "num_pairs": settings.num_pairs,
            "num_inference_steps": settings.pair_steps,
            "guidance_scale": guidance,
        }
    else:
        flags |= {"resolution": settings.resolution, "num_inference_steps": 1 if "mean" in method.script else 16}
    if "unet" in method.flags:
        flags["learning_rate"] = ADAMW_RATIO * settings.learning_rate
    else:
        flags |= {"optimizer": "muon", "learning_rate": settings.learning_rate, "adamw_ratio": ADAMW_RATIO}
        if method.script != "reflow":
            flags["patch_size"] = settings.patch_size
    if name == "mean_flow":
        flags["kappa"] = 1 - 1 / settings.guidance  # with omega 1, a guidance of 1 / (1 - kappa)
    if name == "matching_pairs":
        flags["pairs"] = pairs_folder(runs, method.parent, seed)
    return [*method.flags, *(text for key, value in flags.items() for text in (f"--{key}", str(value)))]


def run_folder(runs: Path, name: str, seed: int) -> Path:
    """Where a method with a seed is trained."""
    return runs / f"seed-{seed}" / name


def pairs_folder(runs: Path, name: str, seed: int) -> Path:
    """Where the pairs that a method learns from are."""
    return runs / f"seed-{seed}" / f"{name}-pairs"


def train(name: str, seed: int, settings: TrainingSettings, runs: Path, *, threads: int = 1) -> dict:
    """Train a method unless its folder has a stamp, which says that it is done.

    Returns:
        The stamp: the settings and ``seconds``, CPU time of the training with start and validation.

    Raises:
        ValueError: the folder holds a run with other settings.
        SystemExit: the script failed.
    """
    folder = run_folder(runs, name, seed)
    wanted = {"method": asdict(METHODS[name]), "settings": asdict(settings)}
    wanted = json.loads(json.dumps(wanted))
    if (folder / STAMP_FILE).is_file():
        stamp = json.loads((folder / STAMP_FILE).read_text(encoding="utf-8"))
        if {key: stamp[key] for key in wanted} != wanted:
            raise ValueError(f"{folder} was trained with other settings: choose another --runs, or delete it.")
        return stamp
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{name}.log"
    logger.info("Training %s with seed %d; its output is in %s.", METHODS[name].title, seed, log)
    command = [sys.executable, str(EXAMPLES / f"{METHODS[name].script}.py"), "--no_progress"]
    command += training_flags(name, seed, settings, runs)
    stamp = wanted | {"seconds": run(command, log, threads)}
    write_text(folder / STAMP_FILE, json.dumps(stamp, indent=1) + "\n")
    return stamp


def run(command: Sequence[str], log: Path, threads: int) -> float:
    """Run a program with its output in a file; the CPU seconds that it took.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    before = _children_seconds()
    with log.open("w", encoding="utf-8") as output:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0:
        last = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
        raise SystemExit(f"{' '.join(command[:2])} ended with {code}:\n{last}")
    return _children_seconds() - before


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
