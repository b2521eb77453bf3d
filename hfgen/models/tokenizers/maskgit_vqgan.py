"""The VQGAN of MaskGIT."""

from __future__ import annotations

import math
from typing import Literal

from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from hfgen.models.layers.maskgit_conv import MaskGITDecoder, MaskGITEncoder
from hfgen.models.modeling import AutoencoderOutput, DecoderOutput, HFGenModel, TokenizerOutput
from hfgen.models.quantizers.entropy import EntropyVectorQuantizer


class MaskGITVQGAN(HFGenModel):
    """A convolutional autoencoder with a grid of codes, the tokenizer of MaskGIT and the proxy codes of TiTok.

    MaskGIT: Masked Generative Image Transformer (Chang et al. 2022, arXiv 2202.04200). Pixels are float
    (B, 3, H, W) in [-1, 1], H and W multiples of ``downsample_factor``; inside, the released weights work on [0, 1].
    Inputs are cast to the dtype of the model.

    Args:
        num_codes: size of the codebook.
        latent_channels: channels of the latents and the codes.
        base_channels: width of the full-resolution level.
        channel_multipliers: width of each level in units of ``base_channels``; every level but the last halves the
            size.
        layers_per_block: residual blocks per level and in the middle.
        in_channels: channels of the image.
        norm_num_groups: groups of every group normalisation; divides every width.
        image_size: side of the images that the model is meant for, from which ``num_tokens`` follows; others work.
        commitment_weight: weight of the encoder's term in the quantizer loss.
        legacy_beta: put that weight on the codebook's term instead, as the PyTorch port of the network does.
        entropy_weight, entropy_temperature, entropy_assignment: the entropy term of the quantizer loss, see
            :class:`~hfgen.models.quantizers.entropy.EntropyVectorQuantizer`.
        dropout: dropout in the residual blocks.
        restart_after: revive codes that were not used for so many training steps; 0 never does.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # the codebook is read outside of any forward
    _no_split_modules = ["EntropyVectorQuantizer", "MaskGITResBlock"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm"]

    presets = {"maskgit-vqgan-256": {"image_size": 256}, "maskgit-vqgan-512": {"image_size": 512}}
    original_system = "maskgit_vqgan"
    original_part = "vq_model"

    @register_to_config
    def __init__(
        self,
        num_codes: int = 1024,
        latent_channels: int = 256,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        layers_per_block: int = 2,
        in_channels: int = 3,
        norm_num_groups: int = 32,
        image_size: int = 256,
        commitment_weight: float = 0.25,
        legacy_beta: bool = False,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        entropy_assignment: Literal["softmax", "argmax"] = "softmax",
        dropout: float = 0.0,
        restart_after: int = 0,
    ):
        super().__init__()
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        stack = (widths, layers_per_block, norm_num_groups, dropout)
        self.encoder = MaskGITEncoder(in_channels, latent_channels, base_channels, *stack)
        self.decoder = MaskGITDecoder(latent_channels, in_channels, *stack)
        self.quantizer = EntropyVectorQuantizer(
            num_codes,
            latent_channels,
            commitment_weight,
            legacy_beta,
            entropy_weight,
            entropy_temperature,
            entropy_assignment,
            restart_after,
        )
        if image_size % self.downsample_factor:
            raise ValueError(f"image_size={image_size} must be a multiple of {self.downsample_factor}.")

    @property
    def downsample_factor(self) -> int:
        """Image side length / side length of the grid of codes."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    @property
    def image_size(self) -> int:
        """Side length of the images that the model is meant for."""
        return self.config.image_size

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.quantizer.codebook_size

    @property
    def num_tokens(self) -> int:
        """The codes of an image of ``image_size``."""
        return (self.image_size // self.downsample_factor) ** 2

    @property
    def last_layer_weight(self) -> nn.Parameter:
        """The decoder's output weight, at which VQGAN's adaptive adversarial weight compares gradients."""
        return self.decoder.conv_out.weight

    @apply_forward_hook
    def encode(self, pixels: Tensor, *, return_dict: bool = True) -> TokenizerOutput | tuple:
        """Quantize images.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], H and W multiples of ``downsample_factor``.

        Returns:
            ``latents`` (B, latent_channels, h, w), quantized, with straight-through gradients; ``codes`` (B, h * w)
            int64 in raster order; the quantizer's ``loss`` and ``losses``.
        """
        quantized = self.quantizer(self.features(pixels))
        output = TokenizerOutput(quantized.latents, quantized.codes, quantized.loss, quantized.losses)
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def features(self, pixels: Tensor) -> Tensor:
        """Latents (B, latent_channels, h, w) of pixels (B, 3, H, W) in [-1, 1] before they are quantized."""
        channels, factor = self.config.in_channels, self.downsample_factor
        fits = pixels.ndim == 4 and pixels.shape[1] == channels and not any(n % factor for n in pixels.shape[2:])
        if not fits or 0 in pixels.shape:
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}, expected (batch, {channels}, height, width) with sides "
                f"that are multiples of {factor}. Resize or crop the images."
            )
        return self.encoder(pixels.to(self.dtype) * 0.5 + 0.5)

    @apply_forward_hook
    def decode(self, latents: Tensor, *, return_dict: bool = True) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), not clamped, of quantized latents (B, latent_channels, h, w)."""
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (batch, {channels}, height, width)."
            )
        output = DecoderOutput(self.decoder(latents.to(self.dtype)) * 2 - 1)
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def decode_codes(self, codes: Tensor, *, return_dict: bool = True) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), not clamped, of codes.

        Args:
            codes: int64, (B, h, w), or (B, L) in raster order of a square grid.

        Raises:
            ValueError: if L is no square number or a code lies outside of the codebook.
        """
        if codes.ndim == 2:
            side = math.isqrt(codes.shape[1])
            if side * side != codes.shape[1]:
                raise ValueError(
                    f"codes have shape {tuple(codes.shape)}: {codes.shape[1]} codes are no square grid. Pass those of "
                    "other grids as (batch, height, width)."
                )
            codes = codes.unflatten(1, (side, side))
        return self.decode(self.quantizer.decode(codes), return_dict=return_dict)

    def forward(self, pixels: Tensor, *, return_dict: bool = True) -> AutoencoderOutput | tuple:
        """Reconstruct images.

        Returns:
            ``sample`` (B, 3, H, W), not clamped, beside everything that :meth:`encode` returns.
        """
        encoded = self.encode(pixels)
        output = AutoencoderOutput(sample=self.decode(encoded.latents).sample, **encoded)
        return output if return_dict else output.to_tuple()
