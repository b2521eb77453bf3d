"""``hfgen sample``: draw images from a pipeline."""

from __future__ import annotations

import argparse
import inspect
import re
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from hfgen.commands.conditions import asked_for
from hfgen.commands.shared import check_folder, load_pipeline, torch_device, torch_dtype
from hfgen.counters import generator
from hfgen.data.transforms import to_uint8
from hfgen.images import make_grid, save_npz, save_png
from hfgen.pipelines.steps import DenoisedRecorder, StepRecorder

# Options of the command that are arguments of the pipelines which know them.
SETTINGS = (
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "height",
    "width",
    "temperature",
    "top_k",
    "top_p",
    "token_temperature",
    "choice_temperature",
)
RECORDERS = (StepRecorder, DenoisedRecorder)
TILE = 64  # pixels; smaller images are enlarged by a whole factor in a grid
STEM = 40  # characters of a class name or prompt in the name of a file


def run(options: argparse.Namespace) -> str:
    """Image number i is drawn from the counters (seed, i), whatever batch it is in."""
    device = torch_device(options.device)
    check_folder(options.output)
    pipeline = load_pipeline(options.pipeline, torch_dtype(options.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    settings = chosen_settings(pipeline, options)
    recorder = step_recorder(pipeline) if options.gif else None
    if recorder is not None:
        settings["callback_on_step_end"] = recorder
    conditions = asked_for(pipeline, options)
    titles = conditions.titles
    stems = [file_stem(number, title) for number, title in enumerate(titles)]

    kept = []
    start = time.perf_counter()
    with tqdm(total=len(titles), unit="image", desc="sampling") as bar:
        for first in range(0, len(titles), options.batch_size):
            numbers = range(first, min(first + options.batch_size, len(titles)))
            output = pipeline(
                **conditions.arguments(numbers),
                generator=[generator(options.seed, number) for number in numbers],
                output_type="pt",
                **settings,
            )
            images = to_uint8(output.images * 2 - 1).cpu()
            if options.format == "png":
                for number, image in zip(numbers, images):
                    save_png(make_grid(image[None], padding=0), options.output / f"{stems[number]}.png")
            else:
                kept.append(images)
            if recorder is not None:
                for index, number in enumerate(numbers):
                    path = options.output / f"{stems[number]}.gif"
                    recorder.save_gif(pipeline, path, index=index, upscale=-(-TILE // images.shape[-1]))
            bar.update(len(numbers))
    seconds = time.perf_counter() - start
    path = options.output if options.format == "png" else save_together(torch.cat(kept), titles, options)
    return f"{path}: {len(titles)} images, {len(titles) / seconds:.2f} per second, NFE {output.nfe}"


def save_together(images: torch.Tensor, titles: list[str], options: argparse.Namespace) -> Path:
    """All images (N, 3, H, W), uint8, in one file."""
    if options.format == "npz":
        return save_npz(images, options.output / "samples.npz")
    labels = titles if any(titles) else None
    grid = make_grid(images, upscale=-(-TILE // images.shape[-1]), labels=labels)
    return save_png(grid, options.output / "grid.png")


def file_stem(number: int, title: str) -> str:
    """``000007_red-circle``: of the title only what every file system allows."""
    words = re.sub(r"[^\w.]+", "-", title)[:STEM].strip("-.")
    return f"{number:06d}_{words}" if words else f"{number:06d}"


def step_recorder(pipeline: DiffusionPipeline) -> StepRecorder | DenoisedRecorder:
    """What records the steps of the pipeline.

    Raises:
        ValueError: its steps cannot be shown.
    """
    known = getattr(pipeline, "_callback_tensor_inputs", ())
    for recorder in RECORDERS:
        if set(recorder.tensor_inputs) <= set(known):
            return recorder()
    raise ValueError(
        f"--gif shows the steps of masked-token, rectified-flow and Transfusion pipelines; "
        f"{type(pipeline).__name__} is none."
    )


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
