"""Learning rate and weight decay as pure functions of the step, so that a resumed run continues the curve exactly."""

from __future__ import annotations

import math

HOLD_FRACTION = 0.05


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    max_steps: int,
    warmup_steps: int = 0,
    warmup_start: float = 0.005,
    final: float = 0.0,
) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first).

    The warm-up is linear from ``warmup_start * peak`` at step 0 to ``peak`` at ``warmup_steps``. With p the fraction
    of the remaining steps, which is 1 at step ``max_steps - 1``, the rate then is ``peak`` times

    - ``constant``: 1
    - ``cosine``: f + (1 - f) (1 + cos(pi p)) / 2
    - ``linear``: f + (1 - f) (1 - p)
    - ``lin0``: 1 for p < 0.05, then f + (1 - f) (1 - p) / 0.95 (VAR, arXiv 2404.02905, official trainer)

    where f is ``final``.
    """
    if step < warmup_steps:
        return peak * (warmup_start + (1.0 - warmup_start) * step / warmup_steps)
    progress = min(max((step - warmup_steps) / max(max_steps - 1 - warmup_steps, 1), 0.0), 1.0)
    if schedule == "constant":
        factor = 1.0
    elif schedule == "cosine":
        factor = final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule == "linear":
        factor = final + (1.0 - final) * (1.0 - progress)
    elif schedule == "lin0":
        factor = 1.0 if progress < HOLD_FRACTION else final + (1.0 - final) * (1.0 - progress) / (1.0 - HOLD_FRACTION)
    else:
        raise ValueError(f"schedule is {schedule!r}; choose one of constant, cosine, linear, lin0.")
    return peak * factor


def weight_decay(step: int, *, start: float, end: float | None, max_steps: int) -> float:
    """A half cosine from ``start`` at step 0 to ``end`` at step ``max_steps - 1``; constant when ``end`` is None."""
    if end is None:
        return start
    progress = min(step / max(max_steps - 1, 1), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
