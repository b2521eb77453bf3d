"""What a continuous generator trains on: pixels, latents of a frozen autoencoder, or a cache of their moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hfgen.counters import generator
from hfgen.data.transforms import to_pixels
from hfgen.pipelines.latents import downsample_factor
from hfgen.training.batches import training_images
from hfgen.training.config import TrainingConfig, flag
from hfgen.training.flag_sources import loading_flag
from hfgen.training.token_encoding import batch_latents, load_image_tokenizer
from hfgen.training.tokens import training_tokens
from hfgen.training.trainer import Trainer


@dataclass(kw_only=True)
class LatentTrainingConfig(TrainingConfig):
    """The settings of a run that trains on pixels, or on latents of a frozen autoencoder."""

    vae: str | None = flag(
        None,
        "folder or Hub id of a trained autoencoder, diffusers' AutoencoderKL or a continuous tokenizer with a grid of "
        "latents; without one the model makes pixels",
    )
    vae_subfolder: str | None = flag(None, "its folder inside of a pipeline, for example vae")
    cache: str | None = flag(
        None,
        "folder or Hub id of a cache of the latents of --vae, by examples/cache_latents.py, instead of images; data "
        "flags that stay at their defaults are those of the cache",
        group="data",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vae is None and (self.cache is not None or self.vae_subfolder is not None):
            raise ValueError("--cache and --vae_subfolder belong to an autoencoder: give --vae too.")

    # What training_tokens asks for; caches of latents are written beforehand.
    cache_codes = False

    @property
    def tokenizer(self) -> str | None:
        """Where the autoencoder is."""
        return self.vae


def load_autoencoder(config: LatentTrainingConfig) -> nn.Module | None:
    """The autoencoder that ``--vae`` names, None for pixels.

    Raises:
        ValueError: it has codes instead of a grid of latents.
    """
    if config.vae is None:
        return None
    with loading_flag("vae", config.vae):
        vae = load_image_tokenizer(config.vae, config.vae_subfolder)
    if getattr(vae, "codebook_size", None) is not None:
        raise ValueError(f"--vae {config.vae} is a {type(vae).__name__} with codes; give a continuous autoencoder.")
    downsample_factor(vae)
    return vae


def training_latents(config: LatentTrainingConfig, vae: nn.Module | None, trainer: Trainer) -> Dataset:
    """The data that a run trains on: images, or the rows of ``--cache``, both for :func:`batch_samples`.

    With a cache, data flags in ``config`` that stand at their defaults take its values, ``resolution`` among them.

    Raises:
        ValueError: a cache of another autoencoder or of other data than the flags ask for.
    """
    return training_images(config) if vae is None else training_tokens(config, vae, trainer)


def sample_shape(config: LatentTrainingConfig, vae: nn.Module | None) -> tuple[int, int]:
    """Channels and side of what the generator makes: those of the images, or of the latents of such images.

    Raises:
        ValueError: the autoencoder does not divide the images.
    """
    if vae is None:
        return 3, config.resolution
    return vae.config.latent_channels, latent_side(config.resolution, vae)


def latent_side(resolution: int, vae: nn.Module) -> int:
    """Side of the latents of images of ``--resolution``.

    Raises:
        ValueError: the autoencoder does not divide the images.
    """
    factor = downsample_factor(vae)
    if resolution % factor:
        raise ValueError(f"--resolution must be a multiple of the factor of --vae, {factor}; got {resolution}.")
    return resolution // factor


def batch_samples(batch: Mapping[str, Any], vae: nn.Module | None, generator: torch.Generator) -> Tensor:
    """The clean data (B, C, h, w) of a batch, float32: pixels in [-1, 1], or latents on the generator's scale.

    Latents of an autoencoder with a posterior are a fresh sample of it, drawn from ``generator`` (on the batch's
    device), shifted and scaled as its configuration says, as pipelines expect them.
    """
    if vae is None:
        return to_pixels(batch["pixels"])
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (batch_latents(batch, vae, generator) - shift) * getattr(vae.config, "scaling_factor", 1.0)


def sample_classes(
    pipeline: Any, *, count: int, batch_size: int, seed: int, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Images of the classes in turn, by a class-conditional pipeline.

    Args:
        pipeline: with ``class_names``.
        count: how many.
        batch_size: images per call.
        seed: image i comes from a generator of (seed, i), whatever the batch size.
        arguments: of the call of the pipeline.

    Returns:
        Pixels (N, 3, H, W) in [-1, 1] on the CPU, and their labels (N,).
    """
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(count) % len(pipeline.class_names)
    images = []
    for part in torch.arange(count).split(batch_size):
        generators = [generator(seed, index) for index in part.tolist()]
        output = pipeline(labels[part].tolist(), generator=generators, output_type="pt", **arguments)
        images.append(output.images.cpu())
    return torch.cat(images) * 2 - 1, labels
