"""``hfgen sample``: draw images from a pipeline."""

from __future__ import annotations

import argparse
import inspect
import time
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from hfgen.auto import AutoPipeline
from hfgen.commands.shared import torch_device, torch_dtype
from hfgen.counters import generator
from hfgen.data.transforms import to_uint8
from hfgen.images import make_grid, save_npz, save_png
from hfgen.pipelines.steps import StepRecorder

# Options of the command that are arguments of the pipelines which know them.
SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "token_temperature",
    "choice_temperature",
)
TILE = 64  # pixels; smaller images are enlarged by a whole factor in a grid


def run(options: argparse.Namespace) -> str:
    """Image number i is drawn from the counters (seed, i), whatever batch it is in."""
    device = torch_device(options.device)
    pipeline = AutoPipeline.from_pretrained(options.pipeline, dtype=torch_dtype(options.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    settings = chosen_settings(pipeline, options)
    recorder = step_recorder(pipeline) if options.gif else None
    if recorder is not None:
        settings["callback_on_step_end"] = recorder
    classes = range(pipeline.transformer.config.num_classes) if options.labels == "all" else options.labels
    names = dict(enumerate(getattr(pipeline, "class_names", None) or ()))
    labels = [label for label in classes for _ in range(options.num)]
    titles = [str(names.get(label, label)) for label in labels]

    kept = []
    start = time.perf_counter()
    with tqdm(total=len(labels), unit="image", desc="sampling") as bar:
        for first in range(0, len(labels), options.batch_size):
            batch = labels[first : first + options.batch_size]
            numbers = range(first, first + len(batch))
            output = pipeline(
                class_labels=batch,
                generator=[generator(options.seed, number) for number in numbers],
                output_type="pt",
                **settings,
            )
            images = to_uint8(output.images * 2 - 1).cpu()
            stems = [f"{number:06d}_{titles[number].replace(' ', '-')}" for number in numbers]
            if options.format == "png":
                for stem, image in zip(stems, images):
                    save_png(make_grid(image[None], padding=0), options.output / f"{stem}.png")
            else:
                kept.append(images)
            if recorder is not None:
                for index, stem in enumerate(stems):
                    path = options.output / f"{stem}.gif"
                    recorder.save_gif(pipeline, path, index=index, upscale=-(-TILE // images.shape[-1]))
            bar.update(len(batch))
    seconds = time.perf_counter() - start

    path = options.output
    if options.format == "grid":
        images = torch.cat(kept)
        grid = make_grid(images, upscale=-(-TILE // images.shape[-1]), labels=titles)
        path = save_png(grid, options.output / "grid.png")
    elif options.format == "npz":
        path = save_npz(torch.cat(kept), options.output / "samples.npz")
    return f"{path}: {len(labels)} images, {len(labels) / seconds:.2f} per second, NFE {output.nfe}"


def step_recorder(pipeline: DiffusionPipeline) -> StepRecorder:
    """What records the steps of the pipeline.

    Raises:
        ValueError: its steps have no tokens to record.
    """
    known = getattr(pipeline, "_callback_tensor_inputs", ())
    if not set(StepRecorder.tensor_inputs) <= set(known):
        raise ValueError(f"--gif shows the steps of masked-token pipelines; {type(pipeline).__name__} is none.")
    return StepRecorder()


def chosen_settings(pipeline: DiffusionPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given.

    Raises:
        ValueError: the pipeline has no such setting.
    """
    given = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    known = inspect.signature(type(pipeline).__call__).parameters
    for name in given:
        if name not in known:
            possible = ", ".join("--" + option.replace("_", "-") for option in SETTINGS if option in known)
            raise ValueError(
                f"{type(pipeline).__name__} has no setting --{name.replace('_', '-')}; it has {possible or 'none'}."
            )
    return given
