"""Experiment trackers: TensorBoard, Weights & Biases and whatever else accelerate knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL.Image import Image

TRACKERS_FOLDER = "trackers"


def tracker_names(report_to: str | None) -> list[str]:
    """The trackers that a comma-separated ``--report_to`` names.

    Raises:
        ValueError: if one is unknown to accelerate or its package is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()] if report_to else []
    available = sorted(str(getattr(name, "value", name)) for name in get_available_trackers())
    for name in names:
        if name not in available:
            raise ValueError(
                f"--report_to {name}: not installed or unknown to accelerate; available: "
                f"{', '.join(available) or 'none'}. The run always writes log.jsonl."
            )
    return names


def log_images(accelerator: Accelerator, images: Mapping[str, Image], step: int) -> None:
    """Send RGB pictures to every tracker that takes pictures. Only the main process sends."""
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if not hasattr(tracker, "log_images"):
            continue
        for name, image in images.items():
            array = np.asarray(image.convert("RGB"))
            if tracker.name == "tensorboard":
                tracker.log_images({name: array[None]}, step=step, dataformats="NHWC")
            elif tracker.name in ("aim", "clearml"):  # these take one picture, the others a list
                tracker.log_images({name: array}, step=step)
            else:
                tracker.log_images({name: [array]}, step=step)


def flat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as values that every tracker accepts."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
    }
