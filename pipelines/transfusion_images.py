"""Images as a mixed-modal transformer takes them, continuous latents or codes, and back to pixels."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import PIL.Image
import torch
from torch import Tensor

from hfgen.models.generators.transfusion import TransfusionTransformer
from hfgen.models.quantizers.noisy_latents import NoisyLatentQuantizer
from hfgen.pipelines.inputs import to_pixels
from hfgen.pipelines.latents import LatentDecoder, check_channels, decode_latents, downsample_factor, encode_pixels


@runtime_checkable
class DiscreteTokenizer(Protocol):
    """An image tokenizer with a fixed number of codes for the image size that it is for."""

    codebook_size: int
    num_tokens: int
    image_size: int

    def encode(self, pixels: Tensor) -> Any: ...

    def decode_codes(self, codes: Tensor) -> Any: ...


class ContinuousImages:
    """Latents (C, h, w) of an autoencoder on the scale of the transformer, or pixels where there is none.

    Args:
        vae: diffusers' ``AutoencoderKL`` or a continuous tokenizer with grid latents; None for pixels.
        channels: C of the transformer.
        patch_size: latents of a token in a row.
        image_size: side in pixels of the images of training, None if it is not known.

    Raises:
        ValueError: the autoencoder has other latents.
    """

    def __init__(self, vae: LatentDecoder | None, channels: int, patch_size: int, image_size: int | None):
        check_channels(vae, channels)
        self.vae, self.channels, self.patch_size, self.image_size = vae, channels, patch_size, image_size

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image in pixels, by default of the size of training.

        Raises:
            ValueError: a size that autoencoder and patches do not divide, or none is known.
        """
        sides = _latent_sides(height, width, downsample_factor(self.vae), self.patch_size, self.image_size)
        return (self.channels, *sides)

    def num_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Tokens of an image."""
        _, rows, columns = self.latent_shape(height, width)
        return rows * columns // self.patch_size**2

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> latents (B, C, h, w) float32.

        Raises:
            ValueError: a size that autoencoder and patches do not divide.
        """
        self.latent_shape(*pixels.shape[-2:])
        return encode_pixels(self.vae, pixels)

    def decode(self, latents: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1]; their size is that of the latents."""
        return decode_latents(self.vae, latents)


class QuantizedImages:
    """The codes of noisy latents, one for each place of a grid in raster order.

    Latents of given images are quantized without noise, at the mean of their noisy forms.

    Args:
        vae: makes the latents, None if they are pixels.
        quantizer: makes the codes.
        image_size: side in pixels of the images of training, None if it is not known.

    Raises:
        ValueError: the autoencoder has other latents.
    """

    def __init__(self, vae: LatentDecoder | None, quantizer: NoisyLatentQuantizer, image_size: int | None):
        check_channels(vae, quantizer.config.latent_channels)
        self.vae, self.quantizer, self.image_size = vae, quantizer, image_size

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    def num_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Codes of an image in pixels, by default of the size of training.

        Raises:
            ValueError: a size that the autoencoder does not divide, or none is known.
        """
        return math.prod(_latent_sides(height, width, downsample_factor(self.vae), 1, self.image_size))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> codes (B, n)."""
        self.num_tokens(*pixels.shape[-2:])
        latents = encode_pixels(self.vae, pixels)
        return self.quantizer.encode(self.quantizer.add_noise(latents, torch.zeros_like(latents)))

    def decode(self, codes: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Codes (B, n) -> pixels (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: another number of codes than the size has.
        """
        rows, columns = _latent_sides(height, width, downsample_factor(self.vae), 1, self.image_size)
        _check_codes(codes, rows * columns, self.codebook_size)
        return decode_latents(self.vae, self.quantizer.decode(codes.unflatten(1, (rows, columns))))


