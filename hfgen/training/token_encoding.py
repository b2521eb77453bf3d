"""One way from images to tokens and back, for every tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from hfgen import AutoModel
from hfgen.data.cache_format import TokenizerIdentity
from hfgen.data.transforms import to_pixels
from hfgen.training.flag_sources import loading_flag


def load_image_tokenizer(source: str, subfolder: str | None = None) -> nn.Module:
    """A tokenizer of hfgen, or diffusers' ``AutoencoderKL``.

    Args:
        source: folder or Hub id.
        subfolder: of the model inside of a pipeline.

    Raises:
        OSError: there is no model.
        ValueError: it is no tokenizer of images.
    """
    class_name = AutoencoderKL.load_config(source, subfolder=subfolder).get("_class_name")
    if class_name == "AutoencoderKL":
        return AutoencoderKL.from_pretrained(source, subfolder=subfolder, use_safetensors=True)
    model = AutoModel.from_pretrained(source, subfolder=subfolder)
    if not (hasattr(model, "encode") and hasattr(model, "image_size")):
        where = source if subfolder is None else str(Path(source) / subfolder)
        raise ValueError(
            f"{where} is a {class_name}, which does not encode images; give an image tokenizer, in pipelines the part "
            "vq_model or vae."
        )
    return model


def load_code_tokenizer(source: str, subfolder: str | None = None) -> nn.Module:
    """The tokenizer with codes that ``--tokenizer`` names; arguments as of :func:`load_image_tokenizer`.

    Raises:
        OSError: there is no model.
        ValueError: it is no tokenizer of images, or a continuous one.
    """
    with loading_flag("tokenizer", source):
        tokenizer = load_image_tokenizer(source, subfolder)
    if getattr(tokenizer, "codebook_size", None) is None:
        raise ValueError(
            f"--tokenizer {source} is a continuous {type(tokenizer).__name__}, which has no codebook: use "
            "cache_latents.py for its latents, or give a tokenizer with codes, such as a TiTok or a MaskGITVQGAN."
        )
    return tokenizer


@torch.no_grad()
def encode_tokens(tokenizer: nn.Module, pixels: Tensor) -> tuple[str, Tensor]:
    """Encode uint8 images (B, 3, H, W) on the tokenizer's device.

    Returns:
        ``"codes"`` and int64 ids; or ``"moments"`` and the mean and log-variance (B, 2 C, h, w) of an autoencoder
        with a posterior, such as ``diffusers.AutoencoderKL``; or ``"latents"`` of any other continuous tokenizer.
    """
    output = tokenizer.encode(to_pixels(pixels).to(tokenizer.dtype))
    if hasattr(output, "latent_dist"):
        return "moments", output.latent_dist.parameters
    return ("latents", output.latents) if output.codes is None else ("codes", output.codes)


@torch.no_grad()
def decode_tokens(tokenizer: nn.Module, kind: str, tokens: Tensor) -> Tensor:
    """Images (B, 3, H, W), about [-1, 1], of what :func:`encode_tokens` returned; moments: of their mean."""
    if kind == "codes":
        return tokenizer.decode_codes(tokens).sample
    latents = tokens.chunk(2, dim=1)[0] if kind == "moments" else tokens
    return tokenizer.decode(latents.to(tokenizer.dtype)).sample


def batch_codes(batch: Mapping[str, Any], tokenizer: nn.Module) -> Tensor:
    """The int64 codes of a batch of a cache or of images."""
    return batch["codes"] if "codes" in batch else encode_tokens(tokenizer, batch["pixels"])[1]


def batch_latents(batch: Mapping[str, Any], tokenizer: nn.Module, generator: torch.Generator) -> Tensor:
    """The float32 latents of a batch of a cache or of images, as ``tokenizer.decode`` takes them.

    If the tokenizer has a posterior, they are a fresh sample of it, drawn from ``generator`` (on the batch's device).
    """
    kind = next((name for name in ("moments", "latents") if name in batch), None)
    kind, tokens = (kind, batch[kind]) if kind else encode_tokens(tokenizer, batch["pixels"])
    if kind == "moments":
        return DiagonalGaussianDistribution(tokens.float()).sample(generator)
    return tokens.float()


def tokenizer_identity(tokenizer: nn.Module, source: str) -> TokenizerIdentity:
    """What a cache and a tokenizer are matched by: class, configuration and the content of the weights.

    Args:
        tokenizer: with a diffusers configuration.
        source: where it was loaded from; of a local folder only the name is kept.
    """
    config = {name: value for name, value in tokenizer.config.items() if not name.startswith("_")}
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return TokenizerIdentity(
        class_name=type(tokenizer).__name__,
        config=json.loads(json.dumps(config)),
        weights=digest.hexdigest(),
        name=portable_name(source),
    )


def portable_name(source: str) -> str:
    """``source``, or the last part of the path if it is a local folder: what is published names nobody's disk."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.is_dir() else source
