"""TiTok: images as short sequences of tokens without a grid.

An Image is Worth 32 Tokens for Reconstruction and Generation (Yu et al. 2024, arXiv 2406.07550); single-stage
training, the continuous form and TA-TiTok, whose decoder also reads a caption, are from Kim et al. 2025 (arXiv
2501.07730).

Pixels are float (B, 3, S, S) in [-1, 1]; inside, the released weights work on [0, 1]. All positions are learned, so a
model has one image size S. What the released weights rely on: in two-stage models the encoder's block of latents is
reinterpreted instead of transposed, and the proxy codes reach the pixel decoder as the mean of their vectors under the
softmax and not as the most probable one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from hfgen.models.layers.latent_vit import LatentViTDecoder, LatentViTEncoder, init_layer
from hfgen.models.layers.maskgit_conv import MaskGITDecoder
from hfgen.models.modeling import AutoencoderOutput, DecoderOutput, HFGenModel, TokenizerOutput
from hfgen.models.quantizers.clustering import ClusteringVectorQuantizer
from hfgen.models.quantizers.vector import VectorQuantizer
from hfgen.models.tokenizers.maskgit_vqgan import MaskGITVQGAN

# Width, layers and heads of the published encoders and decoders.
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}


def _preset(encoder: str, decoder: str, num_tokens: int, **changes: Any) -> dict[str, Any]:
    parts = {"encoder": SIZES[encoder], "decoder": SIZES[decoder]}
    sizes = {
        f"{side}_{name}": value
        for side, values in parts.items()
        for name, value in zip(("width", "layers", "heads"), values)
    }
    return sizes | {"num_latent_tokens": num_tokens} | changes


_TWO_STAGE = {
    "num_codes": 4096,
    "latent_channels": 12,
    "normalize_codes": True,
    "two_stage": True,
    "pixel_channels": (128, 128, 256, 256, 512),
}
_VQ = {"num_codes": 8192, "latent_channels": 64}
_KL = {"bottleneck": "kl", "latent_channels": 16}
_TEXT = {"text_length": 77}


@dataclass
class TiTokOutput(AutoencoderOutput):
    """As of any tokenizer; ``logits`` (B, L, num_proxy_codes) in place of ``sample`` from a model of stage 1."""

    logits: Tensor | None = None


class TiTok(HFGenModel, AttentionMixin):
    """The TiTok tokenizer in all its forms.

    - ``two_stage`` with ``pixel_channels`` is the original form: the decoder predicts the codes of a VQGAN, the proxy
      codes, and that VQGAN's decoder draws the image. Without ``pixel_channels`` it is a model of stage 1, which has
      no image yet: :meth:`forward` returns ``logits``.
    - Without ``two_stage`` the decoder puts out pixels.
    - ``bottleneck="kl"`` makes the latents continuous: a Gaussian for each token instead of a code.
    - ``text_length`` lets the decoder read text embeddings (TA-TiTok): the last hidden state, after the final layer
      norm, of the text tower of CLIP ViT-L/14-336.

    Args:
        image_size: side S of the images.
        encoder_patch_size, decoder_patch_size: divide ``image_size``.
        num_latent_tokens: tokens per image.
        latent_channels: channels of latents and codes.
        bottleneck: "vq", or "kl" for continuous latents.
        num_codes: size of the codebook; without meaning for "kl".
        normalize_codes: choose and decode codes as unit vectors.
        codebook_update: "gradient", or "clustering" to pull rarely used codes towards features as well.
        commitment_weight: weight of the encoder's term in the quantizer loss.
        encoder_width, encoder_layers, encoder_heads, decoder_width, decoder_layers, decoder_heads: the transformers.
        two_stage: predict proxy codes.
        num_proxy_codes: codebook size of the VQGAN that gives them.
        proxy_channels: channels of its codes.
        pixel_channels: width of each level of its decoder, from full resolution to the coarsest; None for none.
        pixel_layers_per_block: its residual blocks per level.
        pixel_norm_num_groups: groups of its normalisations.
        text_length: text tokens that the decoder reads; 0 for none.
        text_channels: channels of the text embeddings.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # the codebooks are read outside of any forward
    _no_split_modules = ["ViTBlock", "MaskGITResBlock"]
    _repeated_blocks = ["ViTBlock"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm", "embed"]

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "titok-l-32": _preset("large", "large", 32, **_TWO_STAGE),
        "titok-b-64": _preset("base", "base", 64, **_TWO_STAGE),
        "titok-s-128": _preset("small", "small", 128, **_TWO_STAGE),
        "titok-bl-64-vq": _preset("base", "large", 64, **_VQ),
        "titok-bl-128-vq": _preset("base", "large", 128, **_VQ),
        "titok-sl-256-vq": _preset("small", "large", 256, **_VQ),
        "titok-ll-32-vae": _preset("large", "large", 32, **_KL),
        "titok-bl-64-vae": _preset("base", "large", 64, **_KL),
        "titok-bl-128-vae": _preset("base", "large", 128, **_KL),
        "tatitok-bl-32-vq": _preset("base", "large", 32, **_VQ, **_TEXT),
        "tatitok-bl-64-vq": _preset("base", "large", 64, **_VQ, **_TEXT),
        "tatitok-bl-128-vq": _preset("base", "large", 128, **_VQ, **_TEXT),
        "tatitok-bl-32-vae": _preset("base", "large", 32, **_KL, **_TEXT),
        "tatitok-bl-64-vae": _preset("base", "large", 64, **_KL, **_TEXT),
        "tatitok-sl-128-vae": _preset("small", "large", 128, **_KL, **_TEXT),
    }
    original_system = "titok"
    original_part = "vq_model"

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        encoder_patch_size: int = 16,
        decoder_patch_size: int = 16,
        num_latent_tokens: int = 64,
        latent_channels: int = 64,
        bottleneck: Literal["vq", "kl"] = "vq",
        num_codes: int = 8192,
        normalize_codes: bool = False,
        codebook_update: Literal["gradient", "clustering"] = "gradient",
        commitment_weight: float = 0.25,
        encoder_width: int = 768,
        encoder_layers: int = 12,
        encoder_heads: int = 12,
        decoder_width: int = 1024,
        decoder_layers: int = 24,
        decoder_heads: int = 16,
        two_stage: bool = False,
        num_proxy_codes: int = 1024,
        proxy_channels: int = 256,
        pixel_channels: tuple[int, ...] | None = None,
        pixel_layers_per_block: int = 2,
        pixel_norm_num_groups: int = 32,
        text_length: int = 0,
        text_channels: int = 768,
    ):
        super().__init__()
        for name, size in (("encoder_patch_size", encoder_patch_size), ("decoder_patch_size", decoder_patch_size)):
            if image_size % size:
                raise ValueError(f"image_size={image_size} is no multiple of {name}={size}.")
        if bottleneck not in ("vq", "kl"):
            raise ValueError(f"bottleneck={bottleneck!r} must be 'vq' or 'kl'.")
        if codebook_update not in ("gradient", "clustering"):
            raise ValueError(f"codebook_update={codebook_update!r} must be 'gradient' or 'clustering'.")
        if pixel_channels is not None and (not two_stage or bottleneck == "kl"):
            raise ValueError("pixel_channels belong to two_stage=True with bottleneck='vq'; leave them out.")
        grid_size = image_size // decoder_patch_size
        self.encoder = LatentViTEncoder(
            image_size // encoder_patch_size,
            encoder_patch_size,
            num_latent_tokens,
            encoder_width,
            encoder_layers,
            encoder_heads,
            out_channels=latent_channels * (2 if bottleneck == "kl" else 1),
            reinterpret=two_stage,
        )
        self.decoder = LatentViTDecoder(
            grid_size,
            latent_channels,
            num_latent_tokens,
            decoder_width,
            decoder_layers,
            decoder_heads,
            text_length,
            text_channels,
        )
        self.quantizer = None
        if bottleneck == "vq":
            quantizer = ClusteringVectorQuantizer if codebook_update == "clustering" else VectorQuantizer
            self.quantizer = quantizer(num_codes, latent_channels, commitment_weight, normalize=normalize_codes)

        width = decoder_width
        if two_stage:
            self.code_head = nn.Sequential(
                nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, num_proxy_codes)
            )
            init_layer(self.code_head[0], width)
            init_layer(self.code_head[2], width)
        else:
            self.patch_head = nn.Linear(width, 3 * decoder_patch_size**2)
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
            init_layer(self.patch_head, width)
            init_layer(self.conv_out, width)
        self.pixel_decoder = None
        if pixel_channels is not None:
            if grid_size * 2 ** (len(pixel_channels) - 1) != image_size:
                raise ValueError(
                    f"pixel_channels {tuple(pixel_channels)} enlarge {2 ** (len(pixel_channels) - 1)} times; the grid "
                    f"of {grid_size} patches needs {decoder_patch_size} times for image_size={image_size}."
                )
            self.pixel_codebook = nn.Parameter(torch.empty(num_proxy_codes, proxy_channels))
            nn.init.uniform_(self.pixel_codebook, -1 / num_proxy_codes, 1 / num_proxy_codes)
            self.pixel_decoder = MaskGITDecoder(
                proxy_channels, 3, tuple(pixel_channels), pixel_layers_per_block, pixel_norm_num_groups, dropout=0.0
            )

    @property
    def image_size(self) -> int:
        """Side length of the images."""
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.config.num_latent_tokens

    @property
    def codebook_size(self) -> int | None:
        """The number of codes; None if the latents are continuous."""
        return None if self.quantizer is None else self.quantizer.codebook_size

    @property
    def last_layer_weight(self) -> nn.Parameter:
        """The weight of the layer that puts out pixels."""
        return self.conv_out.weight if self.pixel_decoder is None else self.pixel_decoder.conv_out.weight

    def with_pixel_decoder(self, vqgan: MaskGITVQGAN) -> TiTok:
        """The start of stage 2: this model of stage 1 with the codebook and decoder of the VQGAN of its proxy codes.

        All weights are copied. Stage 2 trains everything but ``encoder`` and ``quantizer``.
        """
        config, codebook = vqgan.config, vqgan.quantizer.embedding.weight
        if self.pixel_decoder is not None or not self.config.two_stage:
            raise ValueError("Only a TiTok of stage 1 takes a pixel decoder: two_stage=True without pixel_channels.")
        if config.num_codes != self.config.num_proxy_codes:
            raise ValueError(
                f"The VQGAN has {config.num_codes} codes, but this TiTok predicts {self.config.num_proxy_codes} proxy "
                "codes; use the VQGAN that it was trained with."
            )
        arguments = {name: value for name, value in self.config.items() if not name.startswith("_")}
        arguments |= {
            "proxy_channels": config.latent_channels,
            "pixel_channels": tuple(config.base_channels * each for each in config.channel_multipliers),
            "pixel_layers_per_block": config.layers_per_block,
            "pixel_norm_num_groups": config.norm_num_groups,
        }
        model = TiTok(**arguments)
        pixel = {f"pixel_decoder.{name}": value for name, value in vqgan.decoder.state_dict().items()}
        model.load_state_dict(self.state_dict() | pixel | {"pixel_codebook": codebook.detach()})
        return model.to(device=self.device, dtype=self.dtype)

    @apply_forward_hook
    def features(self, pixels: Tensor) -> Tensor:
        """What the bottleneck receives: (B, K, latent_channels), with "kl" twice as many: means and log-variances."""
        size = self.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}, expected (batch, 3, {size}, {size}): positions are learned "
                "for one size. Resize the images."
            )
        return self.encoder(pixels.to(self.dtype) * 0.5 + 0.5)

    @apply_forward_hook
    def posterior(self, pixels: Tensor) -> DiagonalGaussianDistribution:
        """The Gaussian of the latents, with "kl" only: float32 ``mean``, ``logvar``, ``std``, each (B, C, 1, K)."""
        if self.quantizer is not None:
            raise ValueError("This TiTok has discrete codes and no posterior; use encode.")
        return DiagonalGaussianDistribution(self.features(pixels).float().transpose(1, 2).unsqueeze(2))

    @apply_forward_hook
    def encode(
        self, pixels: Tensor, *, noise: Tensor | None = None, return_dict: bool = True
    ) -> TokenizerOutput | tuple:
        """Images to latents.

        Args:
            pixels: (B, 3, S, S) in [-1, 1].
            noise: (B, K, latent_channels) standard normal, with "kl" only: ``latents`` are then a sample of the
                posterior instead of its mean.

        Returns:
            ``latents`` (B, K, latent_channels); quantized with straight-through gradients, ``codes`` (B, K) int64 and
            the quantizer's ``loss`` and ``losses``; with "kl" no codes, and the divergence from the standard normal,
            summed over an image and averaged over the batch, as ``loss``.
        """
        if self.quantizer is None:
            posterior = self.posterior(pixels)
            latents, std = (each.squeeze(2).transpose(1, 2) for each in (posterior.mean, posterior.std))
            if noise is not None:
                _check_shape("noise", noise, latents.shape)
                latents = latents + std * noise
            loss = posterior.kl().mean()
            output = TokenizerOutput(latents.to(self.dtype), loss=loss, losses={"kl": loss.detach()})
        else:
            if noise is not None:
                raise ValueError("noise samples a posterior, but this TiTok has discrete codes; leave it out.")
            quantized = self.quantizer(self.features(pixels))
            output = TokenizerOutput(quantized.latents, quantized.codes, quantized.loss, quantized.losses)
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def decode(
        self, latents: Tensor, text_embeds: Tensor | None = None, *, return_dict: bool = True
    ) -> DecoderOutput | tuple:
        """Images (B, 3, S, S), not clamped.

        Args:
            latents: (B, K, latent_channels), quantized unless the model is continuous.
            text_embeds: (B, text_length, text_channels) of the captions, if the decoder reads text.
        """
        if self.config.two_stage and self.pixel_decoder is None:
            raise ValueError(
                "This TiTok of stage 1 predicts proxy codes and has no pixel decoder: use proxy_logits, or add the "
                "VQGAN's decoder by with_pixel_decoder."
            )
        if self.pixel_decoder is not None:
            output = DecoderOutput(self._pixels_of(self.proxy_logits(latents, text_embeds)) * 2 - 1)
            return output if return_dict else output.to_tuple()
        patches = self.patch_head(self._decode(latents, text_embeds))  # (B, G, p * p * 3)
        size = self.config.decoder_patch_size
        side = self.image_size // size
        images = patches.view(-1, side, side, size, size, 3).permute(0, 5, 1, 3, 2, 4)
        images = images.reshape(-1, 3, side * size, side * size)
        output = DecoderOutput(self.conv_out(images) * 2 - 1)
        return output if return_dict else output.to_tuple()

    @apply_forward_hook
    def proxy_logits(self, latents: Tensor, text_embeds: Tensor | None = None) -> Tensor:
        """(B, L, num_proxy_codes): logits of the proxy codes of each patch in raster order, of a two-stage model."""
        if not self.config.two_stage:
            raise ValueError("This TiTok puts out pixels and predicts no proxy codes; use decode.")
        return self.code_head(self._decode(latents, text_embeds))

    @apply_forward_hook
    def decode_codes(
        self, codes: Tensor, text_embeds: Tensor | None = None, *, return_dict: bool = True
    ) -> DecoderOutput | tuple:
        """Images (B, 3, S, S), not clamped, of codes (B, K) int64; see :meth:`decode`.

        Raises:
            ValueError: another number of codes, a code outside of the codebook, or a continuous model.
        """
        if self.quantizer is None:
            raise ValueError("This TiTok has continuous latents and no codes; use decode.")
        if codes.ndim != 2 or codes.shape[1] != self.num_tokens:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected (batch, {self.num_tokens}).")
        return self.decode(self.quantizer.decode(codes), text_embeds, return_dict=return_dict)

    def forward(
        self,
        pixels: Tensor,
        text_embeds: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> TiTokOutput | tuple:
        """Reconstruct images.

        Returns:
            ``sample`` (B, 3, S, S), not clamped, or in stage 1 ``logits``, beside everything that :meth:`encode`
            returns.
        """
        encoded = self.encode(pixels, noise=noise)
        if self.config.two_stage and self.pixel_decoder is None:
            output = TiTokOutput(None, **encoded, logits=self.proxy_logits(encoded.latents, text_embeds))
        else:
            output = TiTokOutput(self.decode(encoded.latents, text_embeds).sample, **encoded)
        return output if return_dict else output.to_tuple()

    def _decode(self, latents: Tensor, text_embeds: Tensor | None) -> Tensor:
        """(B, G, decoder_width)."""
        _check_shape("latents", latents, (len(latents), self.num_tokens, self.config.latent_channels))
        length = self.config.text_length
        if length and text_embeds is None:
            raise ValueError("This TiTok decodes with text: pass text_embeds, those of the empty text for none.")
        if text_embeds is not None:
            if not length:
                raise ValueError("This TiTok reads no text; leave text_embeds out.")
            _check_shape("text_embeds", text_embeds, (len(latents), length, self.config.text_channels))
            text_embeds = text_embeds.to(self.dtype)
        return self.decoder(latents.to(self.dtype), text_embeds)

    def _pixels_of(self, logits: Tensor) -> Tensor:
        """The pixel decoder's image in [0, 1] of the expected code vectors."""
        vectors = logits.softmax(dim=-1) @ self.pixel_codebook
        side = self.image_size // self.config.decoder_patch_size
        return self.pixel_decoder(vectors.transpose(1, 2).unflatten(2, (side, side)))


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} have shape {tuple(value.shape)}, expected {tuple(expected)}.")
