"""Classifier-free guidance and its schedules (Ho and Salimans, arXiv 2207.12598).

hfgen's guidance scale w is diffusers': ``unconditional + w (conditional - unconditional)``, so that 1 is off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

GUIDANCE_SCHEDULES = ("constant", "linear", "cosine", "power-cosine", "interval")


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """``scale * conditional - (scale - 1) * unconditional``, the guided prediction."""
    return scale * conditional - (scale - 1.0) * unconditional


def guidance_schedule(
    name: str,
    scale: float,
    num_steps: int,
    *,
    power: float = 2.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> list[float]:
    """The guidance scale of each step.

    With progress r from 0 at the first step to 1 at the last:

    - ``constant``: w
    - ``linear``: 1 + (w - 1) r (VAR)
    - ``cosine``: 1 + (w - 1) (1 - cos(pi r)) / 2
    - ``power-cosine``: 1 + (w - 1) (1 - cos(pi r^power)) / 2 (MDT, RAR)
    - ``interval``: w while r lies in ``interval``, else 1 (Kynkaanniemi et al., arXiv 2404.07724)

    Raises:
        ValueError: an unknown name, or an interval that is not ordered within [0, 1].
    """
    if name not in GUIDANCE_SCHEDULES:
        raise ValueError(f"Unknown guidance schedule {name!r}; choose one of {', '.join(GUIDANCE_SCHEDULES)}.")
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"The guidance interval must satisfy 0 <= low <= high <= 1, got {interval}.")
    progress = [step / max(num_steps - 1, 1) for step in range(num_steps)]
    if name == "interval":
        return [scale if low <= r <= high else 1.0 for r in progress]
    shape = {
        "constant": lambda r: 1.0,
        "linear": lambda r: r,
        "cosine": lambda r: (1.0 - math.cos(math.pi * r)) / 2,
        "power-cosine": lambda r: (1.0 - math.cos(math.pi * r**power)) / 2,
    }[name]
    return [1.0 + (scale - 1.0) * shape(r) for r in progress]


def resolve_guidance(schedule: str | Sequence[float], scale: float, num_steps: int) -> list[float]:
    """A named schedule at ``scale``, or the given list checked for its length."""
    if isinstance(schedule, str):
        return guidance_schedule(schedule, scale, num_steps)
    if len(schedule) != num_steps:
        raise ValueError(
            f"guidance_schedule has {len(schedule)} values, but there are {num_steps} steps; give one for each."
        )
    return [float(value) for value in schedule]
