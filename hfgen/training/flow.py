"""The settings of examples/train_rectified_flow.py, and the rows that it validates on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hfgen.data.shards import is_tar_source
from hfgen.data.sources import load_images
from hfgen.data.tar_stream import TarImages
from hfgen.data.token_cache import TokenCache
from hfgen.losses.flow import sample_sigmas
from hfgen.training.config import flag
from hfgen.training.latents import LatentTrainingConfig

_TEXT_FLAGS = ("text_encoder", "text_tokenizer")


@dataclass(kw_only=True)
class FlowTrainingConfig(LatentTrainingConfig):
    """The settings of a run that trains a flow. The help text of each field is its documentation."""

    learning_rate: float = flag(1e-3, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.0, "decoupled weight decay of matrices", group="optimisation")

    model: Literal["dit", "mmdit"] = flag("dit", "DiT with class labels, or SD3's transformer with captions")
    patch_size: int = flag(4, "side of a patch of pixels or latents", least=1)
    num_layers: int = flag(4, "transformer blocks", least=1)
    width: int = flag(96, "width of the model", least=1)
    num_heads: int = flag(4, "attention heads", least=1)
    timestep_scale: float = flag(1.0, "dit: its time is 1000 sigma times this; SiT has 0.001")
    reverse_time: bool = flag(False, "dit: its time is 1 for data, as SiT's, and needs --timestep_scale 0.001")

    condition_dropout: float = flag(0.1, "probability of training an image without label or caption, for guidance")
    time_density: Literal["uniform", "logit_normal", "mode", "cosmap"] = flag(
        "logit_normal", "how the times of the training steps are drawn"
    )
    logit_mean: float = flag(0.0, "of logit_normal; above 0 favours noise")
    logit_std: float = flag(1.0, "of logit_normal")
    mode_scale: float = flag(1.29, "of mode; above 0 favours the middle")
    shift: float = flag(1.0, "above 1 moves the times of training and of the result's scheduler towards noise")
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = flag("none", "weight of a time in the loss")
    precondition: bool = flag(False, "compare the image that the velocity points to, not the velocity: weight sigma^2")

    text_encoder: str | None = flag(
        None, "mmdit: folder or Hub id of a T5 that stays as it is; by default a small one is trained with the flow"
    )
    text_tokenizer: str | None = flag(
        None, "mmdit: folder or Hub id of its tokenizer; by default that of --text_encoder, or learned from the data"
    )
    vocab_size: int = flag(128, "tokens of a tokenizer that is learned from the captions", least=5)
    text_tokens: int | None = flag(
        None, "tokens of a caption: longer ones are cut, shorter ones padded; by default as the longest, at most 256"
    )
    text_width: int = flag(64, "width of the text encoder that is trained", least=1)
    text_layers: int = flag(2, "its layers", least=1)
    text_heads: int = flag(4, "its attention heads", least=1)

    num_inference_steps: int = flag(25, "Euler steps of the validation samples", least=1)
    guidance_scale: float = flag(2.0, "their guidance, 1 is off")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sigmas(1, torch.Generator())  # says what is wrong with the density
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"--condition_dropout is {self.condition_dropout}, a probability from 0 to 1.")
        if self.condition_dropout == 0 and self.guidance_scale != 1:
            raise ValueError("--condition_dropout 0 trains nothing to guide away from: set --guidance_scale 1.")
        if self.width % self.num_heads:
            raise ValueError(f"--width {self.width} must be a multiple of --num_heads {self.num_heads}.")
        if self.model != "mmdit" and any(getattr(self, name) is not None for name in _TEXT_FLAGS):
            raise ValueError(f"--model {self.model} reads no text: leave --text_encoder and --text_tokenizer out.")
        if self.model != "dit" and (self.timestep_scale != 1 or self.reverse_time):
            raise ValueError(f"--timestep_scale and --reverse_time are of dit, not of --model {self.model}.")
        if self.text_tokens is not None and self.text_tokens < 3:
            raise ValueError(f"--text_tokens is {self.text_tokens}; one token and the ends of a text are 3.")
        if self.text_width % self.text_heads:
            raise ValueError(f"--text_width {self.text_width} must be a multiple of --text_heads {self.text_heads}.")

    def sigmas(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Flow times (B,) of a training step, on the device of ``generator``."""
        return sample_sigmas(
            batch_size,
            self.time_density,
            generator,
            logit_mean=self.logit_mean,
            logit_std=self.logit_std,
            mode_scale=self.mode_scale,
            shift=self.shift,
        )


def validation_rows(config: FlowTrainingConfig, data: Dataset) -> list[dict[str, Any]]:
    """Rows to validate on, as many as there are: of the validation split, or the first of a cache, which has none.

    Raises:
        ValueError: the data set has no such split.
    """
    count = config.num_validation_images
    if isinstance(data, TokenCache):
        return [data[index] for index in range(min(count, len(data)))]
    try:
        split = load_images(
            config.dataset,
            resolution=config.resolution,
            split=config.validation_split,
            image_column=config.image_column,
            caption_column=config.caption_column,
            label_column=config.label_column,
            resize_ratio=config.resize_ratio,
            resample=config.resample,
            seed=config.seed,
            strict=config.strict,
            limit=None if is_tar_source(config.dataset) else count,
            config_name=config.dataset_config_name,
            revision=config.dataset_revision,
            num_classes=config.num_classes,
        )
    except ValueError as error:
        raise ValueError(
            f"No validation images: {error}. Name another with --validation_split; 'train' shows training images."
        ) from error
    rows = split if isinstance(split, TarImages) else (split[0, index] for index in range(len(split)))
    return [{name: row[name] for name in ("pixels", "label", "caption") if name in row} for row in islice(rows, count)]
