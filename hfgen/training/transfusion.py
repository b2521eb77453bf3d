"""The settings of examples/train_transfusion.py (Transfusion, arXiv 2408.11039)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hfgen.losses.transfusion import IMAGE_WEIGHT
from hfgen.training.config import flag
from hfgen.training.latents import LatentTrainingConfig
from hfgen.training.noisy_latents import NoisyLatentFlags
from hfgen.training.transfusion_noise import NUM_TIMESTEPS, DiffusionNoise, FlowNoise, Noising

_SHARES = ("caption_first_share", "caption_dropout", "text_only_share")


@dataclass(kw_only=True)
class TransfusionTrainingConfig(NoisyLatentFlags, LatentTrainingConfig):
    """The settings of a run that trains Transfusion. The help text of each field is its documentation."""

    dataset: str = flag(
        "shapes:mixed",
        "captioned images: 'shapes:single', 'shapes:double' or 'shapes:mixed' (built in), a folder, the Hub id of a "
        "data set, or tar files to stream: their folder, path/{000..099}.tar, hf://datasets/USER/NAME/*.tar, "
        "https://...",
        group="data",
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "muon"] = flag(
        "muon",
        "see docs/training.md; muon is for the matrices of the blocks, adamw for the rest",
        group="optimisation",
    )
    learning_rate: float = flag(1e-2, "peak learning rate", group="optimisation")
    adamw_ratio: float = flag(
        0.3,
        "with --optimizer muon: learning rate of what it leaves to AdamW (embeddings, norms, outer layers) / "
        "--learning_rate",
        group="optimisation",
    )
    weight_decay: float = flag(0.0, "decoupled weight decay of matrices", group="optimisation")

    image_mode: Literal["continuous", "discrete"] = flag(
        "continuous",
        "patches of noisy latents, which are denoised (the paper), or codes of the noisy latents of --vae, which are "
        "predicted like words; --vae may then also be a discrete tokenizer, whose own codes are taken",
    )
    num_layers: int = flag(6, "transformer blocks", group="model", least=1)
    width: int = flag(128, "width of the model", group="model", least=1)
    num_heads: int = flag(4, "attention heads", group="model", least=1)
    mlp_width: int | None = flag(
        None, "width inside the MLPs; by default 8/3 of the width, in steps of 32", group="model", least=1
    )
    context_length: int = flag(512, "longest sequence that the model takes", group="model", least=1)
    llama: str | None = flag(
        None,
        "folder or Hub id of a Llama checkpoint to start from, which then decides about these sizes; it wants a "
        "smaller --learning_rate",
        group="model",
    )  # fmt: skip

    patch_size: int = flag(4, "continuous: side of a patch of pixels or latents", group="images", least=1)
    image_adapter: Literal["linear", "unet"] = flag(
        "linear", "continuous: patches through a linear layer, or through the blocks of a U-Net", group="images"
    )
    adapter_channels: tuple[int, ...] = flag(
        (32, 64, 128),
        "unet: channels of its levels; every next one halves the sides, down to a patch",
        group="images",
        least=1,
    )
    causal_images: bool = flag(False, "continuous: patches see only those before them (an ablation)", group="images")
    prediction_type: Literal["flow", "epsilon", "v_prediction"] = flag(
        "flow", "continuous: a flow's velocity, or a diffusion's noise (the paper) or v", group="images"
    )
    time_density: Literal["uniform", "logit_normal"] = flag("uniform", "flow: density of the times", group="images")
    image_weight: float = flag(IMAGE_WEIGHT, "continuous: weight of the loss of images, lambda", group="images")
    image_first_max_timestep: int = flag(
        500, "continuous: images that precede their caption are noised less than this of 1000", group="images"
    )

    codebook_size: int = flag(256, "discrete: number of codes that are learned", group="codes", least=1)
    codebook_steps: int = flag(
        500, "discrete: the codes are learned in so many first steps, then fixed", group="codes", least=1
    )

    caption_first_share: float = flag(0.8, "share of the captions that precede their image", group="text")
    caption_dropout: float = flag(0.1, "share of the images without caption, for guidance", group="text")
    text_only_share: float = flag(0.0, "share of the micro-batches that are text alone", group="text")
    text_dataset: str | None = flag(
        None,
        "their texts: a file (.txt by lines, .jsonl, .csv, .parquet), a folder or the Hub id of a data set; by "
        "default the captions; the first --num_validation_images are kept for validation",
        group="text",
    )
    text_column: str = flag("text", "its column", group="text")
    text_batch_size: int | None = flag(
        None, "its texts in a micro-batch; by default --batch_size", group="text", least=1
    )
    text_tokenizer: str | None = flag(
        None,
        "folder or Hub id of a tokenizer; by default that of --llama, or one that sentencepiece learns from the "
        "captions",
        group="text",
    )
    vocab_size: int = flag(128, "tokens of a tokenizer that is learned", group="text", least=5)
    text_tokens: int | None = flag(
        None, "tokens of a caption, longer ones are cut; by default as the longest, at most 256", group="text", least=1
    )
    row_length: int | None = flag(
        None,
        "tokens of a row of a batch, which several documents share; by default as the longest with an image",
        group="text",
    )

    sampler: Literal["ddim", "ddpm"] = flag("ddim", "epsilon, v_prediction: sampling rule of the result")
    num_inference_steps: int = flag(25, "continuous: its steps, and those of a flow's validation samples", least=1)
    guidance_scale: float = flag(3.0, "guidance of the validation samples, 1 is off")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be between 0 and 1.")
        if self.caption_dropout == 0 and self.guidance_scale != 1:
            raise ValueError("--caption_dropout 0 trains nothing to guide away from: set --guidance_scale 1.")
        if not 1 <= self.image_first_max_timestep <= NUM_TIMESTEPS:
            raise ValueError(
                f"--image_first_max_timestep is {self.image_first_max_timestep}; it must be between 1 and "
                f"{NUM_TIMESTEPS}."
            )
        if self.num_inference_steps > NUM_TIMESTEPS:
            raise ValueError(
                f"--num_inference_steps is {self.num_inference_steps}; it must be at most {NUM_TIMESTEPS}."
            )
        if self.image_weight < 0:
            raise ValueError(f"--image_weight is {self.image_weight}; it must not be negative.")
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"--width {self.width} must be a multiple of twice --num_heads {self.num_heads}: rotary positions "
                "turn pairs of channels."
            )
        if (self.text_dataset is not None or self.text_batch_size is not None) and self.text_only_share == 0:
            raise ValueError("--text_dataset and --text_batch_size need --text_only_share: how often they are used.")
        if self.text_batch_size is not None and self.text_dataset is None:
            raise ValueError("--text_batch_size is of --text_dataset; a batch has as many captions as images.")
        if self.image_mode == "discrete" and self.vae is None:
            raise ValueError("--image_mode discrete takes codes of the latents of an autoencoder: give --vae.")
        if self.image_mode == "continuous" and self.quantizer is not None:
            raise ValueError("--quantizer is of --image_mode discrete; continuous images have no codes.")
        halvings = len(self.adapter_channels) - 1
        if self.image_adapter == "unet" and self.patch_size != 2**halvings:
            raise ValueError(
                f"--adapter_channels has {halvings + 1} levels, which make patches of {2 ** max(halvings, 0)}, but "
                f"--patch_size is {self.patch_size}."
            )

    @property
    def image_first_limit(self) -> float:
        """The largest time of an image that precedes its caption, as a share of all."""
        return self.image_first_max_timestep / NUM_TIMESTEPS

    def noising(self) -> Noising:
        """How continuous images are noised, and the scheduler of the result."""
        if self.prediction_type == "flow":
            return FlowNoise(self.time_density)
        return DiffusionNoise(
            self.prediction_type,
            clip=self.vae is None,
            algorithm=self.sampler,
            num_inference_steps=self.num_inference_steps,
        )
