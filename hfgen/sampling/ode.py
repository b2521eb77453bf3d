"""Fixed-step solvers of ordinary differential equations ``dx / dt = velocity(x, t)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]

# Butcher tableaus: for each stage its time, as a share of the step, and the weights of the stages before it; then the
# weights of the result.
_TABLEAUS: dict[str, tuple[tuple[tuple[float, tuple[float, ...]], ...], tuple[float, ...]]] = {
    "euler": (((0.0, ()),), (1.0,)),
    "midpoint": (((0.0, ()), (1 / 2, (1 / 2,))), (0.0, 1.0)),
    "heun": (((0.0, ()), (1.0, (1.0,))), (1 / 2, 1 / 2)),
    "heun3": (((0.0, ()), (1 / 3, (1 / 3,)), (2 / 3, (0.0, 2 / 3))), (1 / 4, 0.0, 3 / 4)),
}
ODE_METHODS = tuple(_TABLEAUS)


def passes_per_step(method: str) -> int:
    """How often one step of the method calls the velocity, which is also its order.

    Raises:
        ValueError: unknown method.
    """
    if method not in _TABLEAUS:
        raise ValueError(f"Unknown ODE method {method!r}; choose one of {', '.join(ODE_METHODS)}.")
    return len(_TABLEAUS[method][1])


def ode_step(velocity: Velocity, x: Tensor, start: float, end: float, method: str = "euler") -> Tensor:
    """One step from the time ``start`` to ``end``, in either direction.

    Args:
        velocity: (x, time) -> the derivative, of the shape of ``x``.
        x: the point at ``start``.
        start, end: times.
        method: "euler" (order 1), "midpoint" or "heun" (order 2), "heun3" (order 3).

    Raises:
        ValueError: unknown method.
    """
    passes_per_step(method)
    stages, weights = _TABLEAUS[method]
    step = end - start
    slopes: list[Tensor] = []
    for share, mix in stages:
        slopes.append(velocity(_advance(x, step, mix, slopes), start + share * step))
    return _advance(x, step, weights, slopes)


def solve_ode(velocity: Velocity, x: Tensor, times: Sequence[float], method: str = "euler") -> Tensor:
    """The point at the last of ``times`` of the solution that is ``x`` at the first; see :func:`ode_step`."""
    for start, end in zip(times, times[1:]):
        x = ode_step(velocity, x, start, end, method)
    return x


def _advance(x: Tensor, step: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes):
        if weight:
            x = x + (step * weight) * slope
    return x
