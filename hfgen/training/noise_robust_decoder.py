"""The settings of examples/finetune_noise_robust_decoder.py, its model and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from hfgen.models.quantizers.noisy_latents import NoisyLatentQuantizer
from hfgen.training.autoencoder_kl import PosteriorAutoencoderKL
from hfgen.training.config import REQUIRED, TrainingConfig, flag
from hfgen.training.flag_sources import loading_flag
from hfgen.training.latents import latent_side
from hfgen.training.noisy_latents import NoisyLatentFlags


@dataclass(kw_only=True)
class NoiseRobustTrainingConfig(NoisyLatentFlags, TrainingConfig):
    """The settings of a run that fine-tunes a decoder. The help text of each field is its documentation."""

    batch_size: int = flag(16, "images per process and micro-step", group="optimisation")
    learning_rate: float = flag(3e-4, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.0, "decoupled weight decay of convolutions", group="optimisation")

    vae: str = flag(REQUIRED, "folder or Hub id of the trained AutoencoderKL; its encoder stays as it is")
    vae_subfolder: str | None = flag(None, "its folder inside of a pipeline, for example vae")
    codebook_size: int | None = flag(
        None, "learn so many codes of the noisy latents, and decode these; by default latents are not quantised",
        group="codes",
        least=1,
    )  # fmt: skip
    curve_sigmas: tuple[float, ...] = flag(
        (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), "noise at which validation decodes, before and after"
    )

    reconstruction: Literal["l1", "l2"] = flag("l1", "absolute or squared error of the pixels")
    perceptual_weight: float = flag(0.0, "weight of LPIPS; 0 switches it off")
    perceptual_source: str | None = flag(
        None, "folder or Hub id with the LPIPS weights; needed if its weight is not 0"
    )
    adversarial_weight: float = flag(0.0, "weight of the PatchGAN loss; 0 trains no discriminator")
    discriminator_start: int = flag(0, "first step with the adversarial loss")
    discriminator_layers: int = flag(2, "stride-2 layers of the discriminator", least=1)
    discriminator_channels: int = flag(64, "width of its first layer", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual_weight > 0 and self.perceptual_source is None:
            raise ValueError("--perceptual_weight needs --perceptual_source: where the LPIPS weights are.")
        if self.codebook_size is not None and self.quantizer is not None:
            raise ValueError("--quantizer names trained codes and --codebook_size learns some; give only one of them.")
        highest = 1.0 if self.noise_type == "variance_preserving" else float("inf")
        if not self.curve_sigmas or not all(0 <= sigma <= highest for sigma in self.curve_sigmas):
            raise ValueError(f"--curve_sigmas is {self.curve_sigmas}; expected values in [0, {highest}].")


class DecodingAutoencoderKL(PosteriorAutoencoderKL):
    """An ``AutoencoderKL`` whose training pass is the decoder alone."""

    def forward(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of latents (B, C, h, w) on the scale of generators."""
        return self.decode(latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)).sample


class CodedAutoencoder:
    """What a run saves: the autoencoder, and in the subfolder ``quantizer`` the codes of its latents."""

    def __init__(self, vae: AutoencoderKL, quantizer: NoisyLatentQuantizer | None) -> None:
        self.vae, self.quantizer = vae, quantizer

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights of the autoencoder."""
        return self.vae.dtype

    def to(self, dtype: torch.dtype) -> None:
        """Convert the autoencoder; distances to codes are measured in float32 and stay so."""
        self.vae.to(dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder for ``AutoencoderKL.from_pretrained``."""
        self.vae.save_pretrained(folder)
        if self.quantizer is not None:
            self.quantizer.save_pretrained(Path(folder) / "quantizer")


def load_decoder(config: NoiseRobustTrainingConfig) -> DecodingAutoencoderKL:
    """The autoencoder that ``--vae`` names.

    Raises:
        ValueError: it is no ``AutoencoderKL``, or does not divide the images.
    """
    location = {"subfolder": config.vae_subfolder}
    with loading_flag("vae", config.vae):
        class_name = AutoencoderKL.load_config(config.vae, **location).get("_class_name")
    if class_name != "AutoencoderKL":
        raise ValueError(f"--vae {config.vae} is a {class_name}; expected diffusers' AutoencoderKL.")
    with loading_flag("vae", config.vae):
        vae = DecodingAutoencoderKL.from_pretrained(config.vae, use_safetensors=True, **location)
    latent_side(config.resolution, vae)
    return vae
