"""Train MaskGIT's VQGAN: images as a grid of codes, by convolutions alone (arXiv 2202.04200, section 3.1).

    accelerate launch examples/train_maskgit_vqgan.py --output_dir runs/vqgan

The defaults train a small tokenizer on the built-in shapes. The result is the folder OUTPUT_DIR/final, for
MaskGITVQGAN.from_pretrained, for examples/train_maskgit.py --tokenizer and for examples/train_titok.py --vqgan.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hfgen import MaskGITVQGAN
from hfgen.data.transforms import to_pixels
from hfgen.evaluation.reconstruction import reconstruction_metrics
from hfgen.images import make_comparison
from hfgen.losses.adversarial import non_saturating_generator_loss, r1_penalty, vanilla_discriminator_loss
from hfgen.losses.perceptual import LPIPS
from hfgen.models.layers.blur_discriminator import BlurPatchDiscriminator
from hfgen.training import (
    Phase,
    Task,
    Trainer,
    TrainingConfig,
    Validation,
    flag,
    frozen,
    script,
    training_images,
    validation_images,
)


@dataclass(kw_only=True)
class Config(TrainingConfig):
    learning_rate: float = flag(2.5e-3, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.0, "decoupled weight decay of convolutions", group="optimisation")

    num_codes: int = flag(512, "size of the codebook", least=1)
    latent_channels: int = flag(16, "channels of the latents and of each code", least=1)
    base_channels: int = flag(16, "width at full resolution", least=1)
    channel_multipliers: tuple[int, ...] = flag(
        (1, 2, 2), "width of each level; all but the last halve the size", least=1
    )
    layers_per_block: int = flag(1, "residual blocks per level", least=1)
    norm_num_groups: int = flag(8, "groups of the group normalisations; divides every width", least=1)
    commitment_weight: float = flag(0.25, "weight of the encoder's term inside the quantizer's loss")
    entropy_weight: float = flag(0.0, "weight of the entropy term inside it, which spreads the codes; 0: none")
    entropy_temperature: float = flag(0.01, "temperature of the entropy term")

    restart_after: int = flag(100, "revive codes unused for N steps; 0 never")
    quantizer_weight: float = flag(
        0.08, "weight of the quantizer's loss, beside a weight of 1 of the squared error on the scale [0, 1]"
    )
    l1_weight: float = flag(0.05, "weight of the absolute error, also on the scale [0, 1]")
    perceptual_weight: float = flag(0.0, "weight of LPIPS; 0 switches it off")
    perceptual_source: str | None = flag(
        None, "folder or Hub id with the LPIPS weights; needed if its weight is not 0"
    )
    adversarial_weight: float = flag(0.0, "weight of the non-saturating GAN loss; 0 trains no discriminator")
    discriminator_start: int = flag(0, "first step with the adversarial loss")
    discriminator_layers: int = flag(1, "halvings of the discriminator before 16x16 logits", least=0)
    discriminator_channels: int = flag(64, "width of its first layer", least=1)
    discriminator_learning_rate: float | None = flag(None, "its peak learning rate; by default the same")
    gradient_penalty: float = flag(10.0, "weight of R1, the squared gradient of the discriminator at true images")


class MaskGITVQGANTask(Task):
    def __init__(self, config: Config) -> None:
        self.config = config
        model = MaskGITVQGAN(
            num_codes=config.num_codes,
            latent_channels=config.latent_channels,
            base_channels=config.base_channels,
            channel_multipliers=config.channel_multipliers,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            image_size=config.resolution,
            commitment_weight=config.commitment_weight,
            entropy_weight=config.entropy_weight,
            entropy_temperature=config.entropy_temperature,
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
            self.modules["discriminator"] = BlurPatchDiscriminator(
                base_channels=config.discriminator_channels,
                num_layers=config.discriminator_layers,
                norm_num_groups=math.gcd(32, config.discriminator_channels),
            )
            self.phases["discriminator"] = Phase(("discriminator",), config.discriminator_learning_rate)
        self.validation_pixels = to_pixels(validation_images(config))

    def training_step(self, batch, draws):
        config = self.config
        pixels = to_pixels(batch["pixels"])
        output = self.modules["tokenizer"](pixels)

        log = {"l2": F.mse_loss(output.sample, pixels) / 4, **output.losses}  # on the scale [0, 1]
        loss = log["l2"] + config.quantizer_weight * output.loss
        if config.l1_weight > 0:
            log["l1"] = F.l1_loss(output.sample, pixels) / 2
            loss = loss + config.l1_weight * log["l1"]
        if config.perceptual_weight > 0:
            log["lpips"] = self.lpips(output.sample, pixels).mean()
            loss = loss + config.perceptual_weight * log["lpips"]
        adversarial = config.adversarial_weight > 0 and draws.step >= config.discriminator_start
        if adversarial:
            with frozen(self.modules["discriminator"]) as discriminator:
                log["generator"] = non_saturating_generator_loss(discriminator(output.sample))
            loss = loss + config.adversarial_weight * log["generator"]
        yield "tokenizer", loss, log

        if adversarial:
            pixels.requires_grad_(config.gradient_penalty > 0)
            real = self.modules["discriminator"](pixels)
            fake = self.modules["discriminator"](output.sample.detach())
            loss, log = vanilla_discriminator_loss(real, fake), {"real": real.mean(), "fake": fake.mean()}
            if config.gradient_penalty > 0:
                log["r1"] = r1_penalty(real, pixels)
                loss = loss + config.gradient_penalty * log["r1"]
            yield "discriminator", loss, log

    def validate(self, modules, step):
        tokenizer = modules["tokenizer"]
        pixels = self.validation_pixels.to(tokenizer.device)
        outputs = [tokenizer(part) for part in pixels.split(self.config.batch_size)]
        samples, codes = (torch.cat([output[name] for output in outputs]) for name in ("sample", "codes"))
        metrics = reconstruction_metrics(samples, pixels, codes=codes, num_codes=self.config.num_codes)
        return Validation({"reconstructions": make_comparison(pixels[:32], samples[:32])}, metrics)

    def pipeline(self, modules):
        return modules["tokenizer"]


@script(Config, __doc__)
def main(config: Config) -> None:
    Trainer(config).fit(MaskGITVQGANTask(config), training_images(config))


if __name__ == "__main__":
    main()
