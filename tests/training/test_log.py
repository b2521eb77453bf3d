"""What a run tells: the log, its curve, trackers, speed, and what is said of a batch that is not finite."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from accelerate import tracking
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hfgen.training import Trainer
from hfgen.training.curve import draw_curve, panels, smooth
from hfgen.training.throughput import ModelFlops, Throughput, known_peak_tflops, peak_memory_gib
from hfgen.training.trackers import tracker_names

# ------------------------------------------------------------------------------------------------------------- guard


def _nan_task(toy, item: int):
    """A loss that is not finite where ``item`` is in the batch."""

    class Task(toy.Task):
        def training_step(self, batch, draws):
            for phase, loss, values in super().training_step(batch, draws):
                yield phase, loss * float("nan") if item in batch["index"].tolist() else loss, values

    return Task()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_item_is_found_in_its_batch(toy, tmp_path, caplog, accumulation):
    """An epoch of 16 items in batches of 4: exactly one micro-batch holds item 13."""
    steps = 4 // accumulation
    config = toy.config(tmp_path, gradient_accumulation_steps=accumulation, max_train_steps=steps)
    task = _nan_task(toy, item=13)
    Trainer(config).fit(task, toy.Data(16))
    (bad,) = (number for number, items in enumerate(task.batches) if 13 in items)
    record = json.loads((tmp_path / "bad_batch.json").read_text())
    assert record["step"] == bad // accumulation + 1
    assert (record["phase"], record["not_finite"]) == ("model", "loss")
    assert record["indices"] == task.batches[bad] and record["fields"] == ["index", "pixels"]
    blocks = record["micro_batches"]
    assert [block["indices"] for block in blocks] == task.batches[bad // accumulation * accumulation :][:accumulation]
    assert blocks[bad % accumulation]["values"]["loss"] == "nan"
    assert isinstance(blocks[bad % accumulation]["values"]["error"], float)
    items = ", ".join(map(str, task.batches[bad]))
    assert f"Step {record['step']}: the loss of phase 'model' is not finite" in caplog.text
    assert f"Items {items} of epoch 0 with index, pixels; see " in caplog.text


def test_a_bad_gradient_names_the_whole_batch(toy, tmp_path):
    class Task(toy.Task):
        def training_step(self, batch, draws):
            for phase, loss, values in super().training_step(batch, draws):
                yield phase, loss + (self.modules["model"].layers[0].bias * 0).abs().sum().sqrt(), values

    task = Task()
    config = toy.config(tmp_path, gradient_accumulation_steps=2, max_skipped_steps=2)
    with pytest.raises(FloatingPointError, match=r"Step 2: the gradient norm.*2 times in a row. Items \d+, .*bad_bat"):
        Trainer(config).fit(task, toy.Data())
    record = json.loads((tmp_path / "bad_batch.json").read_text())
    assert record["grad_norm"] == "nan" and record["not_finite"] == "gradient norm"
    assert record["indices"] == task.batches[2] + task.batches[3]


# -------------------------------------------------------------------------------------------------------------- speed


def test_the_counter_agrees_with_pen_and_paper_and_ignores_recomputation():
    layer, pixels = nn.Linear(6, 10), torch.randn(4, 6)
    forward = 2 * 4 * 6 * 10
    with ModelFlops() as counter:
        layer(pixels).sum().backward()
    assert counter.total == 2 * forward  # the input needs no gradient
    with ModelFlops() as counter:
        checkpoint(layer, pixels.requires_grad_(), use_reentrant=False).sum().backward()
    assert counter.total == 3 * forward


def test_the_counter_knows_attention_and_changes_nothing():
    query, key, value = (torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3))
    plain = F.scaled_dot_product_attention(query, key, value)
    with ModelFlops() as counter:
        counted = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(plain, counted)
    assert counter.total == 2 * (2 * 2 * 3 * 8 * 8 * 16)


def test_flops_are_counted_again_when_a_phase_starts(toy, tmp_path):
    class Task(toy.Task):
        def training_step(self, batch, draws):
            for phase, loss, values in super().training_step(batch, draws):
                if phase == "model" or draws.step >= 3:
                    yield phase, loss, values

    trainer, task, seen = Trainer(toy.config(tmp_path)), Task(adversarial=True), []
    task.on_step = lambda step, block: seen.append(trainer.throughput.flops_per_image)
    trainer.fit(task, toy.Data())
    assert seen[1] == seen[4] and seen[5] == seen[7] > seen[1] > 0


def test_a_line_of_the_log_holds_speed_and_memory(toy, tmp_path):
    trainer, _, _ = toy.fit(toy.config(tmp_path, peak_tflops=1e-6))
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["model_flops_utilisation"] > 0
    seconds = 2 * 4 / line["images_per_second"]
    expected = trainer.throughput.flops_per_image * 2 * 4 / seconds / 1e12 / 1e-6
    assert line["model_flops_utilisation"] == pytest.approx(expected, rel=0.02)
    assert 0.05 < line["max_memory_gib"] == pytest.approx(peak_memory_gib(torch.device("cpu")), rel=0.5)
    assert known_peak_tflops(trainer.device, "no") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_for_data_is_what_the_loop_spends_without_a_batch(toy, tmp_path, workers):
    """A batch takes 80 ms to load and 160 ms to train on: a worker hides all of it but the first batch."""

    class SlowData(toy.Data):
        def __getitem__(self, key):
            time.sleep(0.02)
            return super().__getitem__(key)

    config = toy.config(
        tmp_path, num_workers=workers, max_train_steps=5, logging_steps=1, validation_steps=0, warmup_steps=0
    )
    trainer = Trainer(config)
    trainer.fit(toy.Task(on_step=lambda step, block: time.sleep(0.16)), SlowData())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    waits = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line][2:]
    if workers:
        assert np.median(waits) < 0.1
    else:
        assert 0.15 < np.median(waits) < 0.5


def test_known_peaks(monkeypatch):
    device = torch.device("cuda")

    def peak(name, precision="bf16"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return known_peak_tflops(device, precision)

    assert peak("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200", "fp16") == 989.4
    assert peak("NVIDIA H100 PCIe") == 756.0
    assert peak("NVIDIA A100-PCIE-40GB", "no") == 19.5
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak("NVIDIA A100-PCIE-40GB", "no") == 156.0
    assert peak("NVIDIA A10G") is peak("NVIDIA GeForce RTX 4090 Laptop GPU") is None


def test_throughput_resumes_its_count():
    first = Throughput(torch.device("cpu"), images_per_step=4, num_processes=1, peak_tflops=None)
    with first.working():
        torch.randn(2, 2) @ torch.randn(2, 2)
    first.end_step(["model"])
    second = Throughput(torch.device("cpu"), images_per_step=8, num_processes=1, peak_tflops=None)
    second.load_state_dict(first.state_dict())
    assert second.flops_per_image == 16 / 4 and not second.counting
    assert "model_flops_utilisation" not in second.record()


# ----------------------------------------------------------------------------------------------------------- trackers


class FakeTracker(tracking.GeneralTracker):
    name = "fake"
    requires_logging_directory = False
    instances: list[FakeTracker] = []

    def __init__(self, run_name: str, **kwargs) -> None:
        super().__init__()
        self.config, self.lines, self.pictures, self.finished = {}, [], [], False
        FakeTracker.instances.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.config = values

    def log(self, values: dict, step: int | None, **kwargs) -> None:
        self.lines.append({"step": step, **values})

    def log_images(self, values: dict, step: int | None, **kwargs) -> None:
        self.pictures += [(step, name, len(images), images[0].shape) for name, images in values.items()]

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake_trackers(monkeypatch):
    """Two of accelerate's trackers, replaced; nothing else is installed."""
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB, tracking.LoggerType.COMETML])
    for name in ("wandb", "comet_ml"):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, FakeTracker)
    monkeypatch.setattr(FakeTracker, "instances", [])
    return FakeTracker.instances


