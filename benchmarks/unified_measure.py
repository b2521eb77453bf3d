"""What a Transfusion model draws for captions and writes about images, for benchmarks/unified.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hfgen import TransfusionPipeline
from hfgen.counters import generator
from hfgen.data.sources import load_images
from hfgen.data.transforms import to_pixels, to_uint8
from hfgen.evaluation.caption_accuracy import caption_accuracy
from hfgen.evaluation.captions import judge_captions
from hfgen.evaluation.features import RandomFeatures, extract_features
from hfgen.evaluation.frechet import GaussianStatistics, whitened_frechet_distance

ATTRIBUTES = ("shape", "colour", "size", "cell")


@dataclass(frozen=True)
class Settings:
    """How all models are measured.

    Attributes:
        images: captions to draw and images to write about.
        reference: true images that the Frechet distance compares with.
        steps: denoising steps of continuous images.
        guidance: of both modes.
        batch_size: images per call.
    """

    images: int
    reference: int
    steps: int
    guidance: float
    batch_size: int


class Judge:
    """Measures pipelines on one set of captions and images that training never reads."""

    def __init__(self, settings: Settings, dataset: str) -> None:
        self.settings, self.dataset = settings, dataset
        self.pixels, self.captions = self._unseen("test", settings.images)
        self.features = RandomFeatures()

    @cached_property
    def reference(self) -> GaussianStatistics:
        pixels, _ = self._unseen("validation", self.settings.reference)
        return GaussianStatistics.of(extract_features(self.features, to_uint8(pixels)))

    def of_true_images(self) -> dict[str, float]:
        """What the images themselves reach: the limit of what is drawn."""
        return self._drawn(self.pixels)

    def __call__(self, folder: Path, seed: int, *, progress: bool) -> tuple[dict[str, float], Tensor]:
        """The measures of the pipeline in a folder, and the pixels (N, 3, H, W) in [-1, 1] that it draws.

        ``frechet``, ``draw_*`` and their mean ``draw_attributes`` are of the images; ``write_*`` of the texts.
        """
        pipeline = TransfusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        settings, drawn, written = self.settings, [], []
        steps = {} if pipeline.transformer.is_discrete else {"num_inference_steps": settings.steps}
        parts = torch.arange(len(self.captions)).split(settings.batch_size)
        for part in tqdm(parts, desc=f"draw and write, {folder.parent.name}", disable=not progress):
            rows = part.tolist()
            images = pipeline(
                [self.captions[row] for row in rows],
                guidance_scale=settings.guidance,
                generator=[generator(seed, row) for row in rows],
                output_type="pt",
                **steps,
            ).images
            drawn.append(images * 2 - 1)
            written += pipeline.caption(self.pixels[part]).texts
        pixels = torch.cat(drawn)
        texts = {f"write_{name}": value for name, value in caption_accuracy(written, self.captions).items()}
        parameters = sum(each.numel() for each in pipeline.transformer.parameters())
        return self._drawn(pixels) | texts | {"parameters": parameters}, pixels

    def _drawn(self, pixels: Tensor) -> dict[str, float]:
        judged = judge_captions(pixels, self.captions)
        own = GaussianStatistics.of(extract_features(self.features, to_uint8(pixels)))
        shares = {f"draw_{name}": value for name, value in judged.items()}
        shares["draw_attributes"] = sum(judged[name] for name in ATTRIBUTES) / len(ATTRIBUTES)
        return {"frechet": whitened_frechet_distance(own, self.reference)} | shares

    def _unseen(self, split: str, count: int) -> tuple[Tensor, list[str]]:
        data = load_images(self.dataset, resolution=32, split=split, limit=count)
        rows = [data[index] for index in range(count)]
        return to_pixels(torch.stack([row["pixels"] for row in rows])), [row["caption"] for row in rows]


def last_validation(run: Path) -> dict[str, float]:
    """The values of the last validation in the log of a run, without their prefix."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    prefix = "validation/"
    found = [record for record in records if any(name.startswith(prefix) for name in record)]
    return {name.removeprefix(prefix): value for name, value in found[-1].items() if name.startswith(prefix)}
