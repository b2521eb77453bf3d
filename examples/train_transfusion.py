"""Train Transfusion: one transformer that writes text and draws images (arXiv 2408.11039).

    accelerate launch examples/train_transfusion.py --output_dir runs/transfusion
    accelerate launch examples/train_transfusion.py --image_mode discrete --vae runs/vae/final \\
        --output_dir runs/transfusion-codes

Images are patches of noisy pixels, or with --vae latents, which the network learns to denoise beside the next tokens
of the captions. With --image_mode discrete they are codes of noisy latents, predicted like words; the codes are
learned in the first --codebook_steps steps, unless --quantizer names some, or --vae is a discrete tokenizer.

The defaults train a small model on the built-in shapes. The result is the pipeline folder OUTPUT_DIR/final, for
TransfusionPipeline.from_pretrained.
"""

import torch

from hfgen import TransfusionPipeline
from hfgen.counters import generator
from hfgen.losses.transfusion import IGNORED, limit_times, text_labels, transfusion_loss
from hfgen.training import Phase, Task, Trainer, Validation, script
from hfgen.training.flow import validation_rows
from hfgen.training.latents import training_latents
from hfgen.training.noisy_latents import quantize
from hfgen.training.transfusion import TransfusionTrainingConfig as Config
from hfgen.training.transfusion_images import ContinuousImages, DiscreteImages, load_image_model
from hfgen.training.transfusion_model import new_transformer
from hfgen.training.transfusion_text import SLOT, SequenceWriter
from hfgen.training.transfusion_validation import draw_and_write, validation_batches

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class TransfusionTask(Task):
    def __init__(
        self, config: Config, images: ContinuousImages | DiscreteImages, writer: SequenceWriter, rows
    ) -> None:
        self.config, self.images, self.writer, self.rows = config, images, writer, rows
        self.modules = {"transformer": new_transformer(config, images, writer), **images.modules}
        self.averaged = ("transformer",)
        self.phases = {"transformer": Phase(("transformer",), no_decay=("embed",)), **images.phases}
        self.frozen = images.frozen
        self.noising = config.noising()

    def training_step(self, batch, draws):
        rows = self.writer.draw(batch["caption"], draws.generator()).to(draws.device)
        if self.config.image_mode == "continuous":
            x0 = self.images.samples(batch, rows.images, draws.generator(1))
            loss, log = self.denoising_loss(self.modules["transformer"], rows, x0, draws.generator(2))
        else:
            if self.images.is_learned and draws.step < self.config.codebook_steps:
                noisy = self.images.noisy_latents(batch, draws.generator(3))
                quantized = quantize(self.modules["quantizer"], noisy, self.config.quantizer_type, draws.generator(4))
                yield "quantizer", quantized.loss, {}
            codes = self.images.codes(batch, draws.generator(1))[rows.images]
            loss, log = self.next_code_loss(self.modules["transformer"], rows, codes)
        yield "transformer", loss, log | {"wasted_share": rows.wasted_share}

    def denoising_loss(self, transformer, rows, x0, random, time=None):
        """Variant A: next tokens of text, and the noise or the velocity of images (N, C, h, w)."""
        ids, slot, config = self.writer.format, self.writer.first_free_id, self.config
        if time is None:  # text that follows an image is read off the noisy image
            times = limit_times(self.noising.times(len(x0), random), rows.image_first, config.image_first_limit)
        else:
            times = torch.full((len(x0),), time, device=x0.device)
        noise = torch.randn(x0.shape, generator=random, device=x0.device)
        noisy, timesteps, target = self.noising.noised(x0, noise, times)

        input_ids, segments = rows.ids.masked_fill(rows.ids == SLOT, slot), rows.segment_ids
        output = transformer(input_ids, noisy, timesteps, segment_ids=segments)
        labels = text_labels(
            input_ids, pad_token_id=ids.pad, image_token_id=slot, boi_token_id=ids.boi, segment_ids=segments
        )
        loss = transfusion_loss(output.logits, labels, output.sample, target, image_weight=config.image_weight)
        return loss.loss, {"text_loss": loss.text} | ({"image_loss": loss.image} if len(x0) else {})

    def next_code_loss(self, transformer, rows, codes):
        """Variant B: next tokens of text and next codes (N, n) alike."""
        first_code = self.writer.first_free_id
        input_ids = rows.ids.masked_scatter(rows.ids == SLOT, codes + first_code)
        logits = transformer(input_ids, segment_ids=rows.segment_ids).logits
        labels = text_labels(input_ids, pad_token_id=self.writer.format.pad, segment_ids=rows.segment_ids)
        loss, log = transfusion_loss(logits, labels).loss, {}
        with torch.no_grad():
            is_code = labels >= first_code
            for name, others in (("text_loss", is_code), ("image_loss", ~is_code)):
                if (~others & (labels >= 0)).any():
                    log[name] = transfusion_loss(logits, labels.masked_fill(others, IGNORED)).text
        return loss, log

    def validate(self, modules, step):
        transformer, pipeline, sums = modules["transformer"], self.pipeline(modules), {}
        for first, batch in validation_batches(self.rows, self.config.batch_size, transformer.device):
            share = len(batch["caption"]) / len(self.rows)
            for name, value in self.validation_losses(transformer, batch, first).items():
                sums[name] = sums.get(name, 0.0) + share * float(value)
        result = draw_and_write(pipeline, self.config, self.images, self.rows, self.writer.text_tokens + 1)
        return Validation(result.images, sums | result.metrics)

    def validation_losses(self, transformer, batch, first):
        """Of text alone, of captions after images without noise, and of images after their captions."""
        writer, captions, device = self.writer, batch["caption"], transformer.device
        random = generator(self.config.seed, first, device=device)
        alone = writer.texts_alone(writer.held_out(captions, first)).to(device)
        reading, drawing = (writer.captioned(captions, image_first=order).to(device) for order in (True, False))
        if self.config.image_mode == "discrete":
            codes = self.images.codes(batch, random)
            log = [self.next_code_loss(transformer, rows, codes[rows.images])[1] for rows in (alone, reading, drawing)]
            images = {"image_loss": log[2]["image_loss"]}
        else:
            cases = [(alone, 0.0), (reading, 0.0), *((drawing, time) for time in VALIDATION_TIMES)]
            samples = [self.images.samples(batch, rows.images, random) for rows, _ in cases]
            log = [
                self.denoising_loss(transformer, rows, x0, random, time)[1] for x0, (rows, time) in zip(samples, cases)
            ]
            images = {f"error_{time}": each["image_loss"] for time, each in zip(VALIDATION_TIMES, log[2:])}
        return {"text_loss": log[0]["text_loss"], "captioning_loss": log[1]["text_loss"], **images}

    def pipeline(self, modules):
        size = self.config.resolution
        return TransfusionPipeline(
            modules["transformer"], self.writer.tokenizer, image_size=size, **self.images.pipeline_parts()
        )


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    vae = load_image_model(config)
    data = training_latents(config, vae, trainer)
    images = (ContinuousImages if config.image_mode == "continuous" else DiscreteImages)(config, vae)
    writer = SequenceWriter(config, data, images.num_tokens)
    trainer.fit(TransfusionTask(config, images, writer, validation_rows(config, data)), data)


if __name__ == "__main__":
    main()
