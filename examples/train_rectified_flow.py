"""Train a rectified flow: the velocity from images to noise (arXiv 2209.03003), by DiT (SiT) or SD3's transformer.

    accelerate launch examples/train_rectified_flow.py --output_dir runs/flow
    accelerate launch examples/train_rectified_flow.py --model mmdit --dataset shapes:mixed --output_dir runs/flow-text

It makes pixels, or with --vae the latents of an autoencoder, encoded on the way or taken from a cache that
examples/cache_latents.py wrote. DiT learns from class labels, SD3's MMDiT from captions: by default through a
tokenizer and a small T5 that are learned with it, or with --text_encoder through a T5 that stays as it is.

The defaults train a small model on the built-in shapes. The result is the pipeline folder OUTPUT_DIR/final, for
RectifiedFlowPipeline.from_pretrained.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from hfgen import RectifiedFlowPipeline
from hfgen.counters import generator
from hfgen.images import make_grid
from hfgen.losses.flow import flow_interpolate, flow_loss, flow_weights, preconditioned_flow_loss
from hfgen.training import Phase, Task, Trainer, Validation, script
from hfgen.training.batches import collate
from hfgen.training.flow import FlowTrainingConfig as Config
from hfgen.training.flow import validation_rows
from hfgen.training.flow_conditions import CONDITIONS, FlowCondition
from hfgen.training.latents import batch_samples, load_autoencoder, sample_shape, training_latents

NO_DECAY = ("class_embed", "shared", "embed_tokens", "relative_attention_bias")
VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


class RectifiedFlowTask(Task):
    def __init__(self, config: Config, condition: FlowCondition, vae: nn.Module | None, rows: list[dict]) -> None:
        self.config, self.condition, self.vae, self.rows = config, condition, vae, rows
        channels, side = sample_shape(config, vae)
        if side % config.patch_size:
            raise ValueError(f"--patch_size {config.patch_size} does not divide the side of the samples, {side}.")
        self.modules = {"transformer": condition.network(channels, side), **condition.modules}
        self.averaged = tuple(self.modules)
        self.phases = {"transformer": Phase(self.averaged, no_decay=NO_DECAY)}
        self.frozen = condition.frozen if vae is None else (vae, *condition.frozen)
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=config.shift)

    def training_step(self, batch, draws):
        config, random = self.config, draws.generator()
        x0 = batch_samples(batch, self.vae, random)
        dropped = torch.rand(len(x0), generator=random, device=x0.device) < config.condition_dropout
        sigma = config.sigmas(len(x0), random)
        eps = torch.randn(x0.shape, generator=random, device=x0.device)
        x_sigma = flow_interpolate(x0, eps, sigma)

        inputs = self.condition.inputs(batch, dropped, self.modules)
        velocity = self.modules["transformer"](x_sigma, timestep=1000 * sigma, return_dict=False, **inputs)[0]
        error, weights = flow_loss(velocity, x0, eps), flow_weights(config.weighting, sigma)
        if config.precondition:
            loss = preconditioned_flow_loss(velocity, x_sigma, x0, sigma, weights)
        else:
            loss = weights * error
        yield "transformer", loss.mean(), {"velocity_error": error.mean()}

    def validate(self, modules, step):
        config, pipeline = self.config, self.pipeline(modules)
        pipeline.set_progress_bar_config(disable=True)
        images, errors = [], []
        for first in range(0, len(self.rows), config.batch_size):
            batch = collate(self.rows[first : first + config.batch_size])
            generators = [generator(config.seed, first + index) for index in range(len(batch["label"]))]
            output = pipeline(
                **self.condition.call_arguments(batch),
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                generator=generators,
                output_type="pt",
            )
            images.append(output.images.cpu())
            errors.append(self.velocity_errors(modules, batch, first))
        pixels, errors = torch.cat(images) * 2 - 1, torch.cat(errors).mean(dim=0)
        metrics = {f"error_{sigma}": float(error) for sigma, error in zip(VALIDATION_SIGMAS, errors)}
        metrics["error"] = float(errors.mean())
        if config.dataset.partition(":")[0] == "shapes":
            judged = self.condition.judge(pixels, collate(self.rows))
            metrics |= {f"judge_{name}": value for name, value in judged.items()}
        return Validation({"samples": make_grid(pixels)}, metrics)

    def velocity_errors(self, modules, batch, first):
        """(B, sigmas): the loss at fixed times and with fixed noise, so that validations can be compared."""
        transformer = modules["transformer"]
        device = transformer.device
        batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        random = generator(self.config.seed, first, device=device)
        x0 = batch_samples(batch, self.vae, random)
        eps = torch.randn(x0.shape, generator=random, device=device)
        inputs = self.condition.inputs(batch, torch.zeros(len(x0), dtype=torch.bool, device=device), modules)
        errors = []
        for value in VALIDATION_SIGMAS:
            sigma = torch.full((len(x0),), value, device=device)
            x_sigma = flow_interpolate(x0, eps, sigma)
            velocity = transformer(x_sigma, timestep=1000 * sigma, return_dict=False, **inputs)[0]
            errors.append(flow_loss(velocity, x0, eps))
        return torch.stack(errors, dim=1).cpu()

    def pipeline(self, modules):
        parts = self.condition.parts(modules)
        return RectifiedFlowPipeline(modules["transformer"], self.scheduler, self.vae, **parts)


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    vae = load_autoencoder(config)
    data = training_latents(config, vae, trainer)
    condition = CONDITIONS[config.model](config, data)
    trainer.fit(RectifiedFlowTask(config, condition, vae, validation_rows(config, data)), data)


if __name__ == "__main__":
    main()
