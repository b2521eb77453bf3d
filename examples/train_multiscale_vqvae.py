"""Train VAR's multi-scale VQVAE: an image tokenizer whose codes form a pyramid (arXiv 2404.02905, section 3.2).

    accelerate launch examples/train_multiscale_vqvae.py --output_dir runs/tokenizer

The defaults train a small tokenizer on the built-in shapes. The result is the folder OUTPUT_DIR/final, for
MultiScaleVQVAE.from_pretrained and for examples/train_var.py --tokenizer.
"""

import torch
from torch.nn import functional as F

from hfgen import MultiScaleVQVAE
from hfgen.data.transforms import to_pixels
from hfgen.evaluation.reconstruction import reconstruction_metrics
from hfgen.images import make_comparison, make_grid
from hfgen.losses.adversarial import adaptive_weight, hinge_discriminator_loss, linear_generator_loss
from hfgen.losses.perceptual import LPIPS
from hfgen.models.layers.discriminators import PatchDiscriminator
from hfgen.models.quantizers.multiscale import draw_num_scales
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
from hfgen.training.multiscale_vqvae import MultiScaleVQVAETrainingConfig as Config


class MultiScaleVQVAETask(Task):
    def __init__(self, config: Config) -> None:
        self.config = config
        model = MultiScaleVQVAE(
            num_codes=config.num_codes,
            latent_channels=config.latent_channels,
            base_channels=config.base_channels,
            channel_multipliers=config.channel_multipliers,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            patch_nums=config.patch_nums,
            num_residual_convs=config.num_residual_convs,
            commitment_weight=config.commitment_weight,
            dropout=config.dropout,
            restart_after=config.restart_after,
        )
        self.modules, self.averaged = {"tokenizer": model}, ("tokenizer",)
        self.phases = {"tokenizer": Phase(("tokenizer",), no_decay=("embedding",))}
        if config.perceptual_weight > 0:
            if config.perceptual_source is None:
                raise ValueError("--perceptual_weight needs --perceptual_source: where the LPIPS weights are.")
            self.lpips = LPIPS.from_pretrained(config.perceptual_source)
            self.frozen = (self.lpips,)
        if config.adversarial_weight > 0:
            self.modules["discriminator"] = PatchDiscriminator(
                base_channels=config.discriminator_channels, num_layers=config.discriminator_layers
            )
            self.phases["discriminator"] = Phase(("discriminator",), config.discriminator_learning_rate)
        self.validation_pixels = to_pixels(validation_images(config))

    def training_step(self, batch, draws):
        config = self.config
        pixels = to_pixels(batch["pixels"])
        num_scales = draw_num_scales(len(pixels), len(config.patch_nums), config.quantizer_dropout, draws.generator())
        output = self.modules["tokenizer"](pixels, num_scales=num_scales)

        log = {"l1": F.l1_loss(output.sample, pixels), "l2": F.mse_loss(output.sample, pixels), **output.losses}
        reconstruction = config.l1_weight * log["l1"] + config.l2_weight * log["l2"]
        if config.perceptual_weight > 0:
            log["lpips"] = self.lpips(output.sample, pixels).mean()
            reconstruction = reconstruction + config.perceptual_weight * log["lpips"]
        loss = reconstruction + config.codebook_weight * output.loss

        adversarial = config.adversarial_weight > 0 and draws.step >= config.discriminator_start
        if adversarial:
            with frozen(self.modules["discriminator"]) as discriminator:
                generator_loss = linear_generator_loss(discriminator(output.sample))
            last_layer = unwrap(self.modules["tokenizer"]).last_layer_weight
            weight = config.adversarial_weight * adaptive_weight(reconstruction, generator_loss, last_layer)
            log |= {"generator": generator_loss, "adaptive_weight": weight}
            loss = loss + weight * generator_loss
        yield "tokenizer", loss, log

        if adversarial:
            real = self.modules["discriminator"](pixels)
            fake = self.modules["discriminator"](output.sample.detach())
            yield "discriminator", hinge_discriminator_loss(real, fake), {"real": real.mean(), "fake": fake.mean()}

    def validate(self, modules, step):
        tokenizer = modules["tokenizer"]
        pixels = self.validation_pixels.to(tokenizer.device)
        outputs = [tokenizer(part) for part in pixels.split(self.config.batch_size)]
        samples, codes = (torch.cat([output[name] for output in outputs]) for name in ("sample", "codes"))
        metrics = reconstruction_metrics(samples, pixels, codes=codes, num_codes=self.config.num_codes)
        stages = torch.stack(tokenizer.decode_codes_per_scale(codes[:8]), dim=1)  # (8, scales, 3, H, W)
        coarse_to_fine = make_grid(stages.flatten(0, 1), columns=stages.shape[1])
        comparison = make_comparison(pixels[:32], samples[:32])
        return Validation({"reconstructions": comparison, "coarse_to_fine": coarse_to_fine}, metrics)

    def pipeline(self, modules):
        return modules["tokenizer"]


@script(Config, __doc__)
def main(config: Config) -> None:
    Trainer(config).fit(MultiScaleVQVAETask(config), training_images(config))


if __name__ == "__main__":
    main()
