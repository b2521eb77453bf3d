"""Which parameters are decayed, and which are hidden matrices."""

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


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks whose class the model names in ``_repeated_blocks``, sharded ones (subclasses) included."""
    names = set(getattr(model, "_repeated_blocks", None) or ())
    return [block for block in model.modules() if names & {base.__name__ for base in type(block).__mro__}]


def split_hidden_matrices(
    groups: Iterable[dict[str, Any]], modules: Iterable[nn.Module]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cut groups into those of hidden matrices and those of everything else.

    Hidden matrices are the weights of the linear layers inside the blocks that a model repeats, which it names in
    ``_repeated_blocks``. Embeddings, input and output projections, tables, vectors and convolutions are not.

    Args:
        groups: as :func:`parameter_groups` returns them.
        modules: the models whose parameters the groups hold.

    Returns:
        The groups of matrices and the others, both with the keys of the original ones; empty groups are left out.
    """
    matrices = {
        id(layer.weight)
        for module in modules
        for block in repeated_blocks(module)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    }
    hidden, others = [], []
    for group in groups:
        for target, wanted in ((hidden, True), (others, False)):
            chosen = [parameter for parameter in group["params"] if (id(parameter) in matrices) is wanted]
            if chosen:
                target.append({**group, "params": chosen})
    return hidden, others
