"""Train MaskGIT: class-conditional masked-token prediction over the codes of any tokenizer (arXiv 2202.04200).

    accelerate launch examples/train_maskgit.py --tokenizer runs/titok/final --output_dir runs/maskgit

Any tokenizer of hfgen with a fixed number of codes will do, be they a grid or not. It trains on images, or on a cache
of their codes: --cache DIR takes one that examples/cache_tokens.py wrote, and --cache_codes writes one on the way.

The defaults train a small model on the built-in shapes. The result is the pipeline folder OUTPUT_DIR/final, for
MaskGITPipeline.from_pretrained.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hfgen import ImageBert, MaskedTokenScheduler, MaskGITPipeline, MaskGITTransformer, UViTBert
from hfgen.counters import generator
from hfgen.losses.masked import masked_token_accuracy, masked_token_loss
from hfgen.sampling.masked_tokens import check_mask_schedule, mask_ratio, random_token_mask
from hfgen.training import (
    Phase,
    Task,
    TokenTrainingConfig,
    Trainer,
    batch_codes,
    flag,
    script,
    training_tokens,
)
from hfgen.training.class_validation import class_validation
from hfgen.training.token_encoding import load_code_tokenizer


@dataclass(kw_only=True)
class Config(TokenTrainingConfig):
    learning_rate: float = flag(1e-3, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.03, "decoupled weight decay of matrices", group="optimisation")

    model: Literal["maskgit", "image_bert", "uvit"] = flag(
        "maskgit", "MaskGITTransformer, or TiTok's ImageBert and UViTBert"
    )
    num_layers: int = flag(4, "transformer blocks; uvit adds one in the middle", least=1)
    num_attention_heads: int = flag(4, "attention heads", least=1)
    hidden_size: int = flag(128, "width of the model", least=1)
    intermediate_size: int = flag(512, "width inside the MLPs", least=1)
    dropout: float = flag(0.0, "dropout of maskgit and image_bert; uvit has none")
    class_dropout: float = flag(0.1, "probability of training an image without its label, for guidance")
    mask_schedule: str = flag("cosine", "share of masked tokens as a function of a uniform draw: cosine, arccos, ...")
    unmasked_weight: float = flag(0.0, "weight in the loss of the tokens that are not masked")
    label_smoothing: float = flag(0.0, "label smoothing of the cross entropy")
    loss_mean: Literal["tokens", "images"] = flag("tokens", "mean over all tokens, or over images of their means")

    scheduler: Literal["maskgit", "maskgit-512", "titok", "titok-l32", "titok-b64", "titok-s128"] = flag(
        "maskgit", "sampling rule of the result"
    )
    num_inference_steps: int | None = flag(8, "its steps; 'none': those of the rule, as in the three flags below")
    guidance_scale: float | None = flag(2.0, "its guidance, 1 is off")
    token_temperature: float | None = flag(None, "its temperature of the draw of codes")
    choice_temperature: float | None = flag(None, "its temperature of the choice of tokens that stay")


class MaskGITTask(Task):
    def __init__(self, config: Config, tokenizer: nn.Module, num_classes: int, class_names: list[str]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.num_classes, self.class_names = num_classes, class_names
        self.frozen = (tokenizer,)
        sizes = {
            "num_codes": tokenizer.codebook_size,
            "num_tokens": tokenizer.num_tokens,
            "num_classes": num_classes,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_layers,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "class_dropout": config.class_dropout,
        }
        dropout = {"dropout": config.dropout}
        model = {
            "maskgit": lambda: MaskGITTransformer(**sizes, **dropout, unconditional_class=config.class_dropout > 0),
            "image_bert": lambda: ImageBert(**sizes, **dropout, attention_dropout=config.dropout),
            "uvit": lambda: UViTBert(**sizes),
        }[config.model]()
        self.modules, self.averaged = {"transformer": model}, ("transformer",)
        self.phases = {"transformer": Phase(("transformer",), no_decay=("embed",))}
        check_mask_schedule(config.mask_schedule)
        names = ("num_inference_steps", "guidance_scale", "token_temperature", "choice_temperature")
        given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        self.scheduler = MaskedTokenScheduler(**{**MaskedTokenScheduler.presets[config.scheduler], **given})
        plan = self.scheduler.plan([tokenizer.num_tokens])  # more steps than tokens are an error now, not at the end
        if config.class_dropout == 0 and any(step.guidance_scale != 1 for step in plan):
            raise ValueError("--class_dropout 0 trains no unconditional class, so --guidance_scale must be 1.")

    def training_step(self, batch, draws):
        config, random = self.config, draws.generator()
        codes, labels = batch_codes(batch, self.tokenizer), batch["label"]
        dropped = torch.rand(len(labels), generator=random, device=labels.device) < config.class_dropout
        labels = torch.where(dropped, self.num_classes, labels)
        progress = torch.rand(len(codes), generator=random, device=codes.device)
        order = torch.rand(codes.shape, generator=random, device=codes.device)
        mask = random_token_mask(mask_ratio(config.mask_schedule, progress, codes.shape[1]), order)

        logits = self.modules["transformer"](codes.masked_fill(mask, self.tokenizer.codebook_size), labels).logits
        loss = masked_token_loss(
            logits,
            codes,
            mask,
            unmasked_weight=config.unmasked_weight,
            label_smoothing=config.label_smoothing,
            reduction=config.loss_mean,
        )
        accuracy = masked_token_accuracy(logits, codes, mask)
        yield "transformer", loss, {"accuracy": accuracy, "masked": mask.float().mean()}

    def validate(self, modules, step):
        config = self.config
        labels = torch.arange(config.num_validation_images) % self.num_classes
        pipeline = self.pipeline(modules)
        pipeline.set_progress_bar_config(disable=True)
        images = []
        for part in torch.arange(len(labels)).split(config.batch_size):
            generators = [generator(config.seed, index) for index in part.tolist()]
            images.append(pipeline(labels[part].tolist(), generator=generators, output_type="pt").images.cpu())
        pixels = torch.cat(images) * 2 - 1
        return class_validation(config.dataset, pixels, labels)

    def pipeline(self, modules):
        return MaskGITPipeline(self.tokenizer, modules["transformer"], self.scheduler, class_names=self.class_names)


@script(Config, __doc__)
def main(config: Config) -> None:
    trainer = Trainer(config)
    tokenizer = load_code_tokenizer(config.tokenizer)
    data = training_tokens(config, tokenizer, trainer)
    trainer.fit(MaskGITTask(config, tokenizer, data.num_classes, data.class_names), data)


if __name__ == "__main__":
    main()
