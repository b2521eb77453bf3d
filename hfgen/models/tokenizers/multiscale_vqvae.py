"""The multi-scale VQVAE of VAR."""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from hfgen.models.layers.conv import vqgan_decoder, vqgan_encoder
from hfgen.models.modeling import AutoencoderOutput, DecoderOutput, HFGenModel, TokenizerOutput
from hfgen.models.quantizers.multiscale import MultiScaleResidualQuantizer, PatchNums, scale_sizes

_RELEASED = {
    "num_codes": 4096,
    "latent_channels": 32,
    "base_channels": 160,
    "channel_multipliers": (1, 1, 2, 2, 4),
    "layers_per_block": 2,
    "quant_conv_kernel_size": 3,
    "residual_conv_ratio": 0.5,
    "num_residual_convs": 4,
}


class MultiScaleVQVAE(HFGenModel):
    """A convolutional autoencoder whose latents are a pyramid of codes, from one code per image to a full grid.

    Visual Autoregressive Modeling (Tian et al. 2024, arXiv 2404.02905), section 3.2. The convolutional stacks are
    those of VQGAN; the quantizer is :class:`~hfgen.models.quantizers.multiscale.MultiScaleResidualQuantizer`.

    Pixels are float (B, 3, H, W) in [-1, 1]. ``patch_nums`` of a call replaces the list of scales that the model was
    built with; the last entry times ``downsample_factor`` is the image size, so the same weights serve other sizes.
    Inputs are cast to the dtype of the model.

    Args:
        num_codes: size of the codebook that all scales share.
        latent_channels: channels of the latents and the codes.
        base_channels: width of the full-resolution level.
        channel_multipliers: width of each level in units of ``base_channels``; every level but the last halves the
            size.
        layers_per_block: residual blocks per encoder level; the decoder has one more.
        in_channels: channels of the image.
        norm_num_groups: groups of every group normalisation; divides every width.
        quant_conv_kernel_size: kernel size, odd, of the convs before and after the quantizer.
        patch_nums: side length of each scale, coarse to fine.
        residual_conv_ratio: share of the residual conv in what a scale adds; 0 leaves these convs out.
        num_residual_convs: how many residual convs the scales share; 0 gives each entry of ``patch_nums`` its own.
        cosine_codes: choose codes by cosine similarity instead of distance.
        commitment_weight: weight of the encoder's term in the quantizer loss.
        dropout: dropout in the residual blocks.
        restart_after: revive codes that no scale used for so many training steps; 0 never does.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # samplers read the quantizer's weights outside of any forward
    _no_split_modules = ["MultiScaleResidualQuantizer", "ConvResnetBlock", "Attention"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm"]

    presets = {
        "var-vqvae": {**_RELEASED, "patch_nums": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)},
        "var-vqvae-512": {**_RELEASED, "patch_nums": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)},
    }
    original_system = "var"
    original_part = "vae"

    @register_to_config
    def __init__(
        self,
        num_codes: int = 4096,
        latent_channels: int = 32,
        base_channels: int = 160,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        layers_per_block: int = 2,
        in_channels: int = 3,
        norm_num_groups: int = 32,
        quant_conv_kernel_size: int = 3,
        patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        residual_conv_ratio: float = 0.5,
        num_residual_convs: int = 4,
        cosine_codes: bool = False,
        commitment_weight: float = 0.25,
        dropout: float = 0.0,
        restart_after: int = 0,
    ):
        super().__init__()
        if quant_conv_kernel_size % 2 == 0:
            raise ValueError(f"quant_conv_kernel_size={quant_conv_kernel_size} must be odd, to keep the latent size.")
        widths = [base_channels * multiplier for multiplier in channel_multipliers]
        stack = {"layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups, "dropout": dropout}
        self.encoder = vqgan_encoder(in_channels, latent_channels, widths, **stack)
        self.decoder = vqgan_decoder(latent_channels, in_channels, widths, **stack)
        kernel, padding = quant_conv_kernel_size, quant_conv_kernel_size // 2
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel, padding=padding)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel, padding=padding)
        self.quantizer = MultiScaleResidualQuantizer(
            num_codes=num_codes,
            code_dim=latent_channels,
            patch_nums=patch_nums,
            residual_conv_ratio=residual_conv_ratio,
            num_residual_convs=num_residual_convs,
            cosine_codes=cosine_codes,
            commitment_weight=commitment_weight,
            restart_after=restart_after,
        )

    @property
    def downsample_factor(self) -> int:
        """Image side length / side length of the last scale."""
        return 2 ** (len(self.config.channel_multipliers) - 1)

    @property
    def image_size(self) -> int:
        """Side length of the images that the default ``patch_nums`` are for."""
        return self.quantizer.sizes[-1][0] * self.downsample_factor

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.quantizer.codebook_size

    @property
    def num_tokens(self) -> int:
        """The codes of one image, over all scales of ``patch_nums``."""
        return self.quantizer.num_tokens

    @property
    def last_layer_weight(self) -> nn.Parameter:
        """The decoder's output weight, at which VQGAN's adaptive adversarial weight compares gradients."""
        return self.decoder.conv_out.weight

    @apply_forward_hook
    def encode(
        self,
        pixels: Tensor,
        patch_nums: PatchNums | None = None,
        *,
        num_scales: Tensor | None = None,
        return_dict: bool = True,
    ) -> TokenizerOutput | tuple:
        """Quantize images.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], H and W equal to the last scale times ``downsample_factor``.
            patch_nums: the scales, by default the model's.
            num_scales: (B,) int64, how many scales each image's ``latents`` sum up, by default all; random numbers
                in training make quantizer dropout.

        Returns:
            ``latents`` (B, latent_channels, h, w), the quantized sum over scales, with straight-through gradients;
            ``codes`` (B, L) int64, scales concatenated coarse to fine; the quantizer's ``loss`` and ``losses``.
        """
        self._check_pixels(pixels, patch_nums)
        quantized = self.quantizer(
            self.quant_conv(self.encoder(pixels.to(self.dtype))), patch_nums, num_scales=num_scales
        )
        output = TokenizerOutput(quantized.latents, quantized.codes, quantized.loss, quantized.losses)
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def decode(self, latents: Tensor, *, return_dict: bool = True) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), not clamped, of quantized latents (B, latent_channels, h, w)."""
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (batch, {channels}, height, width)."
            )
        output = DecoderOutput(self.decoder(self.post_quant_conv(latents.to(self.dtype))))
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def decode_codes(
        self, codes: Tensor, patch_nums: PatchNums | None = None, *, return_dict: bool = True
    ) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), not clamped, of codes (B, L) int64.

        Raises:
            ValueError: if L does not fit the scales or a code lies outside of the codebook.
        """
        return self.decode(self.quantizer.decode(codes, patch_nums), return_dict=return_dict)

    @apply_forward_hook
    def decode_codes_per_scale(self, codes: Tensor, patch_nums: PatchNums | None = None) -> list[Tensor]:
        """Progressive images, one (B, 3, H, W) per scale: number k is decoded from the scales up to k."""
        return [self.decode(f_hat).sample for f_hat in self.quantizer.f_hat_per_scale(codes, patch_nums)]

    def forward(
        self, pixels: Tensor, *, num_scales: Tensor | None = None, return_dict: bool = True
    ) -> AutoencoderOutput | tuple:
        """Reconstruct images, from their first ``num_scales`` scales if given.

        Returns:
            ``sample`` (B, 3, H, W), not clamped, beside everything that :meth:`encode` returns.
        """
        encoded = self.encode(pixels, num_scales=num_scales)
        output = AutoencoderOutput(sample=self.decode(encoded.latents).sample, **encoded)
        return output if return_dict else output.to_tuple()

    def _check_pixels(self, pixels: Tensor, patch_nums: PatchNums | None) -> None:
        sizes = self.quantizer.sizes if patch_nums is None else scale_sizes(patch_nums)
        height, width = (side * self.downsample_factor for side in sizes[-1])
        if tuple(pixels.shape[1:]) != (self.config.in_channels, height, width):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}, expected (batch, {self.config.in_channels}, {height}, "
                f"{width}): the last of patch_nums times {self.downsample_factor}. Resize the images or pass a list "
                "of patch_nums that ends at their size."
            )
