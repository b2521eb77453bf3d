"""Runs of two processes that tests/training/test_zero.py compares; started with torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from hfgen.training import Trainer, unwrap
from hfgen.training.history import History
from hfgen.training.zero import PartitionedStates
from support.sharded_runs import SmallTask, copy_first_half, fit

BAD_STEP = 1


class BadTask(SmallTask):
    """In one step the first process has an infinite loss with finite gradients, then a gradient that is none."""

    def training_step(self, batch, draws):
        for phase, loss, values in super().training_step(batch, draws):
            if draws.step == BAD_STEP and int(os.environ["RANK"]) == 0:
                loss = loss + torch.inf if phase == "transformer" else loss + (loss - loss.detach()).sqrt()
            yield phase, loss, values


class AdaptiveTask(SmallTask):
    """The weight of a loss is a norm of gradients, as in adversarial training of tokenizers."""

    def training_step(self, batch, draws):
        for phase, loss, values in super().training_step(batch, draws):
            if phase == "transformer":
                weight = unwrap(self.modules["transformer"]).proj_out.weight
                (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
                loss = loss * gradient.norm().clamp(0.1, 10.0)
            yield phase, loss, values


class LeakyTask(SmallTask):
    """The loss of one phase reaches the weights of the other."""

    def training_step(self, batch, draws):
        logits = self.modules["transformer"](batch["latents"], batch["label"]).logits
        yield "transformer", self.modules["critic"](logits).mean(), {}


@contextmanager
def launched(stage: int) -> Iterator[None]:
    """The environment of ``accelerate launch`` with a DeepSpeed configuration."""
    values = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    os.environ.update(values)
    yield
    for name in values:
        del os.environ[name]


def check(trainer: Trainer) -> None:
    """Each process has about half of the optimizer states, and whole weights that are the same everywhere."""
    assert isinstance(trainer.placement, PartitionedStates)
    for name, optimizer in trainer.optimizers.items():
        held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        total = sum(parameter.numel() for parameter in trainer.models[name].parameters())
        assert total / 2 <= held < 0.6 * total + 8, name
    for model in trainer.models.values():
        for parameter in model.parameters():
            assert torch.equal(trainer.accelerator.reduce(parameter.detach(), reduction="mean"), parameter)


def main(folder: Path) -> None:
    History.plot = lambda self: None
    fit(folder / "whole")
    fit(folder / "whole_bad", task=BadTask)
    fit(folder / "whole_adaptive", task=AdaptiveTask)
    with launched(stage=2):
        check(fit(folder / "zero2"))
        fit(folder / "zero2_bad", task=BadTask)
        fit(folder / "zero2_adaptive", task=AdaptiveTask)
        with pytest.raises(
            RuntimeError, match="phase 'transformer' left gradients on the parameters of phase 'critic'"
        ):
            fit(folder / "leaky", task=LeakyTask)
        fit(folder / "stopped", stop_at=1)
        fit(folder / "stopped", resume="latest")
        fit(folder / "bf16", mixed_precision="bf16", ema_decay=0.0)
        copy_first_half(folder / "whole", folder / "to_zero2")
        fit(folder / "to_zero2", resume="latest")
    with launched(stage=1):
        check(fit(folder / "zero1"))
    copy_first_half(folder / "zero2", folder / "to_whole")
    fit(folder / "to_whole", resume="latest")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
