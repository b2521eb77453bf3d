"""The comparison of Transfusion in benchmarks/sampling.py: both paths make the same, and ours does less."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support.benchmark_modules import benchmark_modules


@pytest.fixture
def benchmark(monkeypatch):
    module = benchmark_modules("speed_transfusion")["speed_transfusion"]
    monkeypatch.setattr(module, "CONTEXTS", (64,))
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "TOKENS", 4)
    return module


@torch.no_grad()
def test_equal_results_for_less_work(benchmark):
    image, text = benchmark.compare(benchmark.load("tiny", torch.float32, "cpu"), batch=1)
    operations = []
    for path in (image.plain, image.optimised):
        with FlopCounterMode(display=False) as counter:
            path()
        operations.append(counter.get_total_flops())
    # The context of 64 tokens, its scores, and a full mask are saved; the image's own 512 tokens remain.
    assert operations[1] < 0.85 * operations[0]
    assert torch.equal(text.plain()[0], text.optimised()[0])
    assert text.items == 4


@torch.no_grad()
def test_the_zoo_draws_the_same_either_way(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "ZOO_STEPS", 2)
    (image,) = benchmark.compare(benchmark.load("zoo", torch.float32, "cpu"), batch=2)
    torch.testing.assert_close(image.optimised()[1], image.plain()[1], rtol=0, atol=1e-3)
    assert image.part == "image of a caption"


def test_other_images_are_not_timed(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "sample_plain", lambda *arguments: torch.full((1, 3, 32, 32), 3.0))
    with pytest.raises(SystemExit, match="image after 64: the two images differ"):
        benchmark.compare(benchmark.load("tiny", torch.float32, "cpu"), batch=1)
