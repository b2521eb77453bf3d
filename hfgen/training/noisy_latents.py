"""The codes of noisy latents that a run learns: their flags and their quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hfgen.models.modeling import QuantizerOutput
from hfgen.models.quantizers.noisy_latents import NoisyLatentQuantizer
from hfgen.training.config import flag
from hfgen.training.flag_sources import load_model

RESTART_AFTER = 20  # steps without a latent after which a code moves to one


@dataclass(kw_only=True)
class NoisyLatentFlags:
    """Flags of codes of noisy latents, for the configurations of scripts."""

    quantizer: str | None = flag(
        None, "folder or Hub id of a trained quantizer, whose noise is then taken; it stays as it is", group="codes"
    )
    sigma: float = flag(0.1, "standard deviation of the noise in the latents", group="codes")
    noise_timestep: int = flag(100, "the timestep by which the transformer knows this noise", group="codes")
    noise_type: Literal["additive", "variance_preserving"] = flag(
        "additive", "z + sigma eps, or sqrt(1 - sigma^2) z + sigma eps", group="codes"
    )
    quantizer_type: Literal["nearest", "linear"] = flag(
        "nearest", "the nearest code, or a linear projection and a softmax", group="codes"
    )
    codebook_learning_rate: float = flag(1e-2, "peak learning rate of the codes", group="codes")

    def __post_init__(self) -> None:
        # The dataclass beside which this one stands has its own checks.
        super().__post_init__()
        if self.sigma < 0 or (self.noise_type == "variance_preserving" and self.sigma > 1):
            raise ValueError(f"--sigma is {self.sigma}; it must be at least 0, and at most 1 if variance_preserving.")
        if not self.codebook_learning_rate > 0:
            raise ValueError(f"--codebook_learning_rate is {self.codebook_learning_rate}; it must be positive.")


def add_noise(latents: Tensor, noise: Tensor, sigma: float, noise_type: str) -> Tensor:
    """Noisy latents, as of a :class:`NoisyLatentQuantizer` with these settings, of which there need not be one."""
    signal = 1.0 if noise_type == "additive" else (1 - sigma**2) ** 0.5
    return signal * latents + sigma * noise


def load_quantizer(config: NoisyLatentFlags, latent_channels: int) -> NoisyLatentQuantizer:
    """The trained quantizer that ``--quantizer`` names; the flags of the noise in ``config`` become what it says.

    Raises:
        ValueError: it is for other latents.
    """
    quantizer = load_model("quantizer", config.quantizer, NoisyLatentQuantizer)
    if quantizer.config.latent_channels != latent_channels:
        raise ValueError(
            f"--quantizer {config.quantizer} is for latents of {quantizer.config.latent_channels} channels, but those "
            f"of --vae have {latent_channels}; use the autoencoder that it was trained with."
        )
    config.sigma, config.noise_timestep = quantizer.config.sigma, quantizer.config.timestep
    config.noise_type, config.quantizer_type = quantizer.config.noise_type, quantizer.config.quantizer_type
    return quantizer


def new_quantizer(config: NoisyLatentFlags, codebook_size: int, latent_channels: int) -> NoisyLatentQuantizer:
    """The untrained quantizer of a run; its codes learn by gradients, and unused ones move to latents."""
    return NoisyLatentQuantizer(
        num_codes=codebook_size,
        latent_channels=latent_channels,
        sigma=config.sigma,
        timestep=config.noise_timestep,
        noise_type=config.noise_type,
        quantizer_type=config.quantizer_type,
        restart_after=RESTART_AFTER,
    )


def quantize(quantizer: nn.Module, noisy: Tensor, quantizer_type: str, generator: torch.Generator) -> QuantizerOutput:
    """The training pass of a quantizer, wrapped or not: a linear one draws its codes, a nearest one does not."""
    arguments: dict[str, Any] = {"generator": generator} if quantizer_type == "linear" else {}
    return quantizer(noisy, **arguments)
