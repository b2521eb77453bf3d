"""Diffusion, rectified flow and MeanFlow on equal terms: same data, network size, images seen, noise and judge.

    python benchmarks/paradigms.py --runs runs/paradigms --page docs/paradigms.md
    python benchmarks/paradigms.py --runs runs/paradigms --methods flow reflow distilled --seeds 0
    python benchmarks/paradigms.py --from_results runs/paradigms/paradigms.json --page docs/paradigms.md

The scripts of examples/ train a U-Net and a DiT for diffusion, a DiT for rectified flow, its reflow and distillation,
MeanFlow, and two forms of trajectory matching, on latents of the built-in shapes. Each is sampled with growing numbers
of steps. A table, a picture and a sentence for each claim come out, of the methods and seeds that are asked for. What
is finished in --runs is kept: a killed comparison continues, and one with more seeds or methods trains only those.
--from_results makes the report again from the stored numbers.
"""

from __future__ import annotations

import argparse
import json
import logging
from functools import partial
from pathlib import Path

import torch
from comparisons import check_counts, command_line, comparison_parser
from paradigms_report import draw, text, write_page
from paradigms_sampling import Quality, SamplingSettings, measure, pass_seconds
from paradigms_training import METHODS, TrainingSettings, latents, training, with_parents
from tqdm.auto import tqdm
from trainings import ROOT, Runs

from hfgen.training.history import write_text

COMMAND = "python benchmarks/paradigms.py --runs runs/paradigms --page docs/paradigms.md"
RESULTS_FILE, PICTURE_FILE = "paradigms.json", "paradigms.png"
VAE = Path("zoo/transfusion-shapes/vae")  # below the folder of the repository
QUICK = {
    "budget": 2, "batch_size": 4, "images": 64, "resolution": 16, "pairs": 8, "pair_steps": 2, "steps": [1, 4],
    "per_class": 2, "reference": 96, "sides": [16, 32],
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = comparison_parser(__doc__, RESULTS_FILE)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"of {', '.join(METHODS)}; what they build on is added (default: all)",
    )  # fmt: skip
    parser.add_argument("--budget", type=int, default=400, help="optimizer steps of each method (default: 400)")
    parser.add_argument("--batch_size", type=int, default=128, help="images per step (default: 128)")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="peak, then a cosine (default: 0.01)")
    parser.add_argument(
        "--vae", type=Path, default=VAE, metavar="DIR", help=f"KL autoencoder of all methods (default: {VAE})"
    )
    parser.add_argument("--images", type=int, default=20000, help="true images to train on (default: 20000)")
    parser.add_argument("--resolution", type=int, default=32, help="side of the images in pixels (default: 32)")
    parser.add_argument("--patch_size", type=int, default=2, help="of the transformers, in latents (default: 2)")
    parser.add_argument(
        "--guidance", type=float, default=2.0,
        help="classifier-free guidance; pairs and MeanFlow learn it, at least 1 (default: 2)",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=4000, help="pairs of reflow and distillation (default: 4000)")
    parser.add_argument("--pair_steps", type=int, default=16, help="Euler steps that make a pair (default: 16)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32],
        help="passes of the samplers (default: 1 2 4 8 16 32)",
    )  # fmt: skip
    parser.add_argument("--per_class", type=int, default=10, help="images to make of each class (default: 10)")
    parser.add_argument("--reference", type=int, default=4800, help="true images to compare with (default: 4800)")
    parser.add_argument(
        "--sides", type=int, nargs="*", default=[16, 32, 64, 128],
        help="sides of images whose cost per pass is measured, multiples of 4 (default: 16 32 64 128)",
    )  # fmt: skip
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    check_counts(parser, arguments, ("budget", "batch_size", "images", "pairs", "pair_steps", "threads"))
    if min(arguments.steps) < 1 or arguments.per_class < 2:
        parser.error("--steps must be at least 1 and --per_class at least 2.")
    if arguments.from_results is None and not (ROOT / arguments.vae).is_dir():
        parser.error(f"--vae {arguments.vae} is not a folder; train one with examples/train_autoencoder_kl.py.")
    if any(side < 4 or side % 4 for side in arguments.sides):
        parser.error(f"--sides are {arguments.sides}; the U-Net needs multiples of 4.")
    return arguments


def compare(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict:
    """Train and measure what is not there yet; all numbers, which are also kept in the folder of the runs."""
    threads, progress = arguments.threads, not arguments.no_progress
    settings = TrainingSettings(
        budget=arguments.budget,
        batch_size=arguments.batch_size,
        vae=arguments.vae,
        images=arguments.images,
        resolution=arguments.resolution,
        patch_size=arguments.patch_size,
        learning_rate=arguments.learning_rate,
        guidance=arguments.guidance,
        num_pairs=arguments.pairs,
        pair_steps=arguments.pair_steps,
    )
    runs = Runs(arguments.runs.resolve(), threads=threads)
    sampling = SamplingSettings(
        steps=tuple(sorted(set(arguments.steps))),
        per_class=arguments.per_class,
        reference=arguments.reference,
        resolution=arguments.resolution,
        guidance=arguments.guidance,
        batch_size=60,
    )
    quality = Quality(sampling)
    torch.set_num_threads(threads)
    results = {
        "command": command_line(COMMAND, parser, arguments),
        "training": vars(settings) | {"vae": str(settings.vae)},
        "seeds": arguments.seeds,
        "steps": sampling.steps,
        "true_images": quality.of_true_images(),
        "training_seconds": {},
        "measures": {},
    }
    runs.train(latents(settings))
    plan = [(seed, name) for seed in arguments.seeds for name in with_parents(arguments.methods)]
    for seed, name in tqdm(plan, desc="methods and seeds", disable=not progress):
        run = training(name, seed, settings, runs.folder)
        results["training_seconds"].setdefault(name, {})[str(seed)] = runs.train(run)
        judge = partial(measure, name, seed, quality, runs.final(run), progress=progress)
        measured = runs.measured(run, vars(sampling), judge)
        results["measures"].setdefault(name, {})[str(seed)] = measured
    results["pass_seconds"] = pass_seconds(arguments.sides, threads=threads) if arguments.sides else {}
    write_text(arguments.runs / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    parser = build_parser()
    arguments = parse_arguments(parser)
    if arguments.from_results is None:
        results = compare(parser, arguments)
    else:
        results = json.loads(arguments.from_results.read_text(encoding="utf-8"))
    print(text(results))
    if arguments.page is not None:
        write_page(arguments.page, results)
    else:
        draw((arguments.runs or arguments.from_results.parent) / PICTURE_FILE, results)


if __name__ == "__main__":
    main()
