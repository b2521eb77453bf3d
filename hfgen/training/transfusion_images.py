"""What images are to a Transfusion run: latents or pixels that are noised, or codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfgen.data.transforms import to_pixels
from hfgen.models.quantizers.noisy_latents import NoisyLatentQuantizer
from hfgen.training.flag_sources import loading_flag
from hfgen.training.latents import batch_samples, load_autoencoder, sample_shape
from hfgen.training.noisy_latents import load_quantizer, new_quantizer
from hfgen.training.task import Phase
from hfgen.training.token_encoding import batch_codes, decode_tokens, load_image_tokenizer
from hfgen.training.transfusion import TransfusionTrainingConfig


def load_image_model(config: TransfusionTrainingConfig) -> nn.Module | None:
    """The autoencoder or, for discrete images, the tokenizer that ``--vae`` names; None for pixels.

    Raises:
        ValueError: continuous images with a discrete tokenizer.
    """
    if config.image_mode == "continuous":
        return load_autoencoder(config)
    with loading_flag("vae", config.vae):
        return load_image_tokenizer(config.vae, config.vae_subfolder)


class ContinuousImages:
    """Patches of pixels or latents.

    Args:
        config: patches and adapter.
        vae: a frozen autoencoder, None for pixels.

    Raises:
        ValueError: sides that autoencoder or patches do not divide.
    """

    def __init__(self, config: TransfusionTrainingConfig, vae: nn.Module | None) -> None:
        self.config, self.vae = config, vae
        self.channels, self.side = sample_shape(config, vae)
        if self.side % config.patch_size:
            raise ValueError(f"--patch_size {config.patch_size} does not divide the side of the samples, {self.side}.")
        self.num_tokens = (self.side // config.patch_size) ** 2
        self.frozen = () if vae is None else (vae,)
        self.modules: dict[str, nn.Module] = {}
        self.phases: dict[str, Phase] = {}

    def transformer_arguments(self) -> dict[str, Any]:
        """Arguments of the transformer that say what images are."""
        config = self.config
        return {
            "image_mode": "continuous",
            "latent_channels": self.channels,
            "patch_size": config.patch_size,
            "image_adapter": config.image_adapter,
            "adapter_channels": config.adapter_channels,
            "bidirectional_images": not config.causal_images,
        }

    def samples(self, batch: Mapping[str, Any], images: Tensor, generator: torch.Generator) -> Tensor:
        """Clean samples (N, C, h, w) of the images (N,) of a batch, as of ``hfgen.training.latents.batch_samples``."""
        if len(images) == 0:  # a batch of text, which not every autoencoder can do nothing with
            return torch.zeros(0, self.channels, self.side, self.side, device=images.device)
        chosen = {name: batch[name][images] for name in ("pixels", "moments", "latents") if name in batch}
        return batch_samples(chosen, self.vae, generator)

    def pixels(self, batch: Mapping[str, Any]) -> Tensor:
        """The images (B, 3, H, W) of a batch in [-1, 1]."""
        return _pixels(batch, self.vae)

    def pipeline_parts(self) -> dict[str, Any]:
        """Components of the pipeline."""
        return {"vae": self.vae, "scheduler": self.config.noising().scheduler}


class DiscreteImages:
    """Codes of noisy latents, or of a discrete tokenizer.

    Without ``--quantizer`` the codes of noisy latents are learned in the first steps of the run.

    Args:
        config: codes and their noise.
        vae: a frozen autoencoder or discrete tokenizer.

    Attributes:
        quantizer: of latents, None with a discrete tokenizer.
        is_learned: whether the run trains the quantizer.
        codebook_size: number of codes.
        num_tokens: codes of an image.
    """

    def __init__(self, config: TransfusionTrainingConfig, vae: nn.Module) -> None:
        self.config, self.vae = config, vae
        self.quantizer: NoisyLatentQuantizer | None = None
        self.is_learned = False
        self.modules: dict[str, nn.Module] = {}
        self.phases: dict[str, Phase] = {}
        if getattr(vae, "codebook_size", None) is not None:
            if config.quantizer is not None:
                raise ValueError(f"--vae {config.vae} has codes of its own, so --quantizer has nothing to quantise.")
            if config.resolution != vae.image_size:
                raise ValueError(f"--resolution is {config.resolution}, but --vae is for images of {vae.image_size}.")
            self.codebook_size, self.num_tokens, self.frozen = vae.codebook_size, vae.num_tokens, (vae,)
            return
        channels, side = sample_shape(config, vae)
        self.num_tokens = side**2
        if config.quantizer is not None:
            self.quantizer = load_quantizer(config, channels)
            self.frozen = (vae, self.quantizer)
        else:
            self.quantizer, self.is_learned = new_quantizer(config, config.codebook_size, channels), True
            self.modules = {"quantizer": self.quantizer}
            self.phases = {"quantizer": Phase(("quantizer",), config.codebook_learning_rate, weight_decay=0.0)}
            self.frozen = (vae,)
        self.codebook_size = self.quantizer.codebook_size

    def transformer_arguments(self) -> dict[str, Any]:
        """Arguments of the transformer that say what images are."""
        timestep = self.config.noise_timestep
        return {"image_mode": "discrete", "codebook_size": self.codebook_size, "fixed_timestep": timestep}

    def noisy_latents(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) of a batch with their noise."""
        latents = batch_samples(batch, self.vae, generator)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return self.quantizer.add_noise(latents, noise)

    def codes(self, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
        """Codes (B, n) of a batch."""
        if self.quantizer is None:
            return batch_codes(batch, self.vae)
        return self.quantizer.encode(self.noisy_latents(batch, generator))

    def pixels(self, batch: Mapping[str, Any]) -> Tensor:
        """The images (B, 3, H, W) of a batch in [-1, 1]."""
        return _pixels(batch, self.vae)

    def pipeline_parts(self) -> dict[str, Any]:
        """Components of the pipeline."""
        return {"vae": self.vae, "quantizer": self.quantizer}


def _pixels(batch: Mapping[str, Any], vae: nn.Module | None) -> Tensor:
    if "pixels" in batch:
        return to_pixels(batch["pixels"])
    kind = next(name for name in ("moments", "latents", "codes") if name in batch)
    return decode_tokens(vae, kind, batch[kind]).clamp(-1, 1)
