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
from comparisons import check_comparison, command_line, comparison_parser, stored_results
from helping import run
from pages import wrapped
from paradigms_report import BEGIN, END, draw, text, write_page
from paradigms_sampling import Quality, SamplingSettings, measure, pass_seconds
from paradigms_training import METHODS, TrainingSettings, latents, training, with_parents
from tqdm.auto import tqdm
from trainings import ROOT, Runs

from hfgen.pipelines.latents import downsample_factor
from hfgen.training.history import write_text
from hfgen.training.token_encoding import load_image_tokenizer

COMMAND = "python benchmarks/paradigms.py --runs runs/paradigms --page docs/paradigms.md"
RESULTS_FILE, PICTURE_FILE = "paradigms.json", "paradigms.png"
RESULT_PARTS = ("command", "seeds", "steps", "true_images", "training_seconds", "measures", "pass_seconds")
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
    parser.add_argument("--budget", type=int, default=400, help="optimizer steps of each method")
    parser.add_argument("--batch_size", type=int, default=128, help="images per step")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="peak, then a cosine")
    parser.add_argument("--vae", type=Path, default=VAE, metavar="DIR", help="KL autoencoder of all methods")
    parser.add_argument("--images", type=int, default=20000, help="true images to train on")
    parser.add_argument("--resolution", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--patch_size", type=int, default=2, help="of the transformers, in latents")
    parser.add_argument(
        "--guidance", type=float, default=2.0,
        help="classifier-free guidance; pairs and MeanFlow learn it, at least 1",
    )  # fmt: skip
    parser.add_argument("--pairs", type=int, default=4000, help="pairs of reflow and distillation")
    parser.add_argument("--pair_steps", type=int, default=16, help="Euler steps that make a pair")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32],
        help="passes of the samplers",
    )  # fmt: skip
    parser.add_argument("--per_class", type=int, default=10, help="images to make of each class")
    parser.add_argument("--reference", type=int, default=4800, help="true images to compare with")
    parser.add_argument(
        "--sides", type=int, nargs="*", default=[16, 32, 64, 128],
        help="sides of images whose cost per pass is measured, multiples of 4",
    )  # fmt: skip
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    counts = ("budget", "batch_size", "images", "resolution", "patch_size", "pairs", "pair_steps", "reference")
    check_comparison(parser, arguments, counts, (BEGIN, END))
    if min(arguments.steps) < 1 or arguments.per_class < 2:
        parser.error("--steps must be at least 1 and --per_class at least 2.")
    if arguments.from_results is None:
        check_autoencoder(parser, arguments)
    if any(side < 4 or side % 4 for side in arguments.sides):
        parser.error(f"--sides are {arguments.sides}; the U-Net needs multiples of 4.")
    return arguments


def check_autoencoder(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program without it, or if images of this resolution give no whole latents, or these no whole patches."""
    if not (ROOT / arguments.vae).is_dir():
        parser.error(f"--vae {arguments.vae} is not a folder; train one with examples/train_autoencoder_kl.py.")
    factor = downsample_factor(load_image_tokenizer(str(ROOT / arguments.vae)))
    if arguments.resolution % factor:
        parser.error(
            f"--resolution is {arguments.resolution}; the autoencoder {arguments.vae} needs a multiple of {factor}."
        )
    transformers = not all(name.startswith("unet") for name in arguments.methods)
    if transformers and arguments.resolution // factor % arguments.patch_size:
        parser.error(
            f"--patch_size is {arguments.patch_size}; it must divide the {arguments.resolution // factor} latents in "
            f"a row of images of {arguments.resolution} pixels."
        )


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
        results = stored_results(arguments.from_results, RESULT_PARTS, METHODS)
    print(wrapped(text(results)))
    if arguments.page is not None:
        write_page(arguments.page, results)
    else:
        draw((arguments.runs or arguments.from_results.parent) / PICTURE_FILE, results)


if __name__ == "__main__":
    run(main)
