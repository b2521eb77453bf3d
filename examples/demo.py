"""Sample the bundled VAR pipeline: a grid with every class, and how an image forms from coarse to fine.

    python examples/demo.py

The pipeline was trained on the captioned shapes by examples/train_multiscale_vqvae.py and examples/train_var.py. An
analytic judge reads the class back from the pixels of each image.
"""

import argparse
import time
from pathlib import Path

import torch

from hfgen import AutoPipeline, VARPipeline
from hfgen.counters import generator
from hfgen.evaluation.judge import judge_labels
from hfgen.images import make_grid, save_png

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"guidance_scale": 3.0, "temperature": 0.6}  # those of the card of zoo/var-shapes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", default=str(ROOT / "zoo" / "var-shapes"), help="folder or Hub id")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for the pictures")
    parser.add_argument("--images-per-class", type=int, default=4, help="images of each class for the judge")
    parser.add_argument("--seed", type=int, default=0, help="of the images")
    options = parser.parse_args()
    try:
        run(options)
    except (OSError, ValueError) as error:  # a wrong input
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def run(options: argparse.Namespace) -> None:
    if options.images_per_class < 1:
        raise ValueError(f"--images-per-class is {options.images_per_class}; it must be at least 1.")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output {options.output} is a file; expected a folder for the pictures.")
    pipeline = AutoPipeline.from_pretrained(options.pipeline, dtype=torch.float32)
    if not isinstance(pipeline, VARPipeline):
        raise ValueError(f"--pipeline {options.pipeline} is a {type(pipeline).__name__}; expected a VARPipeline.")
    pipeline.set_progress_bar_config(disable=True)
    class_names = pipeline.class_names
    # Row i of `labels` shows every class once; image k is drawn from (seed, k) alone.
    labels = torch.arange(len(class_names)).repeat(options.images_per_class)
    generators = [generator(options.seed, k) for k in range(len(labels))]

    start = time.perf_counter()
    output = pipeline(labels, generator=generators, output_type="pt", **SETTINGS)
    seconds = time.perf_counter() - start
    pixels = output.images * 2 - 1
    scores = judge_labels(pixels, labels)
    grid = make_grid(pixels[: len(class_names)], columns=6, upscale=3, labels=class_names)
    grid_path = save_png(grid, options.output / "var-shapes-grid.png")

    stages, sides = [], []

    def keep_stage(pipeline, scale, side, tensors):
        stages.append(pipeline.decode_latents(tensors["f_hat"]).float())
        sides.append(side)
        return {}

    shown = ["red circle", "yellow square", "cyan triangle", "magenta cross"]
    pipeline(
        shown,
        generator=[generator(options.seed, k) for k in range(len(shown))],
        **SETTINGS,
        output_type="latent",
        callback_on_step_end=keep_stage,
    )
    rows = torch.stack(stages, dim=1).flatten(0, 1)  # (images x scales, 3, H, W)
    texts = [f"{side} x {side}" for side in sides] * len(shown)
    strip = make_grid(rows, columns=len(sides), upscale=3, labels=texts)
    strip_path = save_png(strip, options.output / "var-shapes-scales.png")

    print(f"every class once:   {grid_path}")
    print(f"coarse to fine:     {strip_path}")
    print(f"speed:              {len(labels) / seconds:.1f} images per second on {pipeline.device}")
    print(f"NFE:                {output.nfe} forward passes per image")
    print(f"judge's accuracy:   {scores['label']:.1%} of {len(labels)} images show their class")


if __name__ == "__main__":
    main()
