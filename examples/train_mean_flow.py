"""Train MeanFlow: class-conditional generation in one step, without a teacher (arXiv 2505.13447).

    accelerate launch examples/train_mean_flow.py --output_dir runs/mean-flow
    accelerate launch examples/train_mean_flow.py --vae VAE --cache runs/latents --output_dir runs/mean-flow-latents

It trains on pixels, or on latents of a frozen autoencoder: --vae encodes images on the way, --cache takes what
examples/cache_latents.py wrote. Guidance is learned, of scale omega / (1 - kappa), so samples need none. The value of
the adaptive loss is always near 1; watch mse and velocity_mse.

--loss trajectory_matching is not MeanFlow but the naive way to one step: the squared error of the end of the
trajectory. Warning: with noise and data paired at random its minimum is the mean of the data, so all samples of a
class collapse to one blurred image. It is of use with --pairs, the noise and images of a trained flow.

The defaults train a small model on the built-in shapes. The result is the pipeline folder OUTPUT_DIR/final, for
MeanFlowPipeline.from_pretrained.
"""

import logging

import torch
from torch import nn

from hfgen import DiT, MeanFlowPipeline
from hfgen.losses.mean_flow import drop_first, mean_flow_loss, sample_interval, trajectory_matching_loss
from hfgen.training import Phase, Task, Trainer, script, unwrap
from hfgen.training.class_validation import class_validation
from hfgen.training.latents import batch_samples, load_autoencoder, sample_classes, sample_shape, training_latents
from hfgen.training.mean_flow import MeanFlowTrainingConfig as Config
from hfgen.training.mean_flow import class_pairs, questionable_settings


class MeanFlowTask(Task):
    def __init__(self, config: Config, vae: nn.Module | None, num_classes: int, class_names: list[str]) -> None:
        self.config, self.vae, self.class_names = config, vae, class_names
        self.frozen = () if vae is None else (vae,)
        channels, side = sample_shape(config, vae)
        model = DiT(
            sample_size=side,
            patch_size=config.patch_size,
            in_channels=channels,
            num_classes=num_classes,
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
            has_duration=True,
        )
        self.modules, self.averaged = {"transformer": model}, ("transformer",)
        self.phases = {"transformer": Phase(("transformer",), no_decay=("embed",))}

    def training_step(self, batch, draws):
        config, model, random = self.config, self.modules["transformer"], draws.generator()
        network = unwrap(model)
        if config.pairs is None:
            x0 = batch_samples(batch, self.vae, draws.generator(1))
            eps = torch.randn(x0.shape, generator=random, device=x0.device)
        else:
            x0, eps = batch["sample"], batch["noise"]
        dropped = drop_first(torch.rand(len(x0), generator=random, device=x0.device), config.class_dropout)
        dropped |= batch["label"] < 0
        labels = torch.where(dropped, network.config.num_classes, batch["label"])

        if config.loss == "trajectory_matching":
            steps = config.trajectory_steps

            def velocity(x, sigma):  # the average one of a step, as the pipeline asks for it
                return model(x, sigma, labels, torch.full_like(sigma, 1 / steps), return_dict=False)[0]

            yield "transformer", trajectory_matching_loss(velocity, x0, eps, steps).mean(), {}
            return
        t, r = sample_interval(
            len(x0),
            density=config.time_density,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            equal_share=config.equal_share,
            generator=random,
        )
        # The prediction comes from the wrapper, which averages the gradients of all processes. A forward-mode
        # derivative cannot pass it, and that of the network inside has no gradient to average.
        output = mean_flow_loss(
            model,
            x0,
            eps,
            t,
            r,
            labels,
            network=network,
            dropped=dropped,
            omega=config.omega,
            kappa=config.kappa,
            guidance_interval=config.guidance_interval,
            norm_power=config.norm_power,
            norm_eps=config.norm_eps,
        )
        errors = {"mse": output.squared_error, "velocity_mse": output.velocity_error}
        yield "transformer", output.loss, {name: error.mean() / x0[0].numel() for name, error in errors.items()}

    def validate(self, modules, step):
        config = self.config
        pixels, labels = sample_classes(
            self.pipeline(modules),
            count=config.num_validation_images,
            batch_size=config.batch_size,
            seed=config.seed,
            num_inference_steps=config.num_inference_steps,
        )
        return class_validation(config.dataset, pixels, labels)

    def pipeline(self, modules):
        return MeanFlowPipeline(modules["transformer"], self.vae, class_names=self.class_names)


@script(Config, __doc__)
def main(config: Config) -> None:
    for message in questionable_settings(config):
        logging.getLogger(__name__).warning("Is this wanted? %s.", message)
    trainer = Trainer(config)
    vae = load_autoencoder(config)
    data = training_latents(config, vae, trainer)
    task = MeanFlowTask(config, vae, data.num_classes, data.class_names)
    trainer.fit(task, data if config.pairs is None else class_pairs(config.pairs, sample_shape(config, vae)))


if __name__ == "__main__":
    main()
