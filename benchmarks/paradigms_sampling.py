"""What the trained methods make, by their samplers and over numbers of steps: quality and cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from paradigms_training import METHODS
from timing import timed
from torch import Tensor
from tqdm.auto import tqdm

from hfgen import ImageDiffusionPipeline, MeanFlowPipeline, RectifiedFlowPipeline
from hfgen.counters import generator
from hfgen.data.shapes import CLASS_NAMES
from hfgen.data.sources import load_images
from hfgen.data.transforms import to_pixels, to_uint8
from hfgen.evaluation.features import RandomFeatures, extract_features
from hfgen.evaluation.frechet import GaussianStatistics, whitened_frechet_distance
from hfgen.evaluation.judge import judge_labels
from hfgen.training.diffusion import DiffusionTrainingConfig, diffusion_network
from hfgen.training.flow_pairs import flow_straightness

PIPELINES = {
    "train_diffusion": ImageDiffusionPipeline,
    "train_rectified_flow": RectifiedFlowPipeline,
    "reflow": RectifiedFlowPipeline,
    "train_mean_flow": MeanFlowPipeline,
}
STRAIGHTNESS_STEPS, STRAIGHTNESS_IMAGES = 16, 64


def _ddim(trained) -> DDIMScheduler:
    return DDIMScheduler(**trained, timestep_spacing="trailing", clip_sample=False)


def _dpm_solver(trained) -> DPMSolverMultistepScheduler:
    # Under the cosine schedule the first log-SNR is nearly minus infinity.
    return DPMSolverMultistepScheduler(
        **trained, timestep_spacing="trailing", algorithm_type="dpmsolver++", lambda_min_clipped=-5.1
    )


# From the noise schedule of training, a dict without entries for flows; None leaves what the pipeline has.
SAMPLERS: dict[str, Callable | None] = {
    "ddim": _ddim,
    "dpm-solver++": _dpm_solver,
    "euler": lambda trained: FlowMatchEulerDiscreteScheduler(),
    "heun": lambda trained: FlowMatchHeunDiscreteScheduler(),
    "mean-flow": None,
}


@dataclass(frozen=True)
class SamplingSettings:
    """How all methods are measured.

    Attributes:
        steps: numbers of steps.
        per_class: images of each class.
        reference: true images that the Frechet distance compares with.
        resolution: side of the images.
        guidance: w of those that have not learned it.
        batch_size: images per call.
    """

    steps: tuple[int, ...]
    per_class: int
    reference: int
    resolution: int
    guidance: float
    batch_size: int


class Quality:
    """Judge accuracy, Frechet distance and spread of images of all classes in turn."""

    def __init__(self, settings: SamplingSettings):
        self.settings = settings
        self.labels = torch.arange(settings.per_class * len(CLASS_NAMES)) % len(CLASS_NAMES)
        self.features = RandomFeatures()

    @cached_property
    def reference(self) -> tuple[GaussianStatistics, float]:
        """Statistics of true images, and their mean variance within a class."""
        images, labels = self._true_images("test", self.settings.reference)
        return GaussianStatistics.of(extract_features(self.features, images)), _class_variance(images, labels)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Of images uint8 (N, 3, H, W) that were made for labels (N,)."""
        statistics_, variance = self.reference
        own = GaussianStatistics.of(extract_features(self.features, images))
        return {
            "accuracy": judge_labels(images, labels)["label"],
            "frechet": whitened_frechet_distance(own, statistics_),
            "spread": _class_variance(images, labels) / variance,
        }

    def of_true_images(self) -> dict[str, float]:
        """What unseen true images reach, as many as are sampled: the limit for every method."""
        return self(*self._true_images("validation", len(self.labels)))

    def _true_images(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        data = load_images("shapes", resolution=self.settings.resolution, split=split, limit=count)
        rows = [data[index] for index in range(count)]
        return torch.stack([row["pixels"] for row in rows]), torch.tensor([row["label"] for row in rows])


def measure(name: str, seed: int, quality: Quality, folder: Path, *, progress: bool = True) -> dict[str, list | float]:
    """Everything that is measured of a trained method, whose pipeline is in ``folder``."""
    settings, method = quality.settings, METHODS[name]
    pipeline = PIPELINES[method.script].from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    result = {"parameters": parameters, "points": []}
    guidance = settings.guidance if method.script in ("train_diffusion", "train_rectified_flow") else 1.0
    plan = [(sampler, steps) for sampler in method.samplers for steps in _steps(sampler, settings.steps, method.few)]
    trained = _noise_schedule(pipeline)
    for sampler, steps in tqdm(plan, desc=f"sample {name}, seed {seed}", disable=not progress):
        if SAMPLERS[sampler] is not None:
            pipeline.scheduler = SAMPLERS[sampler](trained)
        arguments = {"num_inference_steps": steps, "guidance_scale": guidance}
        result["points"].append({"sampler": sampler, "steps": steps} | _point(pipeline, arguments, quality, seed))
    if isinstance(pipeline, RectifiedFlowPipeline):
        result["straightness"] = _straightness(pipeline, guidance, seed)
    return result


def _steps(sampler: str, steps: Sequence[int], few: int | None) -> list[int]:
    """Heun passes the network twice in each step but the last, so it gets half as many steps."""
    steps = [count for count in steps if few is None or count <= few]
    return [count // 2 for count in steps if count >= 4] if sampler == "heun" else steps


def _noise_schedule(pipeline) -> dict:
    if not isinstance(pipeline, ImageDiffusionPipeline):
        return {}
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    return {name: pipeline.scheduler.config[name] for name in names}


def _point(pipeline, arguments: dict, quality: Quality, seed: int) -> dict[str, float]:
    """Quality, passes, and CPU seconds per image of one sampler with one number of steps."""
    images, seconds, labels = [], 0.0, quality.labels
    for part in torch.arange(len(labels)).split(quality.settings.batch_size):
        generators = [generator(seed, index) for index in part.tolist()]  # the same noise for all methods
        outputs = []

        def call(part=part, generators=generators, outputs=outputs):
            asked = {"class_labels": labels[part].tolist(), "generator": generators, "output_type": "pt"}
            outputs.append(pipeline(**asked, **arguments))

        seconds += timed(call)[1]
        images.append(to_uint8(outputs[0].images.float() * 2 - 1))
    return {"nfe": outputs[0].nfe, "seconds": seconds / len(labels)} | quality(torch.cat(images), labels)


def _straightness(pipeline: RectifiedFlowPipeline, guidance: float, seed: int) -> float:
    config = pipeline.transformer.config
    shape = (STRAIGHTNESS_IMAGES, config.in_channels, config.sample_size, config.sample_size)
    batch = {
        "noise": torch.randn(shape, generator=generator(seed, 1)),
        "label": torch.arange(STRAIGHTNESS_IMAGES) % config.num_classes,
    }
    return flow_straightness(pipeline, batch, guidance_scale=guidance, num_steps=STRAIGHTNESS_STEPS)


def _class_variance(images: Tensor, labels: Tensor) -> float:
    """Mean over classes of the variance of pixels between the images of a class."""
    pixels = to_pixels(images)
    parts = [pixels[labels == label] for label in labels.unique()]
    return statistics.mean(part.var(dim=0).mean().item() for part in parts if len(part) > 1)


@torch.no_grad()
def pass_seconds(
    sides: Sequence[int], *, patch_size: int = 2, repeats: int = 5, threads: int = 1
) -> dict[str, dict[str, float]]:
    """CPU seconds of a pass of the U-Net and the DiT of the comparison, one image, by the side of the image."""
    torch.set_num_threads(threads)
    models = {"unet": {"model": "unet", "channels": (16, 40, 72), "attention_head_dim": 24}}
    models["dit"] = {"model": "dit", "width": 112, "patch_size": patch_size}
    result: dict[str, dict[str, float]] = {name: {} for name in models}
    for side in sides:
        for name, sizes in models.items():
            config = DiffusionTrainingConfig(output_dir="unused", **sizes)
            network = diffusion_network(config, 3, side, len(CLASS_NAMES)).eval()
            inputs = (torch.randn(1, 3, side, side, generator=generator(side)), torch.tensor([500]), torch.tensor([0]))
            network(*inputs)
            runs = [timed(lambda network=network, inputs=inputs: network(*inputs))[1] for _ in range(repeats)]
            result[name][str(side)] = statistics.median(runs)
    return result
