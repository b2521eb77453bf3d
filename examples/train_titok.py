"""Train TiTok: an image as a short sequence of tokens (arXiv 2406.07550; in a single stage: arXiv 2501.07730).

    accelerate launch examples/train_titok.py --output_dir runs/titok

In two stages the decoder first learns the codes of a VQGAN, then, together with the decoder of that VQGAN, pixels:

    accelerate launch examples/train_titok.py --stage 1 --vqgan runs/vqgan/final --output_dir runs/s1
    accelerate launch examples/train_titok.py --stage 2 --vqgan runs/vqgan/final --stage1 runs/s1/final \\
        --output_dir runs/s2

The defaults train small models on the built-in shapes. The result is OUTPUT_DIR/final, for TiTok.from_pretrained.
"""

import logging

import torch

from hfgen import MaskGITVQGAN, TiTok
from hfgen.data.transforms import to_pixels
from hfgen.evaluation.reconstruction import reconstruction_metrics
from hfgen.images import make_comparison
from hfgen.losses.adversarial import hinge_discriminator_loss
from hfgen.losses.convnext import ConvNeXtDistance, MeanDistance
from hfgen.losses.perceptual import LPIPS
from hfgen.losses.titok import proxy_code_loss, reconstruction_loss
from hfgen.training import (
    Phase,
    Task,
    Trainer,
    Validation,
    batch_codes,
    frozen,
    load_model,
    script,
    training_images,
    unwrap,
    validation_images,
)
from hfgen.training.titok import LeCamDiscriminator, new_model, questionable_settings
from hfgen.training.titok import TiTokTrainingConfig as Config

NO_DECAY = ("embed", "latent_tokens", "mask_token", "latent_proj", "pixel_codebook")  # as in the official trainer


class TiTokTask(Task):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.frozen, self.vqgan, self.perceptual = (), None, None
        self.quantizer_weight = config.kl_weight if config.bottleneck == "kl" else config.quantizer_weight
        if config.stage != "single":
            self.vqgan = load_model("vqgan", config.vqgan, MaskGITVQGAN)
            self.frozen = (self.vqgan,)
        if config.stage == "2":
            model = load_model("stage1", config.stage1, TiTok).with_pixel_decoder(self.vqgan)
            self.frozen, self.quantizer_weight = (model.encoder, model.quantizer), 0.0
        else:
            model = new_model(config, self.vqgan)
        if model.image_size != config.resolution:
            raise ValueError(f"--resolution is {config.resolution}; stage 1 was trained with {model.image_size}.")
        self.modules, self.averaged = {"tokenizer": model}, ("tokenizer",)
        self.phases = {"tokenizer": Phase(("tokenizer",), no_decay=NO_DECAY)}
        if config.perceptual_weight > 0:
            shares = ((LPIPS, config.lpips_weight), (ConvNeXtDistance, config.convnext_weight))
            used = [(network.from_pretrained(config.perceptual_source), share) for network, share in shares if share]
            self.perceptual = MeanDistance(*zip(*used))
            self.frozen += (self.perceptual,)
        if config.adversarial_weight > 0:
            sizes = (config.discriminator_channels, config.discriminator_layers)
            self.modules["discriminator"] = LeCamDiscriminator(*sizes)
            self.phases["discriminator"] = Phase(("discriminator",))
        self.validation_pixels = to_pixels(validation_images(config))

    def training_step(self, batch, draws):
        config, tokenizer = self.config, self.modules["tokenizer"]
        pixels, noise = to_pixels(batch["pixels"]), None
        if config.bottleneck == "kl":
            shape = (len(pixels), config.num_latent_tokens, config.latent_channels)
            noise = torch.randn(shape, generator=draws.generator(), device=pixels.device)
        output = tokenizer(pixels, noise=noise)
        if config.stage == "1":
            codes = batch_codes(batch, self.vqgan)
            log = {"proxy": proxy_code_loss(output.logits, codes), **output.losses}
            log["accuracy"] = (output.logits.argmax(dim=-1) == codes).float().mean()
            yield "tokenizer", log["proxy"] + config.quantizer_weight * output.loss, log
            return

        names = ("l1_weight", "perceptual_weight")
        weights = {name: getattr(config, name) for name in names} | {"quantizer_weight": self.quantizer_weight}
        adversarial, fake = config.adversarial_weight > 0 and draws.step >= config.discriminator_start, None
        if adversarial:
            weights["adversarial_weight"] = config.adversarial_weight
            with frozen(self.modules["discriminator"]) as discriminator:
                fake = discriminator(output.sample)
        loss, log = reconstruction_loss(
            output.sample, pixels, output.loss, perceptual=self.perceptual, fake_logits=fake, **weights
        )
        yield "tokenizer", loss, log | output.losses
        if adversarial:
            real = self.modules["discriminator"](pixels)
            fake = self.modules["discriminator"](output.sample.detach())
            lecam = unwrap(self.modules["discriminator"]).lecam(real, fake)
            loss = hinge_discriminator_loss(real, fake) + config.lecam_weight * lecam
            yield "discriminator", loss, {"real": real.mean(), "fake": fake.mean(), "lecam": lecam}

    def validate(self, modules, step):
        tokenizer = modules["tokenizer"]
        pixels = self.validation_pixels.to(tokenizer.device)
        outputs = [tokenizer(part) for part in pixels.split(self.config.batch_size)]
        if self.config.stage == "1":
            outputs = [{**each, **self.vqgan.decode_codes(each.logits.argmax(dim=-1))} for each in outputs]
        samples = torch.cat([each["sample"] for each in outputs])
        codes = None if tokenizer.codebook_size is None else torch.cat([each["codes"] for each in outputs])
        metrics = reconstruction_metrics(samples, pixels, codes=codes, num_codes=tokenizer.codebook_size)
        return Validation({"reconstructions": make_comparison(pixels[:32], samples[:32])}, metrics)

    def pipeline(self, modules):
        return modules["tokenizer"]


@script(Config, __doc__)
def main(config: Config) -> None:
    for message in questionable_settings(config):
        logging.getLogger(__name__).warning("Is this wanted? %s.", message)
    Trainer(config).fit(TiTokTask(config), training_images(config))


if __name__ == "__main__":
    main()
