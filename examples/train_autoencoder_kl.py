"""Train the KL autoencoder of latent diffusion, diffusers' AutoencoderKL, on your images (arXiv 2112.10752).

    accelerate launch examples/train_autoencoder_kl.py --output_dir runs/vae

Reconstruction, LPIPS and an adaptively weighted PatchGAN as VQGAN has them, and a slight pull of the latents towards
a standard normal distribution. The published weights of LPIPS and GAN are 1 and 0.5.

The defaults train a small model on the built-in shapes. The result is the folder OUTPUT_DIR/final, for
AutoencoderKL.from_pretrained and the --vae of examples/train_rectified_flow.py; its scaling_factor, measured at the
end, gives the latents a standard deviation of 1.
"""

import logging

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.nn import functional as F

from hfgen.data.transforms import to_pixels
from hfgen.evaluation.reconstruction import reconstruction_metrics
from hfgen.images import make_comparison
from hfgen.losses.adversarial import adaptive_weight, hinge_discriminator_loss, linear_generator_loss
from hfgen.losses.perceptual import LPIPS
from hfgen.models.layers.discriminators import PatchDiscriminator
from hfgen.training import (
    Phase,
    Task,
    Trainer,
    Validation,
    frozen,
    script,
    training_images,
    unwrap,
    validation_images,
)
from hfgen.training.autoencoder_kl import AutoencoderKLTrainingConfig as Config
from hfgen.training.autoencoder_kl import measure_scaling_factor, new_autoencoder

logger = logging.getLogger(__name__)


class AutoencoderKLTask(Task):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.modules, self.averaged = {"autoencoder": new_autoencoder(config)}, ("autoencoder",)
        self.phases = {"autoencoder": Phase(("autoencoder",))}
        self.pixel_error = {"l1": F.l1_loss, "l2": F.mse_loss}[config.reconstruction]
        if config.perceptual_weight > 0:
            self.lpips = LPIPS.from_pretrained(config.perceptual_source)
            self.frozen = (self.lpips,)
        if config.adversarial_weight > 0:
            self.modules["discriminator"] = PatchDiscriminator(
                base_channels=config.discriminator_channels, num_layers=config.discriminator_layers
            )
            self.phases["discriminator"] = Phase(("discriminator",), config.discriminator_learning_rate)
        self.validation_pixels = to_pixels(validation_images(config))

    def training_step(self, batch, draws):
        config, pixels = self.config, to_pixels(batch["pixels"])
        sample, moments = self.modules["autoencoder"](pixels, generator=draws.generator())

        kl = DiagonalGaussianDistribution(moments).kl().mean()  # of an image: a sum over its latents
        log = {"kl": kl, config.reconstruction: self.pixel_error(sample, pixels)}
        reconstruction = log[config.reconstruction]
        if config.perceptual_weight > 0:
            log["lpips"] = self.lpips(sample, pixels).mean()
            reconstruction = reconstruction + config.perceptual_weight * log["lpips"]
        # The published loss divided by the number of an image's values, so that it does not grow with the resolution.
        loss = reconstruction + config.kl_weight * kl / pixels[0].numel()

        adversarial = config.adversarial_weight > 0 and draws.step >= config.discriminator_start
        if adversarial:
            with frozen(self.modules["discriminator"]) as discriminator:
                generator_loss = linear_generator_loss(discriminator(sample))
            last_layer = unwrap(self.modules["autoencoder"]).decoder.conv_out.weight
            weight = config.adversarial_weight * adaptive_weight(reconstruction, generator_loss, last_layer)
            log |= {"generator": generator_loss, "adaptive_weight": weight}
            loss = loss + weight * generator_loss
        yield "autoencoder", loss, log

        if adversarial:
            real = self.modules["discriminator"](pixels)
            fake = self.modules["discriminator"](sample.detach())
            yield "discriminator", hinge_discriminator_loss(real, fake), {"real": real.mean(), "fake": fake.mean()}

    def validate(self, modules, step):
        autoencoder = modules["autoencoder"]
        pixels = self.validation_pixels.to(autoencoder.device)
        posteriors = [autoencoder.encode(part).latent_dist for part in pixels.split(self.config.batch_size)]
        samples = torch.cat([autoencoder.decode(posterior.mode()).sample for posterior in posteriors])
        metrics = reconstruction_metrics(samples, pixels)
        metrics["kl"] = float(torch.cat([posterior.kl() for posterior in posteriors]).mean())
        metrics["latent_std"] = float(torch.cat([posterior.mean for posterior in posteriors]).std())
        return Validation({"reconstructions": make_comparison(pixels[:32], samples[:32])}, metrics)

    def pipeline(self, modules):
        scale = measure_scaling_factor(modules["autoencoder"], self.config)
        logger.info("Scaling factor of the latents: %.5f.", scale)
        return modules["autoencoder"].plain(scale)


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    trainer.fit(AutoencoderKLTask(config), training_images(config))


if __name__ == "__main__":
    main()
