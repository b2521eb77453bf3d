"""What pipelines of continuous generators share: from noise to pixels, with or without an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hfgen.sampling.guidance import guide


@runtime_checkable
class LatentDecoder(Protocol):
    """A continuous tokenizer with grid latents: diffusers' ``AutoencoderKL`` or one of hfgen."""

    def encode(self, pixels: Tensor) -> Any: ...

    def decode(self, latents: Tensor) -> Any: ...


def downsample_factor(vae: LatentDecoder | None) -> int:
    """Pixels of a latent in a row; 1 without an autoencoder.

    Raises:
        ValueError: the model does not tell.
    """
    if vae is None:
        return 1
    factor = getattr(vae, "downsample_factor", None)
    if factor is None and "block_out_channels" in vae.config:
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if factor is None:
        raise ValueError(f"A {type(vae).__name__} has no downsample_factor, so it has no grid of latents to decode.")
    return factor


def check_channels(vae: LatentDecoder | None, num_channels: int) -> None:
    """Raise a ``ValueError`` if the autoencoder is none, or has other latents than a generator of ``num_channels``."""
    if vae is None:
        return
    if not isinstance(vae, LatentDecoder):
        raise ValueError(f"vae is a {type(vae).__name__}, which has no encode and decode.")
    downsample_factor(vae)
    channels = vae.config.latent_channels
    if channels != num_channels:
        raise ValueError(
            f"The latents of the vae have {channels} channels, but the transformer has {num_channels}; use the vae "
            "that the transformer was trained with."
        )


def check_output_type(output_type: str, vae: LatentDecoder | None, num_channels: int) -> None:
    """Raise a ``ValueError`` for an unknown type, or one that latents of ``num_channels`` cannot be made into."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    if output_type != "latent" and vae is None and num_channels != 3:
        raise ValueError(
            f"The transformer makes latents of {num_channels} channels and the pipeline has no vae to decode them: "
            "give it one with register_modules(vae=...), or ask for output_type='latent'."
        )


def initial_noise(
    shape: tuple[int, ...], generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device
) -> Tensor:
    """Standard normal noise, float32; with a list of generators row i comes from the i-th alone."""
    generator = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)


def check_guidance_channels(guidance_channels: int | None, num_channels: int) -> None:
    """Raise a ``ValueError`` for a number of guided channels that latents of ``num_channels`` do not have."""
    if guidance_channels is not None and not 1 <= guidance_channels <= num_channels:
        raise ValueError(
            f"guidance_channels must be between 1 and the {num_channels} channels, got {guidance_channels}."
        )


def guide_channels(conditional: Tensor, unconditional: Tensor, scale: float, channels: int | None) -> Tensor:
    """The guided prediction (B, C, h, w); only in the first ``channels``, and conditional in the others, if given."""
    if channels is None:
        return guide(conditional, unconditional, scale)
    guided = guide(conditional[:, :channels], unconditional[:, :channels], scale)
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def decode_latents(vae: LatentDecoder | None, latents: Tensor) -> Tensor:
    """Latents on the scale of a generator -> pixels (B, 3, H, W) in [-1, 1]; without a vae they are pixels."""
    if vae is None:
        return latents.clamp(-1, 1)
    latents = latents / getattr(vae.config, "scaling_factor", 1.0) + (getattr(vae.config, "shift_factor", None) or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample.clamp(-1, 1)


def encode_pixels(vae: LatentDecoder | None, pixels: Tensor) -> Tensor:
    """The inverse of :func:`decode_latents`, float32; of an ``AutoencoderKL`` the mode of its distribution."""
    if vae is None:
        return pixels.float()
    encoded = vae.encode(pixels.to(vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * getattr(vae.config, "scaling_factor", 1.0)
