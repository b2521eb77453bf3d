"""Seconds of paths that do the same: they run alternately, so that other work on the machine meets them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass
class Times:
    """Seconds of each run: by the clock, and of all CPU threads together, which other processes disturb less."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Median and minimum of both."""
        return {
            "wall_s": statistics.median(self.wall),
            "wall_min_s": min(self.wall),
            "cpu_s": statistics.median(self.cpu),
            "cpu_min_s": min(self.cpu),
        }


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the CPU that one call takes, until the device is done."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(paths: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Time every path ``repeats`` times in turns: A B A B ... They should have run once before."""
    times = {name: Times() for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            wall, cpu = timed(path)
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times
