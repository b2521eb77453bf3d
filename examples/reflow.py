"""Straighten a trained flow, or distil it to one step (Liu et al., arXiv 2209.03003).

    accelerate launch examples/reflow.py --model runs/flow/final --output_dir runs/reflow
    accelerate launch examples/reflow.py --model runs/reflow/final --mode distill --output_dir runs/one-step

It lets the flow make pairs of noise and image, for random classes or the captions of --dataset, and trains on these
pairs from the weights of the flow: at all times (reflow) or only where the steps of a short sampler begin (distill).
The guidance of the pairs is learned with them, so sample the result with guidance_scale=1. Unfinished pairs are
continued. The straightness of the paths, 0 if they are straight, is logged before and after. The result is the
pipeline folder OUTPUT_DIR/final, for RectifiedFlowPipeline.from_pretrained.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hfgen import RectifiedFlowPipeline
from hfgen.data.flow_pairs import FlowPairs
from hfgen.images import make_grid
from hfgen.losses.flow import flow_interpolate
from hfgen.losses.perceptual import LPIPS
from hfgen.losses.reflow import one_step_loss, reflow_sigmas
from hfgen.training import REQUIRED, Phase, Task, Trainer, TrainingConfig, Validation, flag, loading_flag, script
from hfgen.training.batches import collate
from hfgen.training.flow_pairs import (
    check_data_flags,
    first_captions,
    flow_straightness,
    make_pairs,
    pair_arguments,
    pair_conditions,
)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Config(TrainingConfig):
    model: str = flag(REQUIRED, "folder or Hub id of the pipeline of a trained flow")
    mode: Literal["reflow", "distill"] = flag("reflow", "straighter paths, or a sampler of few steps")
    num_pairs: int = flag(10_000, "pairs of noise and image to make", least=1)
    pairs: str | None = flag(None, "folder of the pairs; by default OUTPUT_DIR/pairs")
    num_inference_steps: int = flag(50, "steps of the flow that makes the pairs", least=1)
    guidance_scale: float = flag(1.0, "its guidance, 1 is off")
    distill_steps: int = flag(1, "Euler steps to distil to", least=1)
    distance: Literal["l2", "lpips", "lpips+l2"] = flag("l2", "loss of --mode distill; lpips is for one step")
    perceptual_source: str | None = flag(None, "folder or Hub id of the LPIPS weights")
    straightness_steps: int = flag(16, "Euler steps along which the straightness is measured", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance != "l2" and (self.mode != "distill" or self.distill_steps != 1):
            raise ValueError(f"--distance {self.distance} compares images: use --mode distill --distill_steps 1.")
        if self.distance != "l2" and self.perceptual_source is None:
            raise ValueError(f"--distance {self.distance} needs the weights of LPIPS: give --perceptual_source.")


class ReflowTask(Task):
    def __init__(self, config: Config, teacher: RectifiedFlowPipeline, pairs: FlowPairs) -> None:
        self.config, self.teacher = config, teacher
        self.modules, self.averaged = {"transformer": copy.deepcopy(teacher.transformer)}, ("transformer",)
        self.phases = {"transformer": Phase(("transformer",))}
        self.perceptual = None if config.distance == "l2" else LPIPS.from_pretrained(config.perceptual_source)
        parts = (*teacher.components.values(), self.perceptual)
        self.frozen = tuple(part for part in parts if isinstance(part, torch.nn.Module))
        self.shown = collate([pairs[index] for index in range(min(config.num_validation_images, len(pairs)))])
        self.before: float | None = None

    def training_step(self, batch, draws):
        config, noise, images = self.config, batch["noise"], batch["sample"]
        uniform = torch.rand(len(noise), generator=draws.generator(), device=noise.device)
        sigma = reflow_sigmas(uniform, config.distill_steps if config.mode == "distill" else None)
        condition = pair_conditions(self.teacher, batch, guided=False).condition
        points = flow_interpolate(images, noise, sigma)
        velocity = self.modules["transformer"](points, timestep=1000 * sigma, return_dict=False, **condition)[0]
        decode = None if self.teacher.vae is None else self.teacher.decode_latents
        loss = one_step_loss(
            velocity, images, noise, distance=config.distance, perceptual=self.perceptual, decode=decode
        )
        yield "transformer", loss.mean(), {}

    def validate(self, modules, step):
        config, pipeline, shown = self.config, self.pipeline(modules), self.shown
        if self.before is None:
            guidance_scale = config.guidance_scale if self.teacher.network.takes else 1.0
            self.before = flow_straightness(
                self.teacher, shown, guidance_scale=guidance_scale, num_steps=config.straightness_steps
            )
        after = flow_straightness(pipeline, shown, guidance_scale=1.0, num_steps=config.straightness_steps)
        logger.info("Straightness: %.5f before, %.5f after %d steps (0: straight).", self.before, after, step)
        pipeline.set_progress_bar_config(disable=True)
        noise = shown["noise"].to(pipeline.device)
        arguments = pair_arguments(pipeline, shown) or {"num_images_per_prompt": len(noise)}
        images, metrics = {}, {"straightness": after, "straightness_before": self.before}
        for steps in dict.fromkeys((config.distill_steps, config.num_inference_steps)):
            samples = pipeline(
                **arguments, latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="latent"
            ).images
            metrics[f"error_{steps}_steps"] = (samples.cpu() - shown["sample"]).square().mean().item()
            images[f"samples_{steps}_steps"] = make_grid(pipeline.decode_latents(samples).cpu())
        return Validation(images, metrics)

    def pipeline(self, modules):
        parts = {**self.teacher.components, "transformer": modules["transformer"]}
        return RectifiedFlowPipeline(**parts, class_names=self.teacher.class_names)


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    with loading_flag("model", config.model):
        teacher = RectifiedFlowPipeline.from_pretrained(config.model).to(trainer.device)
    check_data_flags(config, teacher)
    pairs = make_pairs(
        teacher,
        config.pairs or Path(config.output_dir) / "pairs",
        num_pairs=config.num_pairs,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        accelerator=trainer.accelerator,
        captions=first_captions(config, config.num_pairs) if teacher.network.takes == "prompt" else (),
        batch_size=config.batch_size,
        seed=config.seed,
        progress=config.progress,
    )
    trainer.fit(ReflowTask(config, teacher, pairs), pairs)


if __name__ == "__main__":
    main()
