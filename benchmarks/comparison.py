"""Optimised against plain path: equal outputs first, then the times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import alternate, timed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

COLUMNS = {
    "part": "{}",
    "dtype": "{}",
    "threads": "{}",
    "batch": "{}",
    "plain s": "{:.3f}",
    "optimised s": "{:.3f}",
    "ratio": "{:.2f}",
    "ratio of CPU time": "{:.2f}",
    "transformer s": "{:.3f}",
    "images/s": "{:.2f}",
    "GEMM share": "{:.0%}",
}


@dataclass
class Comparison:
    """Two paths that compute the same.

    Attributes:
        part: what they compute.
        batch: images per call.
        plain, optimised: functions without arguments; codes (B, L), pixels (B, 3, H, W) in [-1, 1], or None for
            what they do not compute.
        transformer: the transformer's part of ``optimised``, whose floating-point rate is stated.
        dtype: of the weights.
        items: made for each of the batch, such as the tokens of a text; the rate counts them.
    """

    part: str
    batch: int
    plain: Callable[[], tuple[Tensor | None, Tensor | None]]
    optimised: Callable[[], tuple[Tensor | None, Tensor | None]]
    transformer: Callable[[], object]
    dtype: torch.dtype
    items: int = 1


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square matrix product of 2048, the best of five."""
    left, right = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    torch.mm(left, right)
    return 2 * 2048**3 / min(timed(lambda: torch.mm(left, right))[0] for _ in range(5))


@torch.no_grad()
def measure(comparison: Comparison, threads: int, repeats: int, device: str) -> dict[str, float | int | str]:
    """The row of a comparison: :data:`COLUMNS` and the largest difference of pixels.

    Raises:
        SystemExit: codes that are not equal.
    """
    torch.set_num_threads(threads)
    (plain_codes, plain_pixels), (codes, pixels) = comparison.plain(), comparison.optimised()
    if codes is not None and not torch.equal(codes, plain_codes):
        raise SystemExit(f"Tokens differ: {(codes != plain_codes).sum()} of {codes.numel()}; nothing was timed.")
    difference = 0.0 if pixels is None else (pixels.float() - plain_pixels.float()).abs().max().item()

    with FlopCounterMode(display=False) as counter:
        comparison.transformer()
    paths = {name: getattr(comparison, name) for name in ("plain", "optimised", "transformer")}
    seconds = {name: times.summary() for name, times in alternate(paths, repeats).items()}
    plain, optimised = seconds["plain"], seconds["optimised"]
    rate = counter.get_total_flops() / seconds["transformer"]["wall_s"]
    return {
        "part": comparison.part,
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "threads": threads,
        "batch": comparison.batch,
        "plain s": plain["wall_s"],
        "optimised s": optimised["wall_s"],
        "ratio": plain["wall_s"] / optimised["wall_s"],
        "ratio of CPU time": plain["cpu_s"] / optimised["cpu_s"],
        "transformer s": seconds["transformer"]["wall_s"],
        "images/s": comparison.batch * comparison.items / optimised["wall_s"],
        "GEMM share": rate / gemm_rate(comparison.dtype, device),
        "max_pixel_difference": difference,
    }
