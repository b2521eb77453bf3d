"""Trainings of MeanFlow that do not depend on the number of processes; as a script, in the processes of torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

from support.example_runs import run_script

METHODS = {
    "mean_flow": ["--equal_share", "0.5"],
    "trajectory": ["--loss", "trajectory_matching", "--trajectory_steps", "2"],  # two passes before the backward pass
}
FLAGS = [
    "--width", "16", "--num_layers", "1", "--num_heads", "2", "--patch_size", "8", "--max_train_steps", "4",
    "--limit", "16", "--batch_size", "4", "--num_validation_images", "1", "--logging_steps", "1", "--no_progress",
]  # fmt: skip


def main(folder: Path, micro_steps: int) -> None:
    for name, flags in METHODS.items():
        flags = [*FLAGS, *flags, "--gradient_accumulation_steps", str(micro_steps)]
        run_script("train_mean_flow", folder / name, *flags)


if __name__ == "__main__":
    main(Path(sys.argv[1]), 1)
