"""How reconstruction and generation depend on the tokens: the measurements, curves and pictures of docs/tokens.md.

    python benchmarks/tokens.py --runs runs/tokens --parts number grid stages
    python benchmarks/tokens.py --runs runs/tokens --parts steps --titok_pipeline DIR --grid_pipeline DIR

Trains with the example scripts on the built-in shapes and measures on images of a split that training never reads:

    number   TiTok in a single stage with 4, 8, 16 and 32 tokens
    grid     TiTok with 4 and 16 tokens against a VQGAN with a grid of as many codes
    stages   TiTok with 16 tokens in two stages against direct training, with as many decoder steps in all
    steps    trained MaskGIT pipelines, by the number of sampling steps

Everything is kept in --runs: a training that is there with the same settings is not repeated, and results.json has
the numbers. The parts of the page between its markers are rewritten; without any --parts, from results.json alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparisons import check_page
from helping import HelpFormatter, check_counts, check_runs, check_saved, read_object, run
from pages import with_section
from tokens_measure import BATCH, reconstruct, sample, save_curves, save_rows, unseen_images
from tokens_page import markers, section
from tokens_training import (
    COMMON,
    GRIDS,
    NUM_CODES,
    PROXY_PATCH_SIZE,
    SINGLE_PATCH_SIZE,
    proxy_vqgan,
    titok,
    two_stages,
)
from tokens_training import grid as grid_training
from torch import Tensor
from tqdm import tqdm
from trainings import ROOT, Runs, Training

from hfgen import MaskGITPipeline
from hfgen.auto import AutoModel
from hfgen.data.shapes import CLASS_NAMES
from hfgen.evaluation.judge import judge_labels
from hfgen.training.history import write_text

PAGE = ROOT / "docs" / "tokens.md"
NUMBERS = (4, 8, 16, 32)
STAGE_TOKENS = 16
STEPS = (1, 2, 4, 8, 12, 16)
TRIAL = ("--batch_size", "4", "--limit", "8", "--num_validation_images", "2")


@dataclass(frozen=True)
class Setup:
    """What all parts share; the fields are the arguments of the command line, read."""

    runs: Runs
    steps: int
    stage_steps: int
    seeds: tuple[int, ...]
    pixels: Tensor
    labels: Tensor
    images: Path
    vqgan: Path | None
    pipelines: dict[str, Path]
    per_class: int
    progress: bool

    def measure(
        self, trainings: Sequence[tuple[Training, ...]], **columns: Sequence[Any]
    ) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The reconstructions and the row of each model.

        Args:
            trainings: for each model the trainings that make it, of which the last one has the result.
            columns: more columns of the rows, by name.
        """
        samples, rows = [], []
        bar = tqdm(trainings, desc="train and measure", unit="model", disable=not self.progress)
        for position, chain in enumerate(bar):
            seconds = 0.0
            for training in chain:
                bar.set_postfix_str(training.name)
                seconds += self.runs.train(training)
            restored, row = reconstruct(self.runs.load(chain[-1]), self.pixels, self.labels)
            samples.append(restored)
            rows.append({name: values[position] for name, values in columns.items()} | row | {"cpu_seconds": seconds})
        return samples, rows

    def describe(self, what: str) -> str:
        """The settings of a part, for the page."""
        unseen = f"{len(self.pixels)} unseen images"
        return f"{what}; {COMMON['batch_size']} images per step, codebooks of {NUM_CODES}; measured on {unseen}."


def number(setup: Setup) -> dict[str, Any]:
    samples, rows = setup.measure([(titok(each, setup.steps),) for each in NUMBERS])
    names = {"psnr": "PSNR of reconstructions (dB)", "judge": "judge accuracy"}
    x = [row["tokens"] for row in rows]
    panels = {title: {"TiTok": (x, [row[name] for row in rows])} for name, title in names.items()}
    save_curves(panels, "tokens", setup.images / "tokens_number.png")
    save_rows([setup.pixels, *samples], setup.images / "tokens_number_images.png")
    order = ", ".join(map(str, NUMBERS))
    return {
        "settings": setup.describe(
            f"TiTok in a single stage, patches of {SINGLE_PATCH_SIZE} pixels, {setup.steps} training steps"
        ),
        "pictures": {
            "tokens_number.png": "PSNR and judge accuracy over the number of tokens",
            "tokens_number_images.png": f"From top to bottom: unseen images, and what {order} tokens keep of them",
        },
        "judge_on_images": judge_labels(setup.pixels, setup.labels)["label"],
        "rows": rows,
    }


