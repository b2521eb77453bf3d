"""The parts of the engine one by one: schedules, batches, draws, averages, parameter groups, log."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from hfgen.training.batches import BlockSampler, Draws, collate
from hfgen.training.ema import EMA
from hfgen.training.history import History, Window
from hfgen.training.param_groups import parameter_groups
from hfgen.training.schedules import learning_rate, weight_decay


def _take(sampler: BlockSampler, count: int) -> list:
    batches = iter(sampler)
    return [next(batches) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {10: 2.0, 60: 2.0, 110: 2.0}),
        (
            "cosine",
            {10: 2.0, 60: 2.0 * (0.1 + 0.9 * 0.5), 110: 0.2, 35: 2 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4)))},
        ),
        ("linear", {10: 2.0, 60: 2.0 * 0.55, 110: 0.2}),
        ("lin0", {10: 2.0, 14: 2.0, 60: 2.0 * (0.1 + 0.9 * 0.5 / 0.95), 110: 0.2}),
    ],
)
def test_learning_rate(schedule, expected):
    """111 steps, 10 of them warm-up, so that step 10 + n is n percent of the rest."""

    def rate(step):
        return learning_rate(step, schedule=schedule, peak=2.0, max_steps=111, warmup_steps=10, final=0.1)

    assert rate(0) == pytest.approx(2.0 * 0.005)
    assert rate(5) == pytest.approx(2.0 * (0.005 + 0.995 * 0.5))
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value), step


def test_learning_rate_edges():
    assert learning_rate(0, schedule="cosine", peak=1.0, max_steps=1) == 1.0
    assert learning_rate(500, schedule="linear", peak=1.0, max_steps=100, final=0.25) == 0.25
    with pytest.raises(ValueError, match="choose one of"):
        learning_rate(0, schedule="step", peak=1.0, max_steps=10)


def test_weight_decay():
    assert weight_decay(7, start=0.05, end=None, max_steps=11) == 0.05
    values = [weight_decay(step, start=0.05, end=0.08, max_steps=11) for step in (0, 5, 10, 20)]
    assert values == pytest.approx([0.05, 0.065, 0.08, 0.08])


# ------------------------------------------------------------------------------------------------------------ batches


def test_every_epoch_is_a_new_permutation():
    batches = _take(BlockSampler(12, 3, seed=1), 8)
    epochs = [[index for batch in batches[first : first + 4] for _, index in batch] for first in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert [epoch for batch in batches for epoch, _ in batch] == [0] * 12 + [1] * 12
    assert _take(BlockSampler(12, 3, seed=2), 8) != batches


def test_processes_share_what_accumulation_does_in_turn():
    alone = _take(BlockSampler(21, 2, accumulation=4, seed=3), 24)
    ranks = [_take(BlockSampler(21, 2, accumulation=2, rank=rank, world_size=2, seed=3), 12) for rank in (0, 1)]
    assert [batch for pair in zip(*ranks) for batch in pair] == alone


def test_starting_later_equals_skipping():
    options = {"accumulation": 2, "rank": 1, "world_size": 2, "seed": 3}
    assert _take(BlockSampler(21, 2, start_step=5, **options), 6) == _take(BlockSampler(21, 2, **options), 16)[10:]


def test_a_last_incomplete_batch_is_dropped():
    sampler = BlockSampler(11, 4)
    assert sampler.steps_per_epoch == 2
    assert [batch[0][0] for batch in _take(sampler, 3)] == [0, 0, 1]
    assert {len(batch) for batch in _take(sampler, 5)} == {4}


def test_too_few_images_is_an_error():
    with pytest.raises(ValueError, match="15 items, fewer than one global batch of 16.*lower --batch_size"):
        BlockSampler(15, 4, accumulation=2, world_size=2)


def test_draws_depend_on_every_counter_only():
    def draw(seed=0, step=0, block=0, stream=0):
        return torch.rand(4, generator=Draws(seed, step, block, torch.device("cpu")).generator(stream))

    assert torch.equal(draw(), draw())
    for change in ({"seed": 1}, {"step": 1}, {"block": 1}, {"stream": 1}):
        assert not torch.equal(draw(), draw(**change)), change


def test_collate():
    items = [{"pixels": torch.full((1, 2), i), "label": i, "caption": str(i), "skipped": ("a",) * i} for i in range(3)]
    batch = collate(items)
    assert batch["pixels"].shape == (3, 1, 2)
    assert batch["label"].tolist() == [0, 1, 2]
    assert batch["caption"] == ["0", "1", "2"]
    assert batch["skipped"] == [(), ("a",), ("a", "a")]


# ------------------------------------------------------------------------------------------------------------ average


def test_average_follows_parameters_and_copies_buffers():
    module = nn.BatchNorm1d(2)
    average = EMA(module, 0.75, warmup=False)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(5.0)
        module.num_batches_tracked.fill_(7)
    average.update(module, 0)
    assert average.module.weight.tolist() == [1.5, 1.5]
    assert average.module.running_mean.tolist() == [5.0, 5.0]
    assert average.module.num_batches_tracked == 7
    assert not average.module.training and not any(p.requires_grad for p in average.module.parameters())
    assert module.weight.tolist() == [3.0, 3.0] and module.training


def test_average_warmup():
    average = EMA(nn.Linear(1, 1), 0.9)
    assert [average.decay_at(n) for n in (0, 10, 1000)] == [0.1, 0.55, 0.9]
    with pytest.raises(ValueError, match="between 0 and 1"):
        EMA(nn.Linear(1, 1), 1.0)


def test_parameter_groups():
    module = nn.ModuleDict({"proj": nn.Linear(2, 3), "norm": nn.LayerNorm(3), "table": nn.Embedding(2, 2)})
    module["proj"].requires_grad_(True)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    decayed, exempt = parameter_groups([module, frozen], no_decay=("table",))
    assert decayed["decay"] and [p.shape for p in decayed["params"]] == [(3, 2)]
    assert not exempt["decay"] and len(exempt["params"]) == 4


# ---------------------------------------------------------------------------------------------------------------- log


def test_window_means():
    window = Window()
    window.add({"a": torch.tensor(1.0), "b": 2})
    window.add({"a": 3.0})
    assert window.means() == {"a": 2.0, "b": 2.0}
    assert window.means() == {}


def test_history_cuts_the_repeated_future_and_a_broken_line(tmp_path):
    history = History(tmp_path, resumed_step=0)
    for step in (1, 2, 3):
        history.append({"step": step, "x/loss": float("nan") if step == 2 else 1.0})
    with history.path.open("a") as file:
        file.write('{"step": 4, "x/lo')
    history = History(tmp_path, resumed_step=2)
    assert [record["step"] for record in history.records] == [1, 2]
    history.append({"step": 3})
    records = [json.loads(line) for line in history.path.read_text().splitlines()]
    assert records == [{"step": 1, "x/loss": 1.0}, {"step": 2, "x/loss": None}, {"step": 3}]


@pytest.mark.plots
def test_curve(tmp_path):
    from PIL import Image

    history = History(tmp_path, resumed_step=0)
    for step in range(5):
        history.append({"step": step, "x/loss": 1.0 / (step + 1), "validation/psnr": 3.0 if step == 4 else None})
    history.plot()
    with Image.open(tmp_path / "training_curve.png") as image:
        assert (
            image.width > 500
            and len(
                set(
                    image.convert("L").get_flattened_data()
                    if hasattr(image, "get_flattened_data")
                    else image.convert("L").getdata()
                )
            )
            > 10
        )
    assert not list(tmp_path.glob("*.tmp"))
