"""Sharded training is training: same losses, same checkpoints, and a run may change between the two."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hfgen import MultiScaleVQVAE, VARTransformer
from hfgen.training import Trainer
from hfgen.training.sharding import FullySharded, make_placement
from support.torchrun import ROOT, torchrun


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    torchrun(ROOT / "tests" / "support" / "sharded_runs.py", folder)
    return folder


def _losses(folder: Path) -> list[list[float]]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("transformer/loss", "critic/loss", "transformer/grad_norm", "critic/grad_norm")
    return [[record[name] for name in names] for record in records if names[0] in record]


def _state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by name: weights, averages, optimizers."""
    tensors = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, value in load_file(path).items():
            tensors[f"{path.parent.name}.{name}"] = value
    state = torch.load(folder / "training_state.pt", weights_only=True)
    for phase, optimizer in state["optimizers"].items():
        for index, values in optimizer["state"].items():
            tensors |= {f"{phase}.{index}.{name}": value for name, value in values.items()}
    return tensors


@pytest.mark.parametrize("run", ["sharded", "to_whole", "to_sharded"])
def test_losses_and_checkpoints_equal_those_of_whole_models(runs, run):
    expected, actual = _losses(runs / "whole"), _losses(runs / run)
    assert len(expected) == 4
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    expected, actual = (_state(runs / name / "checkpoint-4") for name in ("whole", run))
    assert {name.split(".")[0] for name in expected} == {"transformer", "ema_transformer", "critic"}
    assert any(name.endswith("exp_avg_sq") for name in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_bf16_and_no_average(runs):
    """Master weights stay float32; the result of a run without average is the trained model."""
    torch.testing.assert_close(_losses(runs / "bf16"), _losses(runs / "whole"), rtol=0.05, atol=0.05)
    state = _state(runs / "bf16" / "checkpoint-4")
    assert {value.dtype for value in state.values()} == {torch.float32}
    final = VARTransformer.from_pretrained(runs / "bf16" / "final").state_dict()
    for name, value in final.items():
        assert torch.equal(value, state[f"transformer.{name}"]), name


def test_a_sharded_run_resumes_bit_exactly(runs):
    assert _losses(runs / "stopped") == _losses(runs / "sharded")
    states = [_state(runs / name / "checkpoint-4") for name in ("sharded", "stopped")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_sharded_checkpoints_load_with_from_pretrained(runs):
    average = VARTransformer.from_pretrained(runs / "sharded" / "checkpoint-4" / "ema_transformer").state_dict()
    final = VARTransformer.from_pretrained(runs / "sharded" / "final").state_dict()
    torch.testing.assert_close(final, average, rtol=0, atol=0)
    start = VARTransformer.from_pretrained(runs / "sharded" / "checkpoint-2" / "transformer").state_dict()
    assert not torch.equal(start["proj_out.weight"], average["proj_out.weight"])


def test_one_process_cannot_shard(toy, tmp_path):
    with pytest.raises(ValueError, match="several processes, and this run has one: start it with torchrun"):
        Trainer(toy.config(tmp_path, sharding="fsdp"))


def test_a_model_with_a_quantizer_cannot_be_sharded():
    model = MultiScaleVQVAE(
        num_codes=8, latent_channels=4, base_channels=8, channel_multipliers=(1,), layers_per_block=1,
        norm_num_groups=4, patch_nums=(1, 2),
    )  # fmt: skip
    with pytest.raises(ValueError, match="MultiScaleVQVAE holds a quantizer.*--sharding none"):
        FullySharded.place(None, model)


def test_launch_options_that_would_lose_weights_are_refused(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading.*fsdp2.yaml"):
        make_placement(toy.config(tmp_path), SimpleNamespace(distributed_type="FSDP", num_processes=2), "no")


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw8bit", "muon"])
def test_other_optimizers_cannot_be_sharded(toy, tmp_path, optimizer):
    config = toy.config(tmp_path, sharding="fsdp", optimizer=optimizer)
    with pytest.raises(ValueError, match=f"--optimizer {optimizer}.*works with adamw"):
        make_placement(config, SimpleNamespace(distributed_type="MULTI_GPU", num_processes=2), "no")


def test_fp16_cannot_be_sharded(toy, tmp_path):
    with pytest.raises(ValueError, match="--mixed_precision bf16 or no"):
        make_placement(
            toy.config(tmp_path, sharding="fsdp"),
            SimpleNamespace(distributed_type="MULTI_GPU", num_processes=2),
            "fp16",
        )
