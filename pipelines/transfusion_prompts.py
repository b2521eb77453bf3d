"""The prompts of the images of a call: texts or classes, and what to guide away from."""

from __future__ import annotations

from collections.abc import Sequence

from hfgen.pipelines.class_labels import ClassLabels, class_ids

Texts = str | Sequence[str]


def prompt_texts(prompt: Texts | None, class_labels: ClassLabels | None, class_names: Sequence[str]) -> Texts:
    """The texts of images, of prompts or classes; no condition is no text.

    Args:
        prompt: a text or several.
        class_labels: instead, classes by index or name; ``len(class_names)`` is none of them.
        class_names: prompt of each class.

    Raises:
        ValueError: both kinds of condition, an unknown class, or a pipeline without classes.
    """
    if prompt is not None and class_labels is not None:
        raise ValueError("Got prompt and class_labels; give one of them.")
    if class_labels is not None:
        if not class_names:
            raise ValueError("The pipeline has no class_names, so it has no classes: give a prompt instead.")
        ids = class_ids(class_labels, class_names, len(class_names), unconditional=True)
        return [[*class_names, ""][label] for label in ids]
    return "" if prompt is None else prompt


def negative_rows(
    negative: Sequence[list[int]], rows: Sequence[list[int]], num_images_per_prompt: int
) -> list[list[int]]:
    """What precedes each image where it is guided away from.

    Args:
        negative: ids of each negative prompt, one or as many as prompts.
        rows: ids before each image, ``num_images_per_prompt`` for each prompt in turn.
        num_images_per_prompt: images of a prompt.

    Returns:
        As many as ``rows``.

    Raises:
        ValueError: another number of negative prompts.
    """
    num_prompts = len(rows) // num_images_per_prompt
    if len(negative) not in (1, num_prompts):
        raise ValueError(f"Got {len(negative)} negative prompts for {num_prompts} prompts; give one, or one each.")
    each = negative if len(negative) == num_prompts else list(negative) * num_prompts
    return [row for row in each for _ in range(num_images_per_prompt)]
