"""A toy task of the engine: a run takes a fraction of a second and has everything that resume must keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import nn

from hfgen.counters import numpy_generator
from hfgen.training import Phase, Task, Trainer, TrainingConfig, Validation, frozen
from hfgen.training.history import History

TIMING = ("images_per_second", "data_wait_fraction", "model_tflops", "max_memory_gib")


class ToyModel(ModelMixin, ConfigMixin):
    """Dropout draws from the global generator, batch norm and the counter are state in buffers."""

    @register_to_config
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 12))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(pixels)
        return self.layers(pixels)


class ToyData:
    """Augmented items that depend on (epoch, index) only."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        noise = numpy_generator(5, epoch, index).random(12, dtype="float32")
        return {
            "pixels": torch.from_numpy(noise) + index / 20,
            "index": index,
            "skipped": ("x",) if index == 0 else (),
        }


class ToyTask(Task):
    def __init__(self, adversarial: bool = False, on_step=lambda step, block: None) -> None:
        self.modules = {"model": ToyModel()}
        self.phases = {"model": Phase(("model",))}
        self.averaged = ("model",)
        self.adversarial = adversarial
        self.on_step = on_step
        self.batches = []
        if adversarial:
            self.modules["critic"] = ToyModel(4)
            self.phases["critic"] = Phase(("critic",), learning_rate=3e-3)

    def training_step(self, batch, draws):
        self.on_step(draws.step, draws.block)
        self.batches.append(batch["index"].tolist())
        pixels = batch["pixels"]
        noisy = pixels + 0.1 * torch.randn(pixels.shape, generator=draws.generator())
        output = self.modules["model"](noisy)
        loss = (output - pixels).square().mean()
        if self.adversarial:
            with frozen(self.modules["critic"]) as critic:
                loss = loss - 0.1 * critic(output).mean()
        yield "model", loss, {"error": (output - pixels).abs().mean()}
        if self.adversarial:
            critic = self.modules["critic"]
            yield "critic", (critic(output.detach()) - critic(pixels)).mean().tanh(), {}

    def validate(self, modules, step):
        assert not any(module.training for module in modules["model"].modules())
        error = (modules["model"](torch.ones(4, 12)) - 1).square().mean()
        return Validation({"picture": Image.new("RGB", (4, 4))}, {"error": float(error)})

    def pipeline(self, modules):
        return modules["model"]


class Toy:
    """What the tests share."""

    Model, Data, Task = ToyModel, ToyData, ToyTask

    @staticmethod
    def config(folder: Path, **changes) -> TrainingConfig:
        values = {
            "output_dir": str(folder),
            "max_train_steps": 8,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "lr_schedule": "cosine",
            "warmup_steps": 2,
            "ema_decay": 0.9,
            "checkpointing_steps": 0,
            "validation_steps": 3,
            "logging_steps": 2,
            "progress": False,
        }
        return TrainingConfig(**(values | changes))

    @classmethod
    def fit(cls, config: TrainingConfig, *, adversarial: bool = False, length: int = 20, on_step=None) -> tuple:
        trainer = Trainer(config)
        task = ToyTask(adversarial, *([on_step] if on_step else []))
        finished = trainer.fit(task, ToyData(length))
        return trainer, task, finished

    @staticmethod
    def records(folder: Path) -> list[dict]:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torch.set_num_threads(1)
    if "plots" not in request.keywords:
        monkeypatch.setattr(History, "plot", lambda self: None)


def pytest_configure(config):
    config.addinivalue_line("markers", "plots: draws training_curve.png, which takes about a second per picture")