def grid(setup: Setup) -> dict[str, Any]:
    trainings = [(make(tokens, setup.steps),) for tokens in GRIDS for make in (titok, grid_training)]
    samples, rows = setup.measure(trainings, kind=["sequence", "grid"] * len(GRIDS))
    save_rows([setup.pixels, *samples], setup.images / "tokens_grid_images.png")
    order = ", ".join(f"{row['tokens']} tokens as a {row['kind']}" for row in rows)
    return {
        "settings": setup.describe(f"TiTok (sequence) and MaskGIT-VQGAN (grid), {setup.steps} training steps"),
        "pictures": {"tokens_grid_images.png": f"From top to bottom: unseen images, {order}"},
        "rows": rows,
    }


def stages(setup: Setup) -> dict[str, Any]:
    if setup.vqgan is None:
        proxy = proxy_vqgan(setup.steps)
        _, (row,) = setup.measure([(proxy,)])
        vqgan, after = setup.runs.final(proxy), (proxy,)
        made = f"trained with {setup.steps} steps in {row['cpu_seconds']:.0f} CPU seconds, which the table leaves out"
    else:
        vqgan, after, made = setup.vqgan, (), "trained before"
        _, row = reconstruct(AutoModel.from_pretrained(vqgan).eval(), setup.pixels, setup.labels)
    origin = (
        f"The VQGAN of the proxy codes was {made}; with its {row['tokens']} codes it reaches {row['psnr']:.2f} dB."
    )
    trainings, kinds, seeds = [], [], []
    for seed in setup.seeds:
        direct = titok(STAGE_TOKENS, 2 * setup.stage_steps, PROXY_PATCH_SIZE, seed)
        trainings += [(direct,), two_stages(STAGE_TOKENS, setup.stage_steps, seed, vqgan, after, setup.runs)]
        kinds += ["direct", "two stages"]
        seeds += [seed, seed]
    samples, rows = setup.measure(trainings, kind=kinds, seed=seeds)
    save_rows([setup.pixels, *samples], setup.images / "tokens_stages_images.png")
    order = ", ".join(f"{row['kind']} with seed {row['seed']}" for row in rows)
    lengths = f"{2 * setup.stage_steps} steps in a single stage, or {setup.stage_steps} in each of two"
    settings = f"TiTok with {STAGE_TOKENS} tokens, patches of {PROXY_PATCH_SIZE} pixels, {lengths}"
    return {
        "settings": f"{setup.describe(settings)} {origin}",
        "pictures": {"tokens_stages_images.png": f"From top to bottom: unseen images, {order}"},
        "rows": rows,
    }


def steps(setup: Setup) -> dict[str, Any]:
    rows, pictures = [], {}
    lines: dict[str, dict] = {"judge": {}, "milliseconds": {}}
    for form, folder in setup.pipelines.items():
        pipe = MaskGITPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        tokens = pipe.vq_model.num_tokens
        kind = f"{form} of {tokens}"
        counts = [count for count in STEPS if count <= tokens]
        total = len(counts) * setup.per_class * len(CLASS_NAMES)
        with tqdm(total=total, desc=f"sample {kind}", unit="image", disable=not setup.progress) as bar:
            pipe(list(range(len(CLASS_NAMES))), num_inference_steps=1, output_type="pt")  # warms up, not timed
            results = [sample(pipe, count, setup.per_class, 0, bar.update) for count in counts]
        mine = [{"kind": kind} | row for _, row in results]
        rows += mine
        for name, panel in lines.items():
            panel[kind] = (counts, [row[name] for row in mine])
        save_rows([pixels for pixels, _ in results], setup.images / f"tokens_steps_{form}.png")
        order = ", ".join(map(str, counts))
        pictures[f"tokens_steps_{form}.png"] = f"The same noise and classes, {kind}; from top to bottom {order} steps"
    titles = {"judge": "judge accuracy", "milliseconds": "CPU ms per image"}
    panels = {titles[name]: panel for name, panel in lines.items()}
    save_curves(panels, "sampling steps", setup.images / "tokens_steps.png")
    made = f"{setup.per_class} images of each of {len(CLASS_NAMES)} classes"
    return {
        "settings": f"MaskGIT pipelines with the sampling rule that they were saved with, {made}, {BATCH} per batch.",
        "pictures": {"tokens_steps.png": "Judge accuracy and time over the number of sampling steps", **pictures},
        "rows": rows,
    }


PARTS: dict[str, Callable[[Setup], dict[str, Any]]] = {
    "number": number,
    "grid": grid,
    "stages": stages,
    "steps": steps,
}


def rewrite(page: Path, results: dict[str, Any]) -> None:
    """Put what was measured between the markers of the page, which is copied from the documentation if it is new."""
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    for name, result in results.items():
        text = with_section(text, *markers(name), section(name, result))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)


