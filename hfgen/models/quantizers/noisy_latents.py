"""Codes of noisy latents: what a discrete Transfusion model reads and writes in place of images."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from hfgen.models.modeling import HFGenModel, QuantizerOutput
from hfgen.models.quantizers.linear import LinearQuantizer
from hfgen.models.quantizers.vector import VectorQuantizer

QUANTIZER_TYPES = ("nearest", "linear")
NOISE_TYPES = ("additive", "variance_preserving")


class NoisyLatentQuantizer(HFGenModel):
    """Adds the noise of one fixed step to the latents of a frozen autoencoder, and quantizes them.

    The pieces are apart, so that every draw is the caller's: ``encode(add_noise(latents, noise))`` are the codes of an
    image, and ``decode`` the latents for a decoder that was trained to remove the noise. :meth:`forward` trains the
    codebook; ``loss`` is the loss of the codebook alone, since the encoder is frozen.

    Args:
        num_codes: K.
        latent_channels: C of the latents.
        sigma: standard deviation of the noise.
        timestep: the step of the noise schedule that ``sigma`` belongs to, by which a transformer knows it.
        noise_type: "additive", ``z + sigma eps``, or "variance_preserving", ``sqrt(1 - sigma^2) z + sigma eps``, a
            step of a diffusion with ``sigma^2 = 1 - abar``.
        quantizer_type: "nearest" code (a :class:`VectorQuantizer`), or "linear" projection and softmax (a
            :class:`LinearQuantizer`).
        codebook_update: of the nearest code: "gradient" or "ema".
        commitment_weight, ema_decay, restart_after: of the nearest code, see :class:`VectorQuantizer`. With a frozen
            encoder the commitment term is only a measure.
    """

    _supports_group_offloading = False  # the codebook is read outside of any submodule's forward

    @register_to_config
    def __init__(
        self,
        num_codes: int = 16384,
        latent_channels: int = 4,
        sigma: float = 0.1,
        timestep: int = 100,
        noise_type: Literal["additive", "variance_preserving"] = "additive",
        quantizer_type: Literal["nearest", "linear"] = "nearest",
        codebook_update: Literal["gradient", "ema"] = "gradient",
        commitment_weight: float = 0.25,
        ema_decay: float = 0.99,
        restart_after: int = 0,
    ):
        super().__init__()
        for name, value, known in (
            ("noise_type", noise_type, NOISE_TYPES),
            ("quantizer_type", quantizer_type, QUANTIZER_TYPES),
        ):
            if value not in known:
                raise ValueError(f"Unknown {name} {value!r}; choose one of {', '.join(known)}.")
        highest = 1.0 if noise_type == "variance_preserving" else float("inf")
        if not 0 <= sigma <= highest:
            raise ValueError(f"sigma={sigma} must lie in [0, {highest}] for {noise_type} noise.")
        if quantizer_type == "linear":
            self.codebook = LinearQuantizer(num_codes, latent_channels)
        else:
            self.codebook = VectorQuantizer(
                num_codes,
                latent_channels,
                commitment_weight,
                codebook_update,
                ema_decay=ema_decay,
                restart_after=restart_after,
            )

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.config.num_codes

    def add_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Noisy latents.

        Args:
            latents: (B, C, h, w) or (B, L, C), any float dtype.
            noise: of the same shape, standard normal.

        Raises:
            ValueError: noise of another shape.
        """
        if noise.shape != latents.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, expected that of the latents, {tuple(latents.shape)}."
            )
        sigma = self.config.sigma
        signal = 1.0 if self.config.noise_type == "additive" else (1 - sigma**2) ** 0.5
        return signal * latents + sigma * noise.to(latents.dtype)

    def forward(
        self, latents: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> QuantizerOutput | tuple:
        """Quantize noisy latents.

        Args:
            latents: (B, C, h, w) or (B, L, C), with their noise.
            generator: of Gumbel noise, for a linear quantizer in training.

        Returns:
            ``latents`` in the layout and dtype of the input; ``codes`` (B, L); ``loss`` and its terms, float32.

        Raises:
            ValueError: other channels; a generator for the nearest code, which draws nothing.
        """
        if generator is None:
            output = self.codebook(latents)
        elif self.config.quantizer_type == "linear":
            output = self.codebook(latents, generator)
        else:
            raise ValueError('Only quantizer_type="linear" draws codes; leave the generator out.')
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, L) of noisy latents (B, C, h, w) or (B, L, C)."""
        return self.codebook.encode(latents)

    @apply_forward_hook
    def probabilities(self, latents: Tensor) -> Tensor:
        """The distribution (B, L, K) float32 of the codes of noisy latents (B, C, h, w) or (B, L, C).

        Raises:
            ValueError: the quantizer is not linear.
        """
        if self.config.quantizer_type != "linear":
            raise ValueError('Only quantizer_type="linear" has probabilities; the nearest code is certain.')
        return self.codebook.logits(latents).softmax(dim=-1)

    @apply_forward_hook
    def decode(self, codes: Tensor) -> Tensor:
        """Float32 latents (B, L, C) of codes (B, L), or a grid (B, C, h, w) of codes (B, h, w).

        Raises:
            ValueError: codes out of range or of another shape.
        """
        return self.codebook.decode(codes)
