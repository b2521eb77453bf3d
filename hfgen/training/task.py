"""What the author of a training script writes: the method. The trainer holds everything else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hfgen.training.batches import Draws


@dataclass(frozen=True)
class Phase:
    """One optimizer of a task.

    Attributes:
        modules: names of the modules whose parameters it updates.
        learning_rate: peak learning rate; None takes that of the config.
        weight_decay: None takes that of the config.
        no_decay: parts of parameter names that are not decayed, besides vectors and biases.
    """

    modules: tuple[str, ...]
    learning_rate: float | None = None
    weight_decay: float | None = None
    no_decay: tuple[str, ...] = ()


@dataclass
class Validation:
    """Pictures (by file name stem) and numbers that one validation produced."""

    images: Mapping[str, Image] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Task(ABC):
    """A training method.

    Attributes:
        modules: the trained models by name, each with ``save_pretrained`` and ``from_pretrained``. The trainer
            replaces them by their wrapped versions; ``unwrap`` gives the model itself.
        phases: the optimizers by name.
        averaged: names of the modules that have an EMA: those that are validated and saved.
        frozen: modules that are used but not trained; the trainer moves them to the device, in evaluation mode. A
            part of one of the ``modules`` may be named here, too, such as the encoder in a second stage that trains
            the decoder.
    """

    modules: dict[str, nn.Module]
    phases: dict[str, Phase]
    averaged: tuple[str, ...]
    frozen: tuple[nn.Module, ...] = ()

    @abstractmethod
    def training_step(
        self, batch: Mapping[str, Any], draws: Draws
    ) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor | float]]]:
        """Yield ``(phase, loss, values to log)`` for one micro-batch, one phase after the other.

        The trainer runs the backward pass of each loss before it asks for the next phase, and updates all phases
        after the last micro-batch. A phase that is not yielded is not updated. The loss is a scalar, the mean over the
        batch. Random draws come from ``draws.generator()``; dropout layers may use the global generator.

        With several processes all must yield the same phases, because they wait for each other's gradients: if a
        process has nothing to select, its loss is a sum over no elements, not absent. The logged values may differ.
        With ``--sharding fsdp`` weights are whole only inside ``forward`` and methods marked with
        ``apply_forward_hook``; a step must neither read them elsewhere nor change outputs in place.
        """

    @abstractmethod
    def validate(self, modules: Mapping[str, nn.Module], step: int) -> Validation:
        """Judge the averaged ``modules`` (evaluation mode, no gradients), on the main process only."""

    @abstractmethod
    def pipeline(self, modules: Mapping[str, nn.Module]) -> Any:
        """The object whose ``save_pretrained`` writes the result of the run, made of the averaged ``modules``."""


def unwrap(module: nn.Module) -> nn.Module:
    """The model inside its multi-process wrapper. A sharded model has none: it is the wrapper itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The unwrapped ``module`` with parameters that take no gradients: a loss may pass through it untrained."""
    inner = unwrap(module)
    trainable = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield inner
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