def read_results(path: Path) -> dict[str, Any]:
    """What was measured before, by part.

    Raises:
        ValueError: the file holds something else.
    """
    results = read_object(path)
    unknown = [name for name in results if name not in PARTS]
    if unknown:
        raise ValueError(f"{path} has {', '.join(unknown)}; expected results of {', '.join(PARTS)}.")
    return results


def check_pipeline(parser: argparse.ArgumentParser, form: str, folder: Path) -> None:
    """End the program if a folder has no MaskGIT pipeline over a sequence of tokens, or over a grid."""
    flag = "--titok_pipeline" if form == "sequence" else "--grid_pipeline"
    config = check_saved(parser, flag, folder, "model_index.json", "MaskGITPipeline")
    tokenizer = config["vq_model"][1]
    if (tokenizer == "TiTok") != (form == "sequence"):
        other = "--grid_pipeline" if form == "sequence" else "--titok_pipeline"
        parser.error(f"{flag} {folder} is over the tokens of a {tokenizer}; give it as {other}.")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--runs", type=Path, required=True, help="folder of the trainings, their logs and results.json"
    )
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=[], help="what to measure; none: only the page")
    parser.add_argument("--steps", type=int, default=400, help="training steps of number, grid and the proxy VQGAN")
    parser.add_argument("--stage_steps", type=int, default=200, help="training steps of each of the two stages")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings of stages")
    parser.add_argument(
        "--vqgan", type=Path, help="stages: a trained VQGAN with 4 pixels per code, instead of one more"
    )
    parser.add_argument("--titok_pipeline", type=Path, help="steps: folder of a MaskGIT pipeline over TiTok tokens")
    parser.add_argument("--grid_pipeline", type=Path, help="steps: folder of a MaskGIT pipeline over a grid")
    parser.add_argument("--images", type=int, default=1000, help="unseen images to reconstruct")
    parser.add_argument("--per_class", type=int, default=40, help="steps: images of each class")
    parser.add_argument("--page", type=Path, help="page to rewrite, with pictures in images/ beside it "
                        "(default: docs/tokens.md; in a trial RUNS/tokens.md)")  # fmt: skip
    parser.add_argument(
        "--launcher", default="", metavar="WORDS", help="put before each training, such as 'nice -n 5'"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a trial in seconds per training, whose numbers mean nothing"
    )
    parser.add_argument("--no_progress", action="store_true", help="show no progress bars")
    return parser


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    given = {"sequence": arguments.titok_pipeline, "grid": arguments.grid_pipeline}
    pipelines = {form: folder for form, folder in given.items() if folder is not None}
    if "steps" in arguments.parts and not pipelines:
        parser.error("--parts steps needs --titok_pipeline or --grid_pipeline: a folder that train_maskgit.py made.")
    check_counts(parser, arguments, ("steps", "stage_steps", "images", "per_class"))
    check_runs(parser, arguments.runs)
    for form, folder in pipelines.items():
        check_pipeline(parser, form, folder)
    if arguments.vqgan is not None:
        check_saved(parser, "--vqgan", arguments.vqgan, "config.json", "MaskGITVQGAN")
    if arguments.quick:
        arguments.steps = arguments.stage_steps = 2
        arguments.images, arguments.per_class = 24, 1
    torch.set_num_threads(1)
    folder = arguments.runs.resolve()
    page = arguments.page or (folder / "tokens.md" if arguments.quick else PAGE)
    path = folder / "results.json"
    stored = read_results(path) if path.exists() else {}
    if not arguments.parts and not path.exists():
        parser.error(f"{path} does not exist: measure something first, with --parts {' '.join(PARTS)}.")
    check_page(parser, page if page.exists() else PAGE, [markers(name) for name in arguments.parts or stored])
    pixels, labels = unseen_images(arguments.images)
    setup = Setup(
        runs=Runs(folder, tuple(shlex.split(arguments.launcher)), TRIAL if arguments.quick else ()),
        steps=arguments.steps,
        stage_steps=arguments.stage_steps,
        seeds=tuple(arguments.seeds),
        pixels=pixels,
        labels=labels,
        images=page.parent / "images",
        vqgan=arguments.vqgan and arguments.vqgan.resolve(),
        pipelines=pipelines,
        per_class=arguments.per_class,
        progress=not arguments.no_progress,
    )
    for name in arguments.parts:
        result = PARTS[name](setup)
        # Read just before it is written: other parts may be measured at the same time.
        results = read_results(path) if path.exists() else {}
        write_text(path, json.dumps(results | {name: result}, indent=1) + "\n")
        rewrite(page, {name: result})
        print("\n" + section(name, result))
    if not arguments.parts:
        rewrite(page, stored)


if __name__ == "__main__":
    run(main)
