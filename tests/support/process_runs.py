"""Runs that tests compare over processes and interruptions; as a script, the two-process half of them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from hfgen.counters import generator
from hfgen.models.quantizers.vector import VectorQuantizer
from hfgen.training import Phase, Task, Trainer, TrainingConfig, Validation, frozen
from hfgen.training.history import History


class CodebookModel(ModelMixin, ConfigMixin):
    """Its codebook follows moving averages, and unused codes restart: state that no gradient moves."""

    @register_to_config
    def __init__(self, dropout: float = 0.0, restart_after: int = 0) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 4)
        self.quantizer = VectorQuantizer(12, 4, codebook_update="ema", ema_decay=0.7, restart_after=restart_after)
        self.decoder = nn.Sequential(nn.Dropout(dropout), nn.Linear(4, 8))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized = self.quantizer(self.encoder(pixels)[:, None])
        return self.decoder(quantized.latents[:, 0]), quantized.loss


class Critic(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.Linear(6, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


class Data:
    """An epoch is six steps of a global batch of 8."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {"pixels": torch.randn(8, generator=generator(11, *key)), "index": key[1]}


class CodebookTask(Task):
    """An adversarial phase from step 1 on.

    Args:
        random: dropout, noise and code restarts, which depend on how the global batch is cut into micro-batches.
        selected: blocks whose loss has a term over a selection of their items; in the others nothing is selected.
        terminate: (step, block) at which the process signals itself to stop.
    """

    def __init__(self, *, random: bool, selected: tuple[int, ...] = (), terminate: tuple[int, int] | None = None):
        self.random, self.selected, self.terminate = random, selected, terminate
        self.modules = {
            "model": CodebookModel(dropout=0.2, restart_after=1) if random else CodebookModel(),
            "critic": Critic(),
        }
        self.phases = {"model": Phase(("model",)), "critic": Phase(("critic",), learning_rate=3e-3)}
        self.averaged = ("model",)
        self.batches: list[list[int]] = []

    def training_step(self, batch, draws):
        if (draws.step, draws.block) == self.terminate:
            os.kill(os.getpid(), signal.SIGTERM)
        self.batches.append(batch["index"].tolist())
        pixels = batch["pixels"]
        noise = 0.1 * torch.randn(pixels.shape, generator=draws.generator()) if self.random else 0.0
        output, codebook_loss = self.modules["model"](pixels + noise)
        loss, log = (output - pixels).square().mean() + codebook_loss, {}
        if self.selected:
            rows = output[: 2 if draws.block in self.selected else 0]
            loss = loss + rows.square().sum() / max(rows.numel(), 1)
            if len(rows):
                log["selected"] = rows.square().mean()
        if draws.step >= 1:
            with frozen(self.modules["critic"]) as critic:
                loss = loss - 0.1 * critic(output).mean()
        yield "model", loss, log
        if draws.step >= 1:
            critic = self.modules["critic"]
            yield "critic", (critic(output.detach()) - critic(pixels)).tanh().mean(), {}

    def validate(self, modules, step):
        output, _ = modules["model"](torch.ones(2, 8))
        return Validation({}, {"error": float((output - 1).square().mean())})

    def pipeline(self, modules):
        return modules["model"]


def fit(
    folder: Path, *, processes: int, random: bool, selected=(), terminate=None, **changes
) -> tuple[Trainer, CodebookTask]:
    """Ten steps of a global batch of 8, unless ``changes`` of the configuration say otherwise."""
    values = {
        "output_dir": str(folder), "max_train_steps": 10, "batch_size": 8 // processes, "learning_rate": 1e-2,
        "ema_decay": 0.9, "checkpointing_steps": 5, "checkpoints_total_limit": None, "validation_steps": 5,
        "logging_steps": 1, "progress": False,
    }  # fmt: skip
    trainer = Trainer(TrainingConfig(**(values | changes)))
    assert trainer.accelerator.num_processes == processes
    task = CodebookTask(random=random, selected=selected, terminate=terminate)
    assert trainer.fit(task, Data()) == (terminate is None)
    return trainer, task


def check_codebooks_agree(trainer: Trainer, task: CodebookTask) -> None:
    """Every process ends with the same weights, moving averages and counters of unused steps."""
    for name, value in trainer.models["model"].state_dict().items():
        first, second = trainer.accelerator.gather(value[None])
        assert torch.equal(first, second), name


def main(folder: Path) -> None:
    History.plot = lambda self: None
    check_codebooks_agree(*fit(folder / "equal", processes=2, random=False))

    halves = {"processes": 2, "random": True, "gradient_accumulation_steps": 2, "batch_size": 2}
    check_codebooks_agree(*fit(folder / "straight", **halves))
    # The signal reaches one process, in the middle of an epoch and at its end; the loader's workers change.
    fit(folder / "stopped", **halves, terminate=(2, 1))
    fit(folder / "stopped", **halves, terminate=(5, 0), resume="latest", num_workers=2)
    check_codebooks_agree(*fit(folder / "stopped", **halves, resume="latest", num_workers=1))

    fit(folder / "selection", processes=2, random=False, selected=(1,), max_train_steps=3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
