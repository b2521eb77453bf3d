"""Runs of two processes that tests/training/test_sharding.py compares; started with torchrun."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from hfgen import VARTransformer
from hfgen.counters import generator
from hfgen.training import Phase, Task, Trainer, TrainingConfig, Validation, frozen
from hfgen.training.history import History


class Critic(ModelMixin, ConfigMixin):
    """Names no blocks: it is sharded as one."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 6), nn.SiLU(), nn.Linear(6, 1))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return self.layers(logits)


class Data:
    def __len__(self) -> int:
        return 24

    def __getitem__(self, key: tuple[int, int]) -> dict:
        draws = generator(3, *key)
        return {
            "codes": torch.randint(7, (5,), generator=draws),
            "latents": torch.randn(4, 3, generator=draws),
            "label": key[1] % 3,
        }


class SmallTask(Task):
    """Two phases; the generator with checkpointed blocks and sizes that two processes do not share evenly."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        model = VARTransformer(
            num_codes=7, code_dim=3, num_classes=3, num_layers=2, num_attention_heads=2, attention_head_dim=4,
            patch_nums=(1, 2),
        )  # fmt: skip
        model.init_weights(0.5)
        model.enable_gradient_checkpointing()
        self.modules = {"transformer": model, "critic": Critic()}
        self.phases = {"transformer": Phase(("transformer",)), "critic": Phase(("critic",))}
        self.averaged = ("transformer",)

    def training_step(self, batch, draws):
        if draws.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        logits = self.modules["transformer"](batch["latents"], batch["label"]).logits
        loss = F.cross_entropy(logits.transpose(1, 2), batch["codes"])
        with frozen(self.modules["critic"]) as critic:
            adversarial = -critic(logits).mean()
        yield "transformer", loss + 0.1 * adversarial, {"adversarial": adversarial}
        critic, real = self.modules["critic"], F.one_hot(batch["codes"], 7).float()
        yield "critic", (critic(logits.detach()) - critic(real)).mean().tanh(), {}

    def validate(self, modules, step):
        model = modules["transformer"]
        assert not model.training and not any(isinstance(value, DTensor) for value in model.parameters())
        logits = model(torch.ones(1, 4, 3), torch.tensor([1])).logits
        return Validation({}, {"logits": float(logits.square().mean())})

    def pipeline(self, modules):
        return modules["transformer"]


def fit(folder: Path, *, stop_at: int | None = None, task: type[SmallTask] = SmallTask, **changes) -> Trainer:
    values = {
        "output_dir": str(folder), "max_train_steps": 4, "batch_size": 3, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "ema_decay": 0.9, "max_grad_norm": 0.5, "checkpointing_steps": 2,
        "checkpoints_total_limit": None, "validation_steps": 2, "logging_steps": 1, "progress": False,
    }  # fmt: skip
    trainer = Trainer(TrainingConfig(**(values | changes)))
    assert trainer.accelerator.num_processes == 2
    assert trainer.fit(task(stop_at), Data()) == (stop_at is None)
    return trainer


def copy_first_half(source: Path, target: Path) -> None:
    if int(os.environ["RANK"]) == 0:
        shutil.copytree(source / "checkpoint-2", target / "checkpoint-2")
        shutil.copy(source / "log.jsonl", target / "log.jsonl")


def check_entry_points(trainer: Trainer) -> None:
    """A method besides forward gathers the weights, too, and equals it."""
    model = trainer.models["transformer"]
    with torch.no_grad():
        cache, condition = model.eval().new_cache(torch.tensor([0, 2]))
        first = model.forward_scale(None, condition, cache, 0, 2)
        whole = model(torch.ones(2, 4, 3), torch.tensor([0, 2])).logits
    torch.testing.assert_close(first, whole[:, :1])


def main(folder: Path) -> None:
    History.plot = lambda self: None
    fit(folder / "whole")
    sharded = fit(folder / "sharded", sharding="fsdp")
    model = sharded.models["transformer"]
    assert all(isinstance(block, FSDPModule) for block in model.blocks)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < 0.6 * sum(parameter.numel() for parameter in model.parameters())
    assert all(isinstance(value, DTensor) for value in sharded.averages["transformer"].module.parameters())
    check_entry_points(sharded)

    fit(folder / "stopped", sharding="fsdp", stop_at=1)
    fit(folder / "stopped", sharding="fsdp", resume="latest")

    fit(folder / "bf16", sharding="fsdp", mixed_precision="bf16", ema_decay=0.0)

    copy_first_half(folder / "sharded", folder / "to_whole")
    fit(folder / "to_whole", resume="latest")
    copy_first_half(folder / "whole", folder / "to_sharded")
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # as accelerate launch --use_fsdp sets it
    assert isinstance(fit(folder / "to_sharded", resume="latest").models["transformer"], FSDPModule)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
