"""VARPipeline against the official code in one process, with the same weights: equal tokens first, then the times.

    git clone https://github.com/FoundationVision/VAR
    python benchmarks/official_var.py VAR --threads 2

The weights are random (speed does not depend on them); the converter carries them from the official model to ours.
Both sample greedily with guidance on, alternately. The table gives medians and minima in seconds, for the whole call
and without the decoder, by the clock and of the CPU, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from helping import HelpFormatter, check_clone, check_counts, run
from torch import Tensor, nn

from hfgen import VARPipeline
from hfgen.conversion import load_original
from hfgen.counters import generator

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
STRUCTURAL = ("attn_bias_for_masking", "zero_k_bias", "lvl_1L", "scale_mul", "ema_vocab_hit_SV")  # not random
COLUMNS = ("whole call", "transformer", "whole call, CPU", "transformer, CPU")


class Stopwatch:
    """Seconds spent inside one function during the last call: by the clock, and of all CPU threads together."""

    def __init__(self, function: Callable):
        self.function, self.wall, self.cpu = function, 0.0, 0.0

    def __call__(self, *arguments):
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.function(*arguments)
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu
        return result


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Random weights under which activations keep their size from layer to layer."""
    draws = generator(seed)
    for name, value in module.state_dict().items():
        if not any(part in name for part in STRUCTURAL):
            noise = torch.randn(value.shape, generator=draws)
            if value.ndim >= 2:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return module.eval()


class Official:
    """The official model of a depth; ``sample`` gives codes and pixels."""

    def __init__(self, repository: Path, depth: int):
        sys.path.insert(0, str(repository))
        models = importlib.import_module("models")
        with contextlib.redirect_stdout(io.StringIO()):
            self.vae, self.var = models.build_vae_var(
                device="cpu", patch_nums=PATCH_NUMS, V=4096, Cvae=32, ch=160, share_quant_resi=4, num_classes=1000,
                depth=depth, shared_aln=False, attn_l2_norm=True,
            )  # fmt: skip
        fill(self.vae, 0)
        fill(self.var, 1)
        self.decoder = self.vae.fhat_to_img = Stopwatch(self.vae.fhat_to_img)
        self.codes: list[Tensor] = []
        module = importlib.import_module("models.var")
        draw = module.sample_with_top_k_top_p_

        def recorded(*arguments, **options):
            indices = draw(*arguments, **options)
            self.codes.append(indices[..., 0])
            return indices

        module.sample_with_top_k_top_p_ = recorded

    def sample(self, labels: list[int]) -> tuple[Tensor, Tensor]:
        self.codes.clear()
        pixels = self.var.autoregressive_infer_cfg(
            len(labels), torch.tensor(labels), g_seed=0, cfg=1.5, top_k=1, top_p=0.0
        )
        return torch.cat(self.codes, dim=1), pixels


class Ours:
    """The pipeline with the weights of an :class:`Official`."""

    def __init__(self, official: Official, fuse: bool):
        vq_model = load_original("var", official.vae.state_dict(), part="vae")
        transformer = load_original("var", official.var.state_dict(), part="transformer")
        if fuse:
            transformer.fuse_qkv_projections()
        self.pipe = VARPipeline(vq_model, transformer)
        self.pipe.set_progress_bar_config(disable=True)
        self.decoder = vq_model.decoder.forward = Stopwatch(vq_model.decoder.forward)

    def sample(self, labels: list[int]) -> tuple[Tensor, Tensor]:
        codes: list[Tensor] = []

        def keep(pipe, scale, side, tensors):
            codes.append(tensors["codes"])
            return {}

        pixels = self.pipe(
            labels, guidance_scale=2.5, top_k=1, top_p=1.0, output_type="pt",
            callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["codes"],
        ).images  # fmt: skip
        return torch.cat(codes, dim=1), pixels


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("repository", type=Path, help="a clone of FoundationVision/VAR; its code is run")
    parser.add_argument("--depth", type=int, default=16, help="blocks of the transformer")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per call")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="calls of each, in turns; at least 2")
    parser.add_argument("--fuse", action="store_true", help="with transformer.fuse_qkv_projections()")
    arguments = parser.parse_args()
    check_clone(parser, arguments.repository, "FoundationVision/VAR", "models/var.py")
    check_counts(parser, arguments, ("depth", "batch", "threads"))
    check_counts(parser, arguments, ("repeats",), least=2)

    torch.set_num_threads(arguments.threads)
    official = Official(arguments.repository, arguments.depth)
    ours = Ours(official, arguments.fuse)
    labels = [(207 + 7 * index) % 1000 for index in range(arguments.batch)]
    (expected, expected_pixels), (codes, pixels) = official.sample(labels), ours.sample(labels)
    if not torch.equal(codes, expected):
        raise SystemExit(f"Tokens differ: {(codes != expected).sum()} of {codes.numel()}; nothing was timed.")
    difference = (pixels - expected_pixels).abs().max().item()

    times: dict[str, list[tuple[float, ...]]] = {"official": [], "hfgen": []}
    order = [("official", official), ("hfgen", ours)]
    for _ in range(arguments.repeats):
        for name, model in order:
            whole = Stopwatch(model.sample)
            whole(labels)
            decoder = model.decoder
            times[name].append((whole.wall, whole.wall - decoder.wall, whole.cpu, whole.cpu - decoder.cpu))
        order.reverse()
    print(f"torch {torch.__version__}, d{arguments.depth}, {arguments.batch} image(s), {arguments.threads} thread(s)")
    print(f"tokens equal: {codes.numel()} of {codes.numel()}; largest pixel difference {difference:.1e}")
    print("| | " + " | ".join(f"{column}, median s | min s" for column in COLUMNS) + " |")
    print("|---" * (1 + 2 * len(COLUMNS)) + "|")
    summary = {}
    for name, values in times.items():
        summary[name] = [f(column) for column in zip(*values) for f in (statistics.median, min)]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in summary[name]) + " |")
    ratios = [theirs / mine for theirs, mine in zip(summary["official"], summary["hfgen"])]
    print("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    # A call and the next one see nearly the same machine, however its speed changes in minutes.
    pairs = [theirs[0] / mine[0] for theirs, mine in zip(times["official"], times["hfgen"])]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    print(f"official / hfgen in {len(pairs)} pairs of calls: median {middle:.2f}, quartiles {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    run(main)
