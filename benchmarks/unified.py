"""Text and images in one transformer: what Transfusion's choices do, by training small models that differ in one.

    python benchmarks/unified.py --runs runs/unified --page docs/claims.md
    python benchmarks/unified.py --runs runs/unified --models discrete-0 discrete-0.1 robust --seeds 0
    python benchmarks/unified.py --from_results runs/unified/unified.json --page docs/claims.md

Trains with the scripts of examples/ on captioned shapes with one object, and measures on captions and images that
training never reads:

    linear-P, unet-P  continuous images in patches of P latents, through linear layers or a U-Net; "causal": ablation
    text, joint       text alone, and text in every second batch beside images
    discrete-S        codes of latents with noise of standard deviation S
    robust            decoding noisy latents, before and after fine-tuning the decoder on them

A table, a picture and a sentence for each claim come out, of the models and seeds that are asked for. What is finished
in --runs is kept: a killed comparison continues, and one with more seeds or models trains only those.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from comparisons import check_comparison, command_line, comparison_parser, stored_results
from helping import run
from pages import wrapped
from tqdm.auto import tqdm
from trainings import ROOT, Runs, Training
from unified_measure import Judge, Settings, last_validation
from unified_report import BEGIN, END, page_part, picture_name, write_page
from unified_training import CONTINUOUS, DATA, DISCRETE, TEXT, Plan, chain

from hfgen.images import make_grid, save_png
from hfgen.training.history import write_text

COMMAND = "python benchmarks/unified.py --runs runs/unified --page docs/claims.md"
RESULTS_FILE, PICTURES = "unified.json", "pictures"
RESULT_PARTS = ("command", "seeds", "true_images", "training_seconds", "measures")
VAE = Path("zoo/transfusion-shapes/vae")  # below the folder of the repository
MODELS = ("robust", *TEXT, *CONTINUOUS, *DISCRETE)
SHOWN = 12  # drawn images of each model
TRIAL = ("--batch_size", "4", "--limit", "16", "--num_validation_images", "4")


def build_parser() -> argparse.ArgumentParser:
    parser = comparison_parser(__doc__, RESULTS_FILE)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME",
        help=f"of {', '.join(MODELS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--vae", type=Path, default=VAE, metavar="DIR",
        help="KL autoencoder of all models, with 8x8 latents for 32 pixels",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=500, help="of each transformer")
    parser.add_argument("--decoder_steps", type=int, default=600, help="of each fine-tuning of the decoder")
    parser.add_argument("--images", type=int, default=240, help="to draw and to write about")
    parser.add_argument("--reference", type=int, default=2000, help="true images to compare with")
    parser.add_argument("--denoising_steps", type=int, default=25, help="of continuous images")
    parser.add_argument("--guidance", type=float, default=2.0, help="classifier-free, 1 is off")
    return parser


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    arguments = parser.parse_args()
    if arguments.quick:
        small = {"steps": 2, "decoder_steps": 2, "images": 8, "reference": 96, "denoising_steps": 2}
        vars(arguments).update(small)
    check_comparison(parser, arguments, ("steps", "decoder_steps", "denoising_steps"), (BEGIN, END))
    if min(arguments.images, arguments.reference) < 2:
        parser.error("--images and --reference must be at least 2.")
    if arguments.from_results is None and not (ROOT / arguments.vae).is_dir():
        parser.error(f"--vae {arguments.vae} is not a folder; train one with examples/train_autoencoder_kl.py.")
    return arguments


def measure(training: Training, runs: Runs, judge: Judge, seed: int, progress: bool) -> dict:
    """The last validation of a training, and what its pipeline draws and writes, if it does."""
    values = last_validation(runs.folder / training.name)
    if training.script == "train_transfusion" and training.settings.get("text_only_share") is None:
        found, pixels = judge(runs.final(training), seed, progress=progress)
        values |= found
        picture = runs.folder / PICTURES / picture_name(*training.name.split("/"))
        save_png(make_grid(pixels[:SHOWN], columns=SHOWN), picture)
    return values


def compare(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict:
    """Train and measure what is not there yet; all numbers, which are also kept in the folder of the runs."""
    progress = not arguments.no_progress
    torch.set_num_threads(arguments.threads)
    runs = Runs(arguments.runs.resolve(), extra=TRIAL if arguments.quick else (), threads=arguments.threads)
    plan = Plan(runs, arguments.vae, arguments.steps, arguments.decoder_steps, validation_images=96)
    settings = Settings(arguments.images, arguments.reference, arguments.denoising_steps, arguments.guidance, 60)
    judge = Judge(settings, DATA["dataset"])
    results = {
        "command": command_line(COMMAND, parser, arguments),
        "seeds": arguments.seeds,
        "true_images": judge.of_true_images(),
        "training_seconds": {},
        "measures": {},
    }
    wanted = [(name, seed, plan.model(name, seed)) for seed in arguments.seeds for name in arguments.models]
    for name, seed, training in (bar := tqdm(wanted, desc="train and measure", disable=not progress)):
        bar.set_postfix_str(training.name)
        seconds = [runs.train(each) for each in chain(training)][-1]
        results["training_seconds"].setdefault(name, {})[str(seed)] = seconds
        work = partial(measure, training, runs, judge, seed, progress)
        results["measures"].setdefault(name, {})[str(seed)] = runs.measured(training, vars(settings), work)
        write_text(runs.folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = build_parser()
    arguments = parse_arguments(parser)
    if arguments.from_results is None:
        results = compare(parser, arguments)
    else:
        results = stored_results(arguments.from_results, RESULT_PARTS, MODELS)
    print(wrapped(page_part(results)))
    if arguments.page is not None:
        folder = arguments.runs if arguments.from_results is None else arguments.from_results.parent
        write_page(arguments.page, results, folder / PICTURES)


if __name__ == "__main__":
    run(main)
