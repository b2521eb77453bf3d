"""The log of a run: one JSON object per line, and a picture of the curves."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import is_matplotlib_available
from torch import Tensor

from hfgen.training.curve import draw_curve

logger = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"
CURVE_FILE = "training_curve.png"


def write_text(path: Path, text: str) -> None:
    """Write ``path`` through a temporary name, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Window:
    """Means of logged values since the last line. It is part of a checkpoint, so that resumed lines are equal too."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add scalars; tensors stay on their device until :meth:`means`."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The means in the order in which the names first came, and an empty window."""
        result = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: total.cpu() for name, total in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.sums = {name: total.to(device) for name, total in state["sums"].items()}
        self.counts = dict(state["counts"])

    def reduce(self, accelerator: Accelerator) -> None:
        """Replace sums and counts by their means over the processes, which need not have logged the same names."""
        if accelerator.num_processes == 1:
            return
        windows = gather_object([{name: (float(total), self.counts[name]) for name, total in self.sums.items()}])
        for name in dict.fromkeys(name for window in windows for name in window):
            totals, counts = zip(*(window[name] for window in windows if name in window))
            self.sums[name] = torch.tensor(sum(totals) / len(windows), device=accelerator.device)
            self.counts[name] = sum(counts) / len(windows)


class History:
    """``log.jsonl`` of a run. Lines after ``resumed_step`` are of a future that is about to be repeated: cut them."""

    def __init__(self, output_dir: Path, *, resumed_step: int) -> None:
        self.path = output_dir / LOG_FILE
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.records: list[dict[str, Any]] = []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the last line of a killed process
            if record["step"] <= resumed_step:
                self.records.append(record)
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; values that JSON does not know (nan, inf) are written as null."""
        record = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def plot(self) -> None:
        """Write ``training_curve.png``."""
        if not is_matplotlib_available():
            logger.warning("No %s: matplotlib is not installed (pip install matplotlib).", CURVE_FILE)
            return
        temporary = self.path.with_name(CURVE_FILE + ".tmp")
        draw_curve(self.records, temporary)
        if temporary.exists():
            os.replace(temporary, self.path.with_name(CURVE_FILE))
