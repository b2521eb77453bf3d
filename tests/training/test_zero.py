"""Training with DeepSpeed's ZeRO is training: same losses, same checkpoints, and a run may change between the two."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hfgen import MultiScaleVQVAE, VARTransformer
from hfgen.training.sharding import make_placement
from hfgen.training.zero import PartitionedStates
from support.torchrun import ROOT, torchrun

PHASES = ("transformer", "critic")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("runs")
    torchrun(ROOT / "tests" / "support" / "zero_runs.py", folder)
    return folder


def _records(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "skipped_steps" in record]


def _losses(folder: Path) -> torch.Tensor:
    """(step, value); NaN where a phase was not updated."""
    names = [f"{phase}/{name}" for phase in PHASES for name in ("loss", "grad_norm", "learning_rate")]
    return torch.tensor([[record.get(name, torch.nan) for name in names] for record in _records(folder)])


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


@pytest.mark.parametrize("run", ["zero2", "zero1", "to_whole", "to_zero2"])
def test_losses_and_checkpoints_equal_those_of_ddp(runs, run):
    """Two phases with an engine each, accumulation and clipping; the last two resume what the other wrote."""
    expected, actual = _losses(runs / "whole"), _losses(runs / run)
    assert len(expected) == 4 and expected.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    expected, actual = (_state(runs / name / "checkpoint-4") for name in ("whole", run))
    assert {name.split(".")[0] for name in expected} == {"transformer", "ema_transformer", "critic"}
    assert any(name.endswith("exp_avg_sq") for name in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_optimizer_groups_are_those_of_whole_parameters(runs):
    groups = [
        torch.load(runs / name / "checkpoint-4" / "training_state.pt", weights_only=True)["optimizers"]
        for name in ("whole", "zero2")
    ]
    for phase in PHASES:
        expected, actual = ([group["params"] for group in found[phase]["param_groups"]] for found in groups)
        assert actual == expected


def test_a_run_resumes_bit_exactly(runs):
    assert torch.equal(_losses(runs / "stopped"), _losses(runs / "zero2"))
    states = [_state(runs / name / "checkpoint-4") for name in ("zero2", "stopped")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_checkpoints_load_with_from_pretrained(runs):
    average = VARTransformer.from_pretrained(runs / "zero2" / "checkpoint-4" / "ema_transformer").state_dict()
    final = VARTransformer.from_pretrained(runs / "zero2" / "final").state_dict()
    torch.testing.assert_close(final, average, rtol=0, atol=0)
    start = VARTransformer.from_pretrained(runs / "zero2" / "checkpoint-2" / "transformer").state_dict()
    assert not torch.equal(start["proj_out.weight"], average["proj_out.weight"])


def test_values_that_are_not_finite_are_left_out(runs):
    """Also an infinite loss whose gradients are finite, on one of the processes."""
    actual = _losses(runs / "zero2_bad")
    torch.testing.assert_close(actual, _losses(runs / "whole_bad"), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert actual[1, [0, 3]].isnan().all() and actual[[0, 2, 3]].isfinite().all()
    assert [record["skipped_steps"] for record in _records(runs / "zero2_bad")] == [0, 2, 2, 2]
    states = [_state(runs / name / "checkpoint-4") for name in ("whole_bad", "zero2_bad")]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


def test_an_adaptive_weight_can_take_gradients_inside_the_step(runs):
    actual = _losses(runs / "zero2_adaptive")
    torch.testing.assert_close(actual, _losses(runs / "whole_adaptive"), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(actual, _losses(runs / "zero2"))


def test_bf16_and_no_average(runs):
    """Weights and states stay float32; the result of a run without average is the trained model."""
    torch.testing.assert_close(_losses(runs / "bf16"), _losses(runs / "whole"), rtol=0.05, atol=0.05)
    assert not torch.equal(_losses(runs / "bf16"), _losses(runs / "zero2"))
    state = _state(runs / "bf16" / "checkpoint-4")
    assert {value.dtype for value in state.values()} == {torch.float32}
    final = VARTransformer.from_pretrained(runs / "bf16" / "final").state_dict()
    for name, value in final.items():
        assert torch.equal(value, state[f"transformer.{name}"]), name


def test_a_model_with_a_quantizer_is_refused():
    model = MultiScaleVQVAE(
        num_codes=8, latent_channels=4, base_channels=8, channel_multipliers=(1,), layers_per_block=1,
        norm_num_groups=4, patch_nums=(1, 2),
    )  # fmt: skip
    placement = PartitionedStates(SimpleNamespace(), "no", {"stage": 2}, 0.0)
    with pytest.raises(ValueError, match="MultiScaleVQVAE holds a quantizer.*multi_gpu_ddp.yaml"):
        placement.attach(torch.optim.AdamW(model.parameters()), [model])


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"ZERO_STAGE": "3"}, {}, "ZeRO stage 3 is not supported.*fsdp2.yaml"),
        ({"ZERO_STAGE": "0"}, {}, "ZeRO stage 0 is not supported, only 1 and 2"),
        ({"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, {}, "offload_optimizer is 'cpu'.*offload_optimizer_device to none"),
        ({"OFFLOAD_PARAM_DEVICE": "nvme"}, {}, "offload_param is 'nvme'.*--sharding fsdp"),
        ({}, {"sharding": "fsdp"}, "--sharding fsdp cannot be combined with a DeepSpeed"),
        ({}, {"optimizer": "muon"}, "--optimizer muon.*works with adamw"),
    ],
)
def test_what_it_cannot_do_is_refused(toy, tmp_path, monkeypatch, environment, changes, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(ValueError, match=message):
        make_placement(toy.config(tmp_path, **changes), SimpleNamespace(num_processes=2), "no")


@pytest.mark.parametrize(
    ("processes", "mixed_precision", "message"),
    [(1, "no", "this run has one"), (2, "fp16", "bf16 or no, not with fp16")],
)
def test_one_process_and_fp16_are_refused(toy, tmp_path, monkeypatch, processes, mixed_precision, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=message):
        make_placement(toy.config(tmp_path), SimpleNamespace(num_processes=processes), mixed_precision)
