"""Sampling speed: the pipeline against a plain path that does the same work naively, equal tokens asserted first.

    python benchmarks/sampling.py --system var
    python benchmarks/sampling.py --system var --size var-d16 --batch 1 --threads 2 --dtype float32 bfloat16

Both paths run alternately in one process. The table gives seconds per call (median of --repeats), their ratio, images
per second, and for the transformer the floating-point rate as a share of what a large matrix product reaches here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from plain_var import sample_plain
from torch.utils.flop_counter import FlopCounterMode

from hfgen import MultiScaleVQVAE, VARPipeline, VARTransformer

ZOO = Path(__file__).resolve().parent.parent / "zoo" / "var-shapes"
GUIDANCE_SCALE = 2.5


def make_pipeline(size: str, dtype: torch.dtype, device: str) -> VARPipeline:
    """The bundled model, or a published size with seeded random weights (speed does not depend on them)."""
    if size == "zoo":
        pipe = VARPipeline.from_pretrained(ZOO, dtype=dtype)
    else:
        torch.manual_seed(0)
        transformer = VARTransformer.from_preset(size)
        for parameter in transformer.parameters():  # the initial head is nearly constant: greedy codes would be ties
            torch.nn.init.normal_(parameter, std=0.02)
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        tokenizer = MultiScaleVQVAE.from_preset("var-vqvae-512" if size == "var-d36" else "var-vqvae")
        torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
        pipe = VARPipeline(tokenizer.eval(), transformer.eval())
        pipe.to(dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_optimised(pipe: VARPipeline, class_labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy codes and pixels of the pipeline."""
    codes = []

    def keep(pipe, scale, side, tensors):
        codes.append(tensors["codes"])
        return {}

    images = pipe(
        class_labels,
        guidance_scale=GUIDANCE_SCALE,
        top_k=1,
        top_p=1.0,
        output_type="pt",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["codes"],
    ).images
    return torch.cat(codes, dim=1), images * 2 - 1


def sample_codes_only(pipe: VARPipeline, class_labels: list[int]) -> torch.Tensor:
    """The transformer's part of a call."""
    return pipe(class_labels, guidance_scale=GUIDANCE_SCALE, top_k=1, top_p=1.0, output_type="latent").images


def timed(function: Callable, *arguments) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    started = time.perf_counter()
    function(*arguments)
    synchronize()
    return time.perf_counter() - started


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a square matrix product of 2048, the best of five."""
    left, right = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    timed(torch.mm, left, right)
    return 2 * 2048**3 / min(timed(torch.mm, left, right) for _ in range(5))


def measure(pipe: VARPipeline, batch: int, threads: int, repeats: int) -> dict[str, float | int | str]:
    torch.set_num_threads(threads)
    num_classes = pipe.transformer.config.num_classes
    labels = [(7 * index) % num_classes for index in range(batch)]
    plain_codes, plain_pixels = sample_plain(pipe, labels, GUIDANCE_SCALE)
    codes, pixels = sample_optimised(pipe, labels)
    if not torch.equal(codes, plain_codes):
        raise SystemExit(f"Tokens differ: {(codes != plain_codes).sum()} of {codes.numel()}; nothing was timed.")
    difference = (pixels.float() - plain_pixels.float()).abs().max().item()

    with FlopCounterMode(display=False) as counter:
        sample_codes_only(pipe, labels)
    times = {"plain": [], "optimised": [], "transformer": []}
    for _ in range(repeats):
        times["plain"].append(timed(sample_plain, pipe, labels, GUIDANCE_SCALE))
        times["optimised"].append(timed(sample_optimised, pipe, labels))
        times["transformer"].append(timed(sample_codes_only, pipe, labels))
    median = {name: statistics.median(values) for name, values in times.items()}
    rate = counter.get_total_flops() / median["transformer"]
    dtype = pipe.transformer.dtype
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "batch": batch,
        "plain_s": median["plain"],
        "optimised_s": median["optimised"],
        "ratio": median["plain"] / median["optimised"],
        "transformer_s": median["transformer"],
        "images_per_s": batch / median["optimised"],
        "gemm_share": rate / gemm_rate(dtype, str(pipe.device)),
        "max_pixel_difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=["var"], default="var")
    sizes = ["zoo", *VARTransformer.presets]
    parser.add_argument("--size", choices=sizes, default="zoo", help="the bundled model or a published size")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="images per call")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="CPU threads")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()

    rows = []
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {capability}, {arguments.size}, greedy, guidance on")
    print("| dtype | threads | batch | plain s | optimised s | ratio | transformer s | images/s | GEMM share |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in arguments.dtype:
        pipe = make_pipeline(arguments.size, getattr(torch, dtype), arguments.device)
        for threads in arguments.threads:
            for batch in arguments.batch:
                row = measure(pipe, batch, threads, arguments.repeats)
                rows.append(row)
                print(
                    f"| {row['dtype']} | {threads} | {batch} | {row['plain_s']:.3f} | {row['optimised_s']:.3f} | "
                    f"{row['ratio']:.2f} | {row['transformer_s']:.3f} | {row['images_per_s']:.2f} | "
                    f"{row['gemm_share']:.0%} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
