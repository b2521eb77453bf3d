"""Which parameters are decayed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn


def parameter_groups(modules: Iterable[nn.Module], no_decay: Sequence[str] = ()) -> list[dict[str, Any]]:
    """AdamW groups of the trainable parameters: those that decay and those that do not.

    Vectors (norm weights, biases, anything with at most one dimension) do not decay, nor does any parameter whose name
    ends in ``bias`` or contains one of the strings ``no_decay``. The key ``decay`` of a group tells which it is.
    """
    decayed, exempt = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            is_exempt = parameter.ndim <= 1 or name.endswith("bias") or any(part in name for part in no_decay)
            (exempt if is_exempt else decayed).append(parameter)
    groups = [{"params": decayed, "decay": True}, {"params": exempt, "decay": False}]
    return [group for group in groups if group["params"]]