class TokenizedImages:
    """The codes of a discrete image tokenizer, whatever they stand for.

    Args:
        tokenizer: of images of one size.
    """

    def __init__(self, tokenizer: DiscreteTokenizer):
        self.tokenizer = tokenizer

    @property
    def codebook_size(self) -> int:
        return self.tokenizer.codebook_size

    def num_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Codes of an image.

        Raises:
            ValueError: another size than that of the tokenizer.
        """
        size = self.tokenizer.image_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels not in (None, size):
                raise ValueError(
                    f"{name} is {pixels} pixels, but the {type(self.tokenizer).__name__} is for images of {size}x"
                    f"{size}; leave it out, or resize the image."
                )
        return self.tokenizer.num_tokens

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] -> codes (B, n)."""
        self.num_tokens(*pixels.shape[-2:])
        return self.tokenizer.encode(pixels.to(self.tokenizer.dtype)).codes

    def decode(self, codes: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Codes (B, n) -> pixels (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: another number of codes, or a code that the tokenizer has not.
        """
        _check_codes(codes, self.num_tokens(height, width), self.codebook_size)
        return self.tokenizer.decode_codes(codes).sample.clamp(-1, 1)


def _latent_sides(
    height: int | None, width: int | None, factor: int, patch_size: int, image_size: int | None
) -> list[int]:
    unit, sides = factor * patch_size, []
    for name, pixels in (("height", height), ("width", width)):
        pixels = image_size if pixels is None else pixels
        if pixels is None:
            raise ValueError(f"The pipeline was made without image_size, so there is no default: give {name}.")
        if pixels < unit or pixels % unit:
            raise ValueError(
                f"{name} must be a multiple of {unit} pixels (a vae factor of {factor} times patches of {patch_size}),"
                f" got {pixels}."
            )
        sides.append(pixels // factor)
    return sides


def _check_codes(codes: Tensor, num_tokens: int, codebook_size: int) -> None:
    if codes.ndim != 2 or codes.shape[1] != num_tokens:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected (batch, {num_tokens}).")
    if codes.min() < 0 or codes.max() >= codebook_size:
        raise ValueError(f"codes lie in [{codes.min()}, {codes.max()}], expected [0, {codebook_size - 1}].")


ImageForm = ContinuousImages | QuantizedImages | TokenizedImages


def image_form(
    transformer: TransfusionTransformer, vae: Any, quantizer: NoisyLatentQuantizer | None, image_size: int | None
) -> ImageForm:
    """How a transformer takes images.

    Args:
        transformer: of continuous or discrete images.
        vae: an autoencoder or None for continuous images, and for discrete ones with a ``quantizer``; else a discrete
            tokenizer.
        quantizer: of latents.
        image_size: side in pixels of the images of training, None if it is not known.

    Raises:
        ValueError: parts that do not fit together.
    """
    config = transformer.config
    if not transformer.is_discrete:
        if quantizer is not None:
            raise ValueError("The transformer has continuous images: leave the quantizer out.")
        return ContinuousImages(vae, config.latent_channels, config.patch_size, image_size)
    if quantizer is not None:
        if quantizer.config.timestep != config.fixed_timestep:
            raise ValueError(
                f"The quantizer is for timestep {quantizer.config.timestep} and the transformer for "
                f"{config.fixed_timestep}; use the quantizer that the transformer was trained with."
            )
        form: ImageForm = QuantizedImages(vae, quantizer, image_size)
    elif isinstance(vae, DiscreteTokenizer):
        form = TokenizedImages(vae)
    else:
        raise ValueError(
            f"The transformer has discrete images, but vae is {type(vae).__name__}, no discrete image tokenizer of a "
            "fixed size: give one, or a quantizer of the latents of the vae."
        )
    if form.codebook_size != config.codebook_size:
        raise ValueError(
            f"Images have {form.codebook_size} codes and the transformer {config.codebook_size}; use the tokenizer "
            "or quantizer that the transformer was trained with."
        )
    return form


def one_image(image: PIL.Image.Image | Tensor) -> Tensor:
    """Pixels (1, 3, H, W) in [-1, 1] of a picture, or of pixels (3, H, W) or (1, 3, H, W).

    Raises:
        ValueError: several images, or a tensor of another shape or range.
    """
    pixels = to_pixels(image[None] if isinstance(image, Tensor) and image.ndim == 3 else image)
    if len(pixels) != 1:
        raise ValueError(f"A part is one text or one image, got a batch of {len(pixels)} images.")
    return pixels
