"""Train VAR: class-conditional next-scale prediction over the codes of a multi-scale VQVAE (arXiv 2404.02905).

    accelerate launch examples/train_var.py --tokenizer runs/tokenizer/final --output_dir runs/var

It trains on images, or on a cache of their codes: --cache DIR takes one that examples/cache_tokens.py wrote, and
--cache_codes writes one on the way.

The defaults train a small model on the built-in shapes. The result is the pipeline folder OUTPUT_DIR/final, for
VARPipeline.from_pretrained.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hfgen import MultiScaleVQVAE, VARPipeline, VARTransformer
from hfgen.counters import generator
from hfgen.training import (
    Phase,
    Task,
    TokenTrainingConfig,
    Trainer,
    batch_codes,
    flag,
    load_model,
    script,
    training_tokens,
)
from hfgen.training.class_validation import class_validation

NO_DECAY = ("position_embed", "start_embed", "scale_embed", "modulation_table")  # as in the official trainer


@dataclass(kw_only=True)
class Config(TokenTrainingConfig):
    learning_rate: float = flag(5e-4, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.05, "decoupled weight decay of matrices", group="optimisation")
    max_grad_norm: float = flag(2.0, "gradients are scaled down to this norm; 0: no clipping", group="optimisation")

    num_layers: int = flag(4, "transformer blocks", least=1)
    num_attention_heads: int = flag(4, "attention heads", least=1)
    attention_head_dim: int = flag(32, "width of a head; the model's width is heads x this", least=1)
    shared_modulation: bool = flag(False, "one modulation layer for all blocks (the 512-pixel model)")
    drop_path: float = flag(0.0, "stochastic depth of the last block")
    gate_gain: float = flag(1e-3, "initial size of the residual gates")
    class_dropout: float = flag(0.1, "probability of training an image without its label, for guidance")
    label_smoothing: float = flag(0.0, "label smoothing of the cross entropy")
    validation_guidance_scale: float = flag(2.5, "guidance of the validation samples")


class VARTask(Task):
    def __init__(self, config: Config, tokenizer: MultiScaleVQVAE, num_classes: int, class_names: list[str]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.num_classes, self.class_names = num_classes, class_names
        self.frozen = (tokenizer,)
        model = VARTransformer(
            num_codes=tokenizer.config.num_codes,
            code_dim=tokenizer.config.latent_channels,
            num_classes=num_classes,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            patch_nums=tokenizer.config.patch_nums,
            shared_modulation=config.shared_modulation,
            class_dropout=config.class_dropout,
            drop_path=config.drop_path,
        )
        model.init_weights(config.gate_gain)
        self.modules = {"transformer": model}
        self.phases = {"transformer": Phase(("transformer",), no_decay=NO_DECAY)}
        self.averaged = ("transformer",)

    def training_step(self, batch, draws):
        with torch.no_grad():
            codes = batch_codes(batch, self.tokenizer)
            inputs = self.tokenizer.quantizer.generator_inputs(codes)  # (B, L - p_1^2, C): the true images so far
        labels = batch["label"]
        dropped = (
            torch.rand(len(labels), generator=draws.generator(), device=labels.device) < self.config.class_dropout
        )
        labels = torch.where(dropped, self.num_classes, labels)

        logits = self.modules["transformer"](inputs, labels).logits.transpose(1, 2)  # (B, V, L)
        losses = F.cross_entropy(logits, codes, label_smoothing=self.config.label_smoothing, reduction="none")
        correct = (logits.argmax(dim=1) == codes).float()

        log = {"accuracy": correct.mean()}
        split = self.tokenizer.quantizer.split
        for side, scale_losses, scale_correct in zip(self.tokenizer.config.patch_nums, split(losses), split(correct)):
            log |= {f"loss_{side}x{side}": scale_losses.mean(), f"accuracy_{side}x{side}": scale_correct.mean()}
        yield "transformer", losses.mean(), log

    def validate(self, modules, step):
        config = self.config
        labels = torch.arange(config.num_validation_images) % self.num_classes
        pipeline = self.pipeline(modules)
        pipeline.set_progress_bar_config(disable=True)
        images = []
        for part in torch.arange(len(labels)).split(config.batch_size):
            output = pipeline(
                labels[part].tolist(),
                guidance_scale=config.validation_guidance_scale,
                top_k=0,
                generator=[generator(config.seed, index) for index in part.tolist()],
                output_type="pt",
            )
            images.append(output.images.cpu())
        pixels = torch.cat(images) * 2 - 1
        return class_validation(config.dataset, pixels, labels)

    def pipeline(self, modules):
        return VARPipeline(self.tokenizer, modules["transformer"], class_names=self.class_names)


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    tokenizer = load_model("tokenizer", config.tokenizer, MultiScaleVQVAE)
    data = training_tokens(config, tokenizer, trainer)
    trainer.fit(VARTask(config, tokenizer, data.num_classes, data.class_names), data)


if __name__ == "__main__":
    main()