def test_trackers_get_log_pictures_and_settings(toy, tmp_path, fake_trackers):
    toy.fit(toy.config(tmp_path, report_to="wandb, comet_ml"))
    assert len(fake_trackers) == 2
    for tracker in fake_trackers:
        assert tracker.config["learning_rate"] == 1e-2 and tracker.config["output_dir"] == str(tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert tracker.lines == lines
        assert tracker.pictures == [(step, "picture", 1, (4, 4, 3)) for step in (3, 6, 8)]
        assert tracker.finished


def test_every_missing_tracker_is_an_error(toy, tmp_path, fake_trackers):
    with pytest.raises(ValueError, match="--report_to tensorboard: not installed.*available: comet_ml, wandb"):
        Trainer(toy.config(tmp_path, report_to="wandb,tensorboard"))
    assert tracker_names(None) == [] and tracker_names("wandb,") == ["wandb"]


def test_tensorboard(toy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy.fit(toy.config(tmp_path, report_to="tensorboard"))
    (folder,) = {path.parent for path in (tmp_path / "trackers").rglob("events*") if path.parent.name == "hfgen"}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("model/loss")] == [2, 4, 6, 8]
    assert [(event.step, event.width) for event in events.Images("picture")] == [(3, 4), (6, 4), (8, 4)]


# -------------------------------------------------------------------------------------------------------------- curve


def _records() -> list[dict]:
    return [
        {
            "step": step,
            "net/loss": 10.0 / step,
            "net/loss_2x2": 1.0,
            "net/learning_rate": 1e-3,
            "net/l1": 0.5,
            "images_per_second": 30.0,
            "max_memory_gib": 1.0,
        }
        for step in range(1, 101)
    ] + [{"step": 100, "validation/l1": 0.4, "validation/judge_class": 0.5, "validation/judge_shape": None}]


def test_panels_put_together_what_belongs_together():
    contents = panels(_records())
    assert list(contents) == [
        "net: loss", "net: l1", "validation: judge class", "net: learning rate", "images per second",
    ]  # fmt: skip
    assert set(contents["net: loss"]) == {"loss", "loss_2x2"}
    assert set(contents["net: l1"]) == {"l1", "validation"} and contents["net: l1"]["validation"] == [(100, 0.4)]
    assert contents["net: loss"]["loss"][:2] == [(1, 10.0), (2, 5.0)]


def test_smoothing_keeps_constants_and_the_first_value():
    assert smooth([2.0] * 5, 4) == pytest.approx([2.0] * 5)
    values = smooth([1.0, *[0.0] * 50], 5)
    assert values[0] == pytest.approx(1.0) and 0 < values[5] < 0.1 and values == sorted(values, reverse=True)


@pytest.mark.plots
def test_the_curve_is_a_picture(tmp_path):
    path = tmp_path / "curve.png"
    draw_curve([{"step": 1}], path)
    assert not path.exists()
    draw_curve(_records(), path)
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a training curve and validation points
