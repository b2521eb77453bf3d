"""Fine-tune the decoder of an autoencoder on noisy latents, for discrete Transfusion (docs/transfusion.md).

    accelerate launch examples/finetune_noise_robust_decoder.py --vae runs/vae/final --output_dir runs/robust
    accelerate launch examples/finetune_noise_robust_decoder.py --vae runs/vae/final --codebook_size 256 \\
      --output_dir runs/robust-codes

The encoder stays as it is, so latents keep their meaning. With --codebook_size, codes of the noisy latents are learned
as well and the decoder sees their vectors; --quantizer takes codes that were learned before.

Validation decodes latents with more and more noise, by the decoder of the start and by the trained one: the picture
validation/*_psnr_against_noise.png and the table OUTPUT_DIR/psnr_against_noise.md. The result is the folder
OUTPUT_DIR/final for AutoencoderKL.from_pretrained, with the codes in OUTPUT_DIR/final/quantizer.
"""

import copy
from pathlib import Path

import torch
from diffusers.utils import is_matplotlib_available
from torch.nn import functional as F

from hfgen.data.transforms import to_pixels
from hfgen.images import make_grid
from hfgen.losses.adversarial import adaptive_weight, hinge_discriminator_loss, linear_generator_loss
from hfgen.losses.perceptual import LPIPS
from hfgen.models.layers.discriminators import PatchDiscriminator
from hfgen.pipelines.latents import encode_pixels
from hfgen.training import Phase, Task, Trainer, Validation, frozen, script, training_images, unwrap
from hfgen.training.batches import validation_images
from hfgen.training.history import write_text
from hfgen.training.latents import batch_samples
from hfgen.training.noise_curve import draw_noise_curves, noise_table, noisy_latents, psnr_against_noise
from hfgen.training.noise_robust_decoder import CodedAutoencoder, load_decoder
from hfgen.training.noise_robust_decoder import NoiseRobustTrainingConfig as Config
from hfgen.training.noisy_latents import add_noise, load_quantizer, new_quantizer, quantize


class NoiseRobustDecoderTask(Task):
    def __init__(self, config: Config) -> None:
        self.config, vae = config, load_decoder(config)
        self.before, self.quantizer = copy.deepcopy(vae), None
        self.frozen = (self.before, *(part for part in (vae.encoder, vae.quant_conv) if part is not None))
        self.modules, self.averaged = {"autoencoder": vae}, ("autoencoder",)
        self.phases = {"autoencoder": Phase(("autoencoder",))}
        if config.quantizer is not None:
            self.quantizer = load_quantizer(config, vae.config.latent_channels)
            self.frozen += (self.quantizer,)
        elif config.codebook_size is not None:
            self.quantizer = new_quantizer(config, config.codebook_size, vae.config.latent_channels)
            self.modules["quantizer"] = self.quantizer
            self.phases["quantizer"] = Phase(("quantizer",), config.codebook_learning_rate, weight_decay=0.0)
        self.pixel_error = {"l1": F.l1_loss, "l2": F.mse_loss}[config.reconstruction]
        if config.perceptual_weight > 0:
            self.lpips = LPIPS.from_pretrained(config.perceptual_source)
            self.frozen += (self.lpips,)
        if config.adversarial_weight > 0:
            self.modules["discriminator"] = PatchDiscriminator(
                base_channels=config.discriminator_channels, num_layers=config.discriminator_layers
            )
            self.phases["discriminator"] = Phase(("discriminator",))
        self.validation_pixels = to_pixels(validation_images(config))

    def training_step(self, batch, draws):
        config, pixels, random = self.config, to_pixels(batch["pixels"]), draws.generator()
        with torch.no_grad():
            latents = batch_samples(batch, unwrap(self.modules["autoencoder"]), random)
        noise = torch.randn(latents.shape, generator=random, device=latents.device)
        latents = add_noise(latents, noise, config.sigma, config.noise_type)
        if "quantizer" in self.modules:
            quantized = quantize(self.modules["quantizer"], latents, config.quantizer_type, draws.generator(1))
            yield "quantizer", quantized.loss, {}
        if self.quantizer is not None:
            latents = self.quantized(latents)

        sample = self.modules["autoencoder"](latents)
        log = {config.reconstruction: self.pixel_error(sample, pixels)}
        loss = log[config.reconstruction]
        if config.perceptual_weight > 0:
            log["lpips"] = self.lpips(sample, pixels).mean()
            loss = loss + config.perceptual_weight * log["lpips"]
        adversarial = config.adversarial_weight > 0 and draws.step >= config.discriminator_start
        if adversarial:
            with frozen(self.modules["discriminator"]) as discriminator:
                generator_loss = linear_generator_loss(discriminator(sample))
            last_layer = unwrap(self.modules["autoencoder"]).decoder.conv_out.weight
            weight = config.adversarial_weight * adaptive_weight(loss, generator_loss, last_layer)
            log |= {"generator": generator_loss, "adaptive_weight": weight}
            loss = loss + weight * generator_loss
        yield "autoencoder", loss, log

        if adversarial:
            real = self.modules["discriminator"](pixels)
            fake = self.modules["discriminator"](sample.detach())
            yield "discriminator", hinge_discriminator_loss(real, fake), {"real": real.mean(), "fake": fake.mean()}

    @torch.no_grad()
    def quantized(self, latents):
        """The vectors (B, C, h, w) of the codes of noisy latents."""
        codes = self.quantizer.encode(latents)
        return self.quantizer.decode(codes.view(-1, *latents.shape[2:]))

    def validate(self, modules, step):
        config, sigmas = self.config, self.config.curve_sigmas
        pixels = self.validation_pixels.to(self.before.device)
        latents = torch.cat([encode_pixels(self.before, part) for part in pixels.split(config.batch_size)])
        settings = {"noise_type": config.noise_type, "batch_size": config.batch_size, "seed": config.seed}
        decoders = {"before": self.before, "after": modules["autoencoder"]}
        if self.quantizer is not None:
            for name, decoder in list(decoders.items()):
                decoders[f"{name}, codes"] = lambda noisy, decoder=decoder: decoder(self.quantized(noisy))
        curves, images = {}, {}
        for name, decode in decoders.items():
            curves[name] = psnr_against_noise(decode, latents, pixels, sigmas, **settings)
            images[name] = decode(noisy_latents(latents[:8], config.sigma, config.noise_type, config.seed))
        write_text(Path(config.output_dir) / "psnr_against_noise.md", noise_table(sigmas, curves))
        metrics = {
            f"psnr_{name.replace(', ', '_')}_{sigma:g}": value
            for name, values in curves.items()
            for sigma, value in zip(sigmas, values)
        }
        shown = make_grid(torch.cat([pixels[:8], *images.values()]), columns=len(pixels[:8]))
        pictures = {"reconstructions": shown}
        if is_matplotlib_available():  # the table has the same numbers
            pictures["psnr_against_noise"] = draw_noise_curves(sigmas, curves, config.sigma)
        return Validation(pictures, metrics)

    def pipeline(self, modules):
        vae = modules["autoencoder"]
        return CodedAutoencoder(vae.plain(vae.config.scaling_factor), self.quantizer)


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    trainer.fit(NoiseRobustDecoderTask(config), training_images(config))


if __name__ == "__main__":
    main()
