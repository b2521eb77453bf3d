"""Runs on a stream of tar files that tests compare over interruptions; as a script, the two-process half of them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from hfgen.data.transforms import to_pixels
from hfgen.training import Phase, Task, Trainer, TrainingConfig, Validation, training_images
from hfgen.training.history import History

TIMING = ("images_per_second", "data_wait_fraction", "model_tflops", "max_memory_gib")


class PixelModel(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Dropout(0.2), nn.Linear(4, 48))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


class PixelTask(Task):
    """Keeps the names of its batches; ``terminate``: the step at which the process signals itself to stop."""

    def __init__(self, terminate: int | None = None) -> None:
        self.terminate = terminate
        self.modules = {"model": PixelModel()}
        self.phases = {"model": Phase(("model",))}
        self.averaged = ("model",)
        self.batches: list[list[str]] = []

    def training_step(self, batch, draws):
        if draws.step == self.terminate:
            os.kill(os.getpid(), signal.SIGTERM)
        self.batches.append([name.rpartition(" ")[2] for name in batch["name"]])
        pixels = to_pixels(batch["pixels"])
        noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=draws.generator())
        yield "model", (self.modules["model"](noisy) - pixels.flatten(1)).square().mean(), {}

    def validate(self, modules, step):
        return Validation()

    def pipeline(self, modules):
        return modules["model"]


def stream_config(folder: Path, shards: Path, **changes) -> TrainingConfig:
    values = {
        "output_dir": str(folder), "dataset": str(shards), "resolution": 4, "crop": "random", "resize_ratio": 1.5,
        "flip": True, "shuffle_buffer": 3, "max_train_steps": 12, "batch_size": 2, "learning_rate": 1e-2,
        "ema_decay": 0.9, "checkpointing_steps": 0, "validation_steps": 0, "logging_steps": 2, "progress": False,
    }  # fmt: skip
    return TrainingConfig(**(values | changes))


def fit(folder: Path, shards: Path, *, terminate: int | None = None, **changes) -> tuple[Trainer, PixelTask]:
    config = stream_config(folder, shards, **changes)
    trainer = Trainer(config)
    task = PixelTask(terminate)
    assert trainer.fit(task, training_images(config)) == (terminate is None)
    return trainer, task


def compare_interrupted(folder: Path, shards: Path, *, terminate: int, **changes) -> list[list[str]]:
    """A run, and one that stops after ``terminate`` and resumes: batches and weights must be equal. The batches."""
    straight, whole = fit(folder / "straight", shards, **changes)
    stopped, first = fit(folder / "stopped", shards, terminate=terminate, **changes)
    resumed, rest = fit(folder / "stopped", shards, resume="latest", **changes)
    assert stopped.step == terminate + 1 and first.batches + rest.batches == whole.batches
    for name, module in straight._components().items():
        other = resumed._components()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key]), (name, key)
    return whole.batches


def records(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMING} for line in lines]


def main(folder: Path, shards: Path) -> None:
    torch.set_num_threads(1)
    History.plot = lambda self: None
    rank = int(os.environ["RANK"])
    batches = compare_interrupted(folder, shards, terminate=2, max_train_steps=6, num_workers=2)
    (folder / f"batches_{rank}.json").write_text(json.dumps(batches))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
