"""Golden cases: inputs and outputs of an official implementation with weights that anyone can rebuild.

A case is one safetensors file. It stores inputs (``in.*``), outputs (``out.*``) and a few weights (``keep.*``); every
other weight is made from its official name and shape by :func:`weight`. The JSON text ``case`` in the metadata holds
the official configuration and, for each state dict, the rows [name, shape, dtype, "fill" or "keep"].
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

PUBLIC_CASES = Path(__file__).parents[1] / "parity" / "cases"
GAINS = ("weight", "gamma", "scale", "g")


@dataclass(frozen=True)
class Case:
    """One case: ``states`` maps each part to its official state dict; names have no ``in.`` or ``out.`` prefix."""

    config: dict[str, Any]
    states: dict[str, dict[str, Tensor]]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def case_path(system: str) -> Path:
    """Where the case of a system lies: in the folder that HFGEN_GOLDEN names, by default beside the parity tests."""
    return Path(os.environ.get("HFGEN_GOLDEN", PUBLIC_CASES)) / f"{system}.safetensors"


def output_names(system: str) -> list[str]:
    """The outputs of a case, for a parity module that has one test for each; none if there is no such case."""
    path = case_path(system)
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        return sorted(name.removeprefix("out.") for name in file.keys() if name.startswith("out."))


@cache
def read_case(system: str, folder: Path | None = None) -> Case:
    """The case of a system, from ``folder`` if one is given and else from where :func:`case_path` says."""
    with safe_open(folder / f"{system}.safetensors" if folder else case_path(system), "pt") as file:
        meta = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}

    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    states = {}
    for part, rows in meta["state_dicts"].items():
        kept = below(f"keep.{part}.")
        states[part] = {
            name: kept[name] if kind == "keep" else weight(name, shape).to(getattr(torch, dtype))
            for name, shape, dtype, kind in rows
        }
    return Case(meta["config"], states, below("in."), below("out."))


def weight(name: str, shape: list[int]) -> Tensor:
    """Normal with std 1/sqrt(fan_in) for two or more dimensions; std 0.1 for one, around 1 if the name is a gain's."""
    draws = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(int(np.prod(shape, dtype=np.int64)))
    values = draws.astype(np.float32).reshape(shape)
    if len(shape) >= 2:
        values = values / np.float32(np.sqrt(max(1, int(np.prod(shape[1:], dtype=np.int64)))))
    else:
        values = np.float32(0.1) * values
        if len(shape) == 1 and name.rpartition(".")[2] in GAINS:
            values = 1 + values
    return torch.from_numpy(np.ascontiguousarray(values))


def pixels(image_u8: Tensor) -> Tensor:
    """uint8 images to [-1, 1], rounded as the official pipelines do."""
    return (image_u8.float() / 255) * 2 - 1


def assert_matches(
    actual: Tensor, expected: Tensor, *, tolerance: float = 1e-5, clamp: tuple[float, float] | None = None
) -> None:
    """Integers must be equal; floats may differ by ``tolerance`` times the scale, the largest finite expected value.

    With ``clamp``, the expected values are clamped to it and the actual ones are not yet; the scale is that of the
    actual ones, since rounding happened before.
    """
    assert actual.shape == expected.shape
    if not expected.is_floating_point():
        assert not actual.is_floating_point()
        assert torch.equal(actual.to(expected.dtype), expected), f"{(actual != expected).sum()} codes differ"
        return
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    assert finite.any()
    scale = (expected if clamp is None else actual)[finite].abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    if clamp is not None:
        actual = actual.clamp(*clamp)
    error = ((actual.float() - expected)[finite].abs().max() / scale).item()
    assert error <= tolerance, f"largest difference is {error:.2e} of the largest value {scale.item():.3g}"
