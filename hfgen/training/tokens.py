"""What a generator trains on: images, a cache of their tokens, or a cache that is written on the way."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import nn
from torch.utils.data import Dataset

from hfgen.data.cache_format import REBUILD, Scalar
from hfgen.data.cache_hub import open_cache, push_cache
from hfgen.data.token_cache import TokenCache
from hfgen.images import make_grid, save_png
from hfgen.training.batches import training_images
from hfgen.training.cache_writer import CHECK_FILE, write_cache
from hfgen.training.config import REQUIRED, TrainingConfig, check_least, flag, make_config
from hfgen.training.run_folder import VALIDATION_FOLDER
from hfgen.training.token_encoding import decode_tokens, portable_name, tokenizer_identity
from hfgen.training.trainer import Trainer

logger = logging.getLogger(__name__)

CACHE_FOLDER = "cache"

_VALIDATION_FLAGS = ("validation_split", "num_validation_images")
# Flags of the data that do not decide about the pixels of a row.
_NOT_PREPROCESSING = (*_VALIDATION_FLAGS, "num_workers", "strict", "num_classes", "shuffle_buffer")
_DATA_FIELDS = {field.name: field for field in dataclasses.fields(TrainingConfig) if field.metadata["group"] == "data"}
_STREAM_FLAGS = ("num_classes", "shuffle_buffer")  # a cache needs a fixed number of rows
_PREPROCESSING = [name for name in _DATA_FIELDS if name not in _NOT_PREPROCESSING]


@dataclasses.dataclass(kw_only=True)
class TokenTrainingConfig(TrainingConfig):
    """The settings of a run that trains on the tokens of a frozen tokenizer."""

    tokenizer: str = flag(REQUIRED, "folder or Hub id of the trained tokenizer; it stays as it is")
    cache: str | None = flag(
        None,
        "folder or Hub id of a cache of tokens, instead of images; data flags that stay at their defaults are those "
        "of the cache",
        group="data",
    )
    cache_codes: bool = flag(
        False, "first write the tokens of all images into OUTPUT_DIR/cache, then train on them", group="data"
    )
    cache_variants: int = flag(
        1, "augmented versions of each image that --cache_codes keeps; epochs take turns", group="data"
    )


def _data_flags() -> list[tuple[str, Any, dataclasses.Field]]:
    hints = typing.get_type_hints(TrainingConfig)
    return [
        (name, hints[name], dataclasses.field(default=field.default, metadata=field.metadata))
        for name, field in _DATA_FIELDS.items()
        if name not in (*_VALIDATION_FLAGS, *_STREAM_FLAGS)
    ]


_DataFlags = dataclasses.make_dataclass("_DataFlags", _data_flags(), kw_only=True)


@dataclasses.dataclass(kw_only=True)
class CacheConfig(_DataFlags):
    """The settings of the scripts that write caches: where to, of what, and the data flags of a training run."""

    dataset: str = flag(
        "shapes", "'shapes' (built in), a folder of images, or the Hub id of an image data set; no tar files",
        group="data",
    )  # fmt: skip
    tokenizer: str = flag(REQUIRED, "folder or Hub id of the tokenizer", group="cache")
    subfolder: str | None = flag(None, "its folder inside of a pipeline, for example vae or vq_model", group="cache")
    output_dir: str = flag(REQUIRED, "folder of the cache; an unfinished one is continued", group="cache")
    overwrite: bool = flag(False, "delete the cache that --output_dir holds and begin anew", group="cache")
    variants: int = flag(
        1, "augmented versions of each image to keep, those of the first epochs of a run with images", group="cache",
        least=1,
    )  # fmt: skip
    batch_size: int = flag(32, "images per process and encoding step", group="cache", least=1)
    progress: bool = flag(True, "show a progress bar", group="cache")
    push_to: str | None = flag(None, "then publish the cache as the data set USER/NAME on the Hub", group="cache")
    private: bool = flag(False, "make that data set a private one", group="cache")
    seed: int = flag(0, "of the random crops and flips, and of the built-in shapes", group="data")

    # What training_images asks for.
    num_classes, shuffle_buffer = None, 1000

    def __post_init__(self) -> None:
        check_least(self)
        _check_variants(self, self.variants, "--variants")


def build_cache(config: CacheConfig, tokenizer: nn.Module) -> None:
    """Write the cache that a script was asked for, and publish it if wanted."""
    accelerator = Accelerator(mixed_precision="no")
    _write(training_images(config), config, tokenizer, Path(config.output_dir), accelerator, config.variants)
    if not accelerator.is_main_process:
        return
    cache = TokenCache(config.output_dir)
    save_png(cache_check(cache, tokenizer, accelerator.device), cache.folder / CHECK_FILE)
    logger.info("%d rows in %s; train on them with --cache %s.", len(cache), cache.folder, config.output_dir)
    if config.push_to is not None:
        address = push_cache(cache.folder, config.push_to, private=config.private or None, progress=config.progress)
        logger.info("Published: %s", address)


def training_tokens(config: TokenTrainingConfig, tokenizer: nn.Module, trainer: Trainer) -> Dataset:
    """The data that a run trains on: images, or the rows of a cache if ``--cache`` or ``--cache_codes`` asks for it.

    Items of a cache have ``codes``, ``moments`` or ``latents`` in place of ``pixels``, see
    :class:`~hfgen.data.token_cache.TokenCache`; :func:`~hfgen.training.token_encoding.batch_codes` and
    ``batch_latents`` make tokens of either. Four rows of a cache are decoded to OUTPUT_DIR/validation/cache_check.png.

    With ``--cache``, the data flags in ``config`` that stand at their defaults take the values of the cache, so that
    the record of the run tells the truth. The seed of a run may differ from that of its cache.

    Raises:
        ValueError: if the cache was made by another tokenizer or from other data than the flags ask for, or if the
            images do not have the size that the codes are for.
    """
    if config.cache is not None and config.cache_codes:
        raise ValueError("--cache takes a cache that exists and --cache_codes writes one; give only one of them.")
    accelerator = trainer.accelerator
    if config.cache_codes:
        _check_variants(config, config.cache_variants, "--cache_variants", "--cache_codes")
        _check_resolution(config, tokenizer)
        folder = trainer.output_dir / CACHE_FOLDER
        _write(training_images(config), config, tokenizer, folder, accelerator, config.cache_variants)
        cache = TokenCache(folder)
    elif config.cache is not None:
        with accelerator.local_main_process_first():
            cache = open_cache(config.cache)
        differences = cache.info.tokenizer.differences(tokenizer_identity(tokenizer, config.tokenizer))
        differences += _adopt(config, cache.info.preprocessing, config.cache)
        if differences:
            raise ValueError(
                f"The cache {config.cache} does not fit this run: {'; '.join(differences)}. Give the tokenizer "
                f"and the data flags that it was made with, or make one that fits: {REBUILD}."
            )
        _check_resolution(config, tokenizer)
        logger.info("Training on %d rows of %s.", len(cache), config.cache)
    else:
        _check_resolution(config, tokenizer)
        return training_images(config)
    tokenizer.to(accelerator.device).eval()
    if accelerator.is_main_process:
        folder = trainer.output_dir / VALIDATION_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        save_png(cache_check(cache, tokenizer, accelerator.device), folder / CHECK_FILE)
    return cache


def cache_check(cache: TokenCache, tokenizer: nn.Module, device: torch.device) -> Image:
    """Four rows of a cache as a picture: images that fit what is written below them, if all is well."""
    rows = [cache[int(index)] for index in np.linspace(0, len(cache) - 1, 4)]
    tokens = torch.stack([row[cache.info.kind] for row in rows]).to(device)
    images = decode_tokens(tokenizer, cache.info.kind, tokens)
    labels = [_describe(row, cache.class_names) for row in rows]
    return make_grid(images.float(), columns=4, upscale=max(1, 128 // images.shape[-1]), labels=labels)


def _describe(row: Mapping[str, Any], class_names: list[str]) -> str:
    name = class_names[row["label"]] if row["label"] >= 0 else ""
    return f"row {row['index']}: {row.get('caption', name)}"


def _write(
    dataset: Dataset,
    config: TokenTrainingConfig | CacheConfig,
    tokenizer: nn.Module,
    folder: Path,
    accelerator: Accelerator,
    num_variants: int,
) -> None:
    write_cache(
        dataset,
        tokenizer,
        folder,
        accelerator=accelerator,
        identity=tokenizer_identity(tokenizer, config.tokenizer),
        preprocessing=_preprocessing(config),
        num_variants=num_variants,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        overwrite=config.overwrite,
        progress=config.progress,
    )


def _check_variants(config: Any, variants: int, variants_flag: str, prefix: str = "") -> None:
    """One version of each image is all there is without random crops and flips, and too few with them."""
    if (config.flip or config.crop == "random") and variants == 1:
        raise ValueError(
            f"{prefix or 'A cache'} keeps one version of each image: drop --flip and use --crop center, or keep more "
            f"versions, for example {variants_flag} 10."
        )


def _check_resolution(config: TokenTrainingConfig, tokenizer: nn.Module) -> None:
    """A generator of codes has as many positions as the images have that the tokenizer is meant for."""
    if getattr(tokenizer, "codebook_size", None) is not None and config.resolution != tokenizer.image_size:
        name, size = type(tokenizer).__name__, tokenizer.image_size
        raise ValueError(
            f"--resolution is {config.resolution}, but the {name} {config.tokenizer} is for images of {size}: give "
            f"--resolution {size}, or another tokenizer."
        )


def _preprocessing(config: Any) -> dict[str, Scalar]:
    """What decides about the pixels of a row, as it is recorded and compared."""
    values = {name: getattr(config, name) for name in _PREPROCESSING}
    return {**values, "dataset": portable_name(config.dataset), "split": "train", "seed": config.seed}


def _adopt(config: TokenTrainingConfig, cached: Mapping[str, Scalar], source: str) -> list[str]:
    """Give the data flags of ``config`` that are at their defaults the cached values; say where others differ."""
    differences, adopted = [], {}
    asked, defaults = _preprocessing(config), {field.name: field.default for field in dataclasses.fields(config)}
    for name in _PREPROCESSING:
        value = cached.get(name, _DATA_FIELDS[name].default)
        if asked[name] == defaults[name]:  # a script may have other defaults than the rest
            adopted[name] = value
        elif asked[name] != value:
            differences.append(f"--{name} is {asked[name]}, in the cache {value}")
    if cached.get("seed") != config.seed:
        logger.info("The images of %s were drawn with seed %s.", source, cached.get("seed"))
    # Through the checks of the command line: the values come from a file.
    checked = make_config(type(config), {**dataclasses.asdict(config), **adopted}, source=f"the cache {source}")
    for name in adopted:
        setattr(config, name, getattr(checked, name))
    return differences
