"""What ``hfgen sample`` asks the images for: classes, prompts, or nothing."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline

from hfgen.pipelines.diffusion_networks import number_of_classes
from hfgen.pipelines.rectified_flow import RectifiedFlowPipeline
from hfgen.pipelines.transfusion import TransfusionPipeline

# Argument of a pipeline's call -> the options that give it.
OPTIONS = {"class_labels": "--labels", "prompt": "--prompt or --prompts-file"}


@dataclass(frozen=True)
class Conditions:
    """What each image is asked for.

    Attributes:
        argument: of the pipeline's call; None for a pipeline without a condition.
        values: one per image.
        titles: the same for people; empty texts where there is no condition.
    """

    argument: Literal["class_labels", "prompt"] | None
    values: list[int | str | None]
    titles: list[str]

    def arguments(self, numbers: range) -> dict[str, Any]:
        """The arguments of a call that draws these images."""
        if self.argument is None:
            return {"num_images_per_prompt": len(numbers)}
        return {self.argument: self.values[numbers.start : numbers.stop]}


def asked_for(pipeline: DiffusionPipeline, options: argparse.Namespace) -> Conditions:
    """What the options ask of the pipeline, ``--num`` times each.

    Raises:
        ValueError: the pipeline takes another condition, or needs one.
    """
    takes = taken_argument(pipeline)
    is_mixed = isinstance(pipeline, TransfusionPipeline)
    if is_mixed and options.labels is not None and pipeline.class_names:
        takes = "class_labels"  # which stand for prompts
    given = {"class_labels": options.labels, "prompt": given_prompts(options)}
    for argument, value in given.items():
        if value is not None and argument != takes:
            instead = f"takes {OPTIONS[takes]}" if takes else "draws without a condition"
            raise ValueError(f"This {type(pipeline).__name__} {instead}: leave {OPTIONS[argument]} out.")
    if takes is None:
        return Conditions(None, [None] * options.num, [""] * options.num)
    if given[takes] is None:
        without = ', or --prompt "" to draw without one' if is_mixed else ""
        raise ValueError(f"This {type(pipeline).__name__} needs a condition: give {OPTIONS[takes]}{without}.")
    values, names = given[takes], {}
    if takes == "class_labels":
        count = len(pipeline.class_names) if is_mixed else number_of_classes(pipeline.transformer)
        values = range(count) if values == "all" else values
        for label in values:  # the pipeline itself takes one more, which is no class
            if isinstance(label, int) and label >= count:
                raise ValueError(f"Class label {label} is out of range; the classes are 0 to {count - 1}.")
        names = dict(enumerate(pipeline.class_names or ()))
    values = [value for value in values for _ in range(options.num)]
    return Conditions(takes, values, [str(names.get(value, value)) for value in values])


def taken_argument(pipeline: DiffusionPipeline) -> Literal["class_labels", "prompt"] | None:
    """The argument of a call that states the condition."""
    if isinstance(pipeline, RectifiedFlowPipeline):
        return pipeline.network.takes
    if isinstance(pipeline, TransfusionPipeline):
        return "prompt" if pipeline.tokenizer is not None else None
    return None if number_of_classes(pipeline.transformer) is None else "class_labels"


def given_prompts(options: argparse.Namespace) -> list[str] | None:
    """Those of ``--prompt``, or the lines of ``--prompts-file`` that are not empty; None without these options.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, or has none.
    """
    if options.prompts_file is None:
        return options.prompt
    path: Path = options.prompts_file
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OSError(f"--prompts-file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path} is no UTF-8 text: {error}.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {path} is empty; expected one prompt per line.")
    return prompts
