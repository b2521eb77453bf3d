"""What a Transfusion pipeline draws for captions and writes about images, and how right that is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hfgen.counters import generator
from hfgen.evaluation.caption_accuracy import caption_accuracy
from hfgen.evaluation.captions import judge_captions
from hfgen.images import make_grid
from hfgen.pipelines.transfusion import TransfusionPipeline
from hfgen.training.batches import collate
from hfgen.training.task import Validation
from hfgen.training.transfusion import TransfusionTrainingConfig
from hfgen.training.transfusion_images import ContinuousImages, DiscreteImages

NUM_SHOWN = 16  # captioned images
SHOWN_SIDE = 128  # pixels, for a caption to fit below


def validation_batches(
    rows: Sequence[Mapping[str, Any]], size: int, device: torch.device
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The batches of validation rows on a device, each with the number of its first row."""
    for first in range(0, len(rows), size):
        batch = collate(rows[first : first + size])
        yield first, {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def draw_and_write(
    pipeline: TransfusionPipeline,
    config: TransfusionTrainingConfig,
    images: ContinuousImages | DiscreteImages,
    rows: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
) -> Validation:
    """Draw an image for each caption and write a text about each image.

    Image i is drawn from a generator of (seed, i). The text is the likeliest token by token.

    Args:
        pipeline: to judge; its progress bars are switched off.
        config: guidance and steps.
        images: what images are to the run.
        rows: to validate on.
        max_new_tokens: of a text.

    Returns:
        Pictures of both. For captioned shapes the metrics ``judge_*`` of the images, see
        :func:`hfgen.evaluation.captions.judge_captions`, and ``caption_*`` of the texts, see
        :func:`hfgen.evaluation.caption_accuracy.caption_accuracy`.
    """
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": config.num_inference_steps} if config.image_mode == "continuous" else {}
    drawn, shown, written, captions = [], [], [], []
    for first, batch in validation_batches(rows, config.batch_size, pipeline.transformer.device):
        generators = [generator(config.seed, first + index) for index in range(len(batch["caption"]))]
        output = pipeline(
            batch["caption"], guidance_scale=config.guidance_scale, generator=generators, output_type="pt", **steps
        )
        drawn.append(output.images.cpu() * 2 - 1)
        shown.append(images.pixels(batch))
        written += pipeline.caption(shown[-1], max_new_tokens=max_new_tokens).texts
        captions += batch["caption"]
    metrics = {}
    if config.dataset.partition(":")[0] == "shapes":
        judged = judge_captions(torch.cat(drawn), captions)
        metrics |= {f"judge_{name}": value for name, value in judged.items()}
        metrics |= {f"caption_{name}": value for name, value in caption_accuracy(written, captions).items()}
    upscale = max(1, SHOWN_SIDE // config.resolution)
    texts = make_grid(torch.cat(shown)[:NUM_SHOWN], upscale=upscale, labels=written[:NUM_SHOWN])
    return Validation({"samples": make_grid(torch.cat(drawn)), "captions": texts}, metrics)
