"""Train a class-conditional diffusion model, a U-Net or a DiT (arXiv 2006.11239, 2105.05233, 2212.09748).

    accelerate launch examples/train_diffusion.py --output_dir runs/unet
    accelerate launch examples/train_diffusion.py --model dit --learned_variance --output_dir runs/dit
    accelerate launch examples/train_diffusion.py --model dit --vae VAE --cache runs/latents --output_dir runs/dit

It trains on pixels, or on latents of a frozen autoencoder: --vae encodes images on the way, --cache takes what
examples/cache_latents.py wrote. The noise, v or the clean data is predicted, and a variance if wanted.

The defaults train a small model on the built-in shapes. The result is the pipeline folder OUTPUT_DIR/final, for
ImageDiffusionPipeline.from_pretrained; it samples with the schedulers of diffusers, too.
"""

import torch
from torch import nn

from hfgen import ImageDiffusionPipeline
from hfgen.losses.diffusion import diffusion_loss, min_snr_weights
from hfgen.training import Phase, Task, Trainer, script
from hfgen.training.class_validation import class_validation
from hfgen.training.diffusion import DiffusionTrainingConfig as Config
from hfgen.training.diffusion import diffusion_network, diffusion_scheduler
from hfgen.training.latents import batch_samples, load_autoencoder, sample_classes, sample_shape, training_latents


class DiffusionTask(Task):
    def __init__(self, config: Config, vae: nn.Module | None, num_classes: int, class_names: list[str]) -> None:
        self.config, self.vae = config, vae
        self.num_classes, self.class_names = num_classes, class_names
        self.frozen = () if vae is None else (vae,)
        self.scheduler = diffusion_scheduler(config)
        model = diffusion_network(config, *sample_shape(config, vae), num_classes)
        self.modules, self.averaged = {"transformer": model}, ("transformer",)
        self.phases = {"transformer": Phase(("transformer",), no_decay=("embed",))}

    def training_step(self, batch, draws):
        config, process, random = self.config, self.scheduler, draws.generator()
        x0 = batch_samples(batch, self.vae, draws.generator(1))
        noise = torch.randn(x0.shape, generator=random, device=x0.device)
        timesteps = torch.randint(config.num_train_timesteps, (len(x0),), generator=random, device=x0.device)
        dropped = torch.rand(len(x0), generator=random, device=x0.device) < config.class_dropout
        labels = torch.where(dropped | (batch["label"] < 0), self.num_classes, batch["label"])

        noisy = process.add_noise(x0, noise, timesteps)
        output = self.modules["transformer"](noisy, timesteps, labels, return_dict=False)[0]
        weights = None
        if config.snr_gamma is not None:
            weights = min_snr_weights(process.snr(timesteps), config.prediction_type, config.snr_gamma)
        terms = diffusion_loss(process, output, x0, noise, timesteps, weights)
        log = {name: term.mean() for name, term in (("mse", terms.mse), ("vb", terms.vb)) if term is not None}
        yield "transformer", terms.loss.mean(), log

    def validate(self, modules, step):
        config = self.config
        pixels, labels = sample_classes(
            self.pipeline(modules),
            count=config.num_validation_images,
            batch_size=config.batch_size,
            seed=config.seed,
            guidance_scale=config.guidance_scale,
        )
        return class_validation(config.dataset, pixels, labels)

    def pipeline(self, modules):
        return ImageDiffusionPipeline(modules["transformer"], self.scheduler, self.vae, class_names=self.class_names)


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    vae = load_autoencoder(config)
    data = training_latents(config, vae, trainer)
    trainer.fit(DiffusionTask(config, vae, data.num_classes, data.class_names), data)


if __name__ == "__main__":
    main()
