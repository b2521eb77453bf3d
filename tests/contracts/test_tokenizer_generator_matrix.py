"""Any discrete tokenizer with any generator that can use it: two training steps, samples, and the same after loading.

The matrix is read off ``hfgen/systems.py``: the pipelines of its rows with a ``vq_model``, their generators, and every
tokenizer that has codes. Whether a pair fits is what the types of the pipeline's constructor say; all that fit must
work. So the multi-scale tokenizer is in the matrix with the masked-token generators as well: its scales, one after the
other, are a fixed number of codes.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hfgen
from hfgen.counters import generator
from hfgen.losses.masked import masked_token_loss
from hfgen.sampling.masked_tokens import mask_ratio, random_token_mask
from hfgen.systems import SYSTEMS
from support.instances import MODELS, build_model, labels

NUM_CLASSES = 5


@dataclass(frozen=True)
class Recipe:
    """How the generators of a pipeline are trained and sampled.

    Attributes:
        arguments: tokenizer -> those constructor arguments of a generator that depend on it.
        loss: of (generator, tokenizer, codes (B, N), labels (B,)), a scalar.
        sampling: further arguments of a call of the pipeline.
    """

    arguments: Callable[[nn.Module], dict[str, Any]]
    loss: Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]
    sampling: Mapping[str, Any] = field(default_factory=dict)


def masked_arguments(tokenizer: nn.Module) -> dict[str, Any]:
    return {"num_codes": tokenizer.codebook_size, "num_tokens": tokenizer.num_tokens, "num_classes": NUM_CLASSES}


def masked_loss(model: nn.Module, tokenizer: nn.Module, codes: Tensor, class_labels: Tensor) -> Tensor:
    draws = generator(1)
    ratio = mask_ratio("cosine", torch.rand(len(codes), generator=draws), codes.shape[1])
    mask = random_token_mask(ratio, torch.rand(codes.shape, generator=draws))
    logits = model(codes.masked_fill(mask, model.mask_token_id), class_labels).logits
    return masked_token_loss(logits, codes, mask, label_smoothing=0.0)


def next_scale_arguments(tokenizer: nn.Module) -> dict[str, Any]:
    config = tokenizer.config
    sizes = {"num_codes": config.num_codes, "code_dim": config.latent_channels, "patch_nums": config.patch_nums}
    return sizes | {"num_classes": NUM_CLASSES}


def next_scale_loss(model: nn.Module, tokenizer: nn.Module, codes: Tensor, class_labels: Tensor) -> Tensor:
    with torch.no_grad():
        latents = tokenizer.quantizer.generator_inputs(codes)
    return F.cross_entropy(model(latents, class_labels).logits.flatten(0, 1), codes.flatten())


RECIPES = {
    "MaskGITPipeline": Recipe(masked_arguments, masked_loss, {"num_inference_steps": 3, "guidance_scale": 2.0}),
    "VARPipeline": Recipe(next_scale_arguments, next_scale_loss),
}


def defined_in(name: str, package: str) -> bool:
    return getattr(hfgen, name).__module__.startswith(f"hfgen.models.{package}.")


def named(package: str) -> list[str]:
    """The public classes in rows of ``hfgen/systems.py`` that a package of hfgen.models defines."""
    return sorted({name for system in SYSTEMS for name in system.classes if defined_in(name, package)})


@functools.cache
def tokenizer_type(pipeline: str) -> type | None:
    """What a pipeline takes as ``vq_model``; None if it has no discrete tokenizer."""
    constructor = getattr(hfgen, pipeline).__init__
    if "vq_model" not in inspect.signature(constructor).parameters:
        return None
    return typing.get_type_hints(constructor)["vq_model"]


def matrix() -> list[tuple[str, str, str]]:
    """(pipeline, generator, tokenizer) of all pairs that fit."""
    tokenizers = {name: build_model(name) for name in named("tokenizers") if name in MODELS}
    cells = set()
    for system in SYSTEMS:
        kind = tokenizer_type(system.pipeline) if system.pipeline else None
        if kind is None:
            continue
        fitting = [name for name, one in tokenizers.items() if one.codebook_size is not None and isinstance(one, kind)]
        generators = [name for name in system.classes if defined_in(name, "generators")]
        cells |= {(system.pipeline, one, tokenizer) for one in generators for tokenizer in fitting}
    return sorted(cells)


MATRIX = matrix()


@pytest.mark.parametrize("name", named("tokenizers"))
def test_every_discrete_tokenizer_has_a_column(name):
    if name not in MODELS:
        pytest.fail(f"{name} needs a tiny instance: add it to MODELS in tests/support/instances.py.")
    tokenizer = build_model(name)
    if tokenizer.codebook_size is None:
        pytest.skip(f"{name} is continuous")
    if not any(tokenizer_name == name for _, _, tokenizer_name in MATRIX):
        pytest.fail(
            f"No generator takes the codes of {name}. Give it `num_tokens`, `encode` and `decode_codes` as in "
            "hfgen.pipelines.maskgit.DiscreteTokenizer, or add the pipeline that takes it to hfgen/systems.py."
        )
    side = tokenizer.image_size
    codes = tokenizer.encode(torch.zeros(2, 3, side, side)).codes
    assert codes.shape == (2, tokenizer.num_tokens) and codes.dtype == torch.int64
    assert tokenizer.decode_codes(codes).sample.shape == (2, 3, side, side)


@pytest.mark.parametrize("name", named("generators"))
def test_every_generator_of_tokens_has_a_row(name):
    pipelines = [system.pipeline for system in SYSTEMS if name in system.classes and system.pipeline]
    if not any(tokenizer_type(pipeline) for pipeline in pipelines):
        pytest.skip(f"{name} is no generator of codes")
    assert any(one == name for _, one, _ in MATRIX), f"{name} fits no tokenizer of the package"


@pytest.mark.parametrize(("pipeline_name", "generator_name", "tokenizer_name"), MATRIX)
def test_trains_samples_saves_and_loads(pipeline_name, generator_name, tokenizer_name, tmp_path):
    if pipeline_name not in RECIPES:
        pytest.fail(f"Say in RECIPES of {__name__} how the generators of {pipeline_name} are trained.")
    recipe, tokenizer = RECIPES[pipeline_name], build_model(tokenizer_name)
    model = build_model(generator_name, **recipe.arguments(tokenizer)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    side = tokenizer.image_size
    pixels = torch.rand(4, 3, side, side, generator=generator(0)) * 2 - 1
    with torch.no_grad():
        codes = tokenizer.encode(pixels).codes
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(2):
        loss = recipe.loss(model, tokenizer, codes, labels(4, NUM_CLASSES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]  # the same batch with the same draws
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged

    def sample(pipeline) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        draws = [generator(seed) for seed in range(3)]
        return pipeline([0, 1, 4], generator=draws, output_type="pt", **recipe.sampling).images

    pipeline = getattr(hfgen, pipeline_name)(vq_model=tokenizer, transformer=model.eval())
    images = sample(pipeline)
    assert images.shape == (3, 3, side, side) and images.isfinite().all() and not torch.equal(images[0], images[1])
    pipeline.save_pretrained(tmp_path)
    loaded = hfgen.AutoPipeline.from_pretrained(tmp_path)
    parts = (type(loaded), type(loaded.transformer), type(loaded.vq_model))
    assert tuple(part.__name__ for part in parts) == (pipeline_name, generator_name, tokenizer_name)
    assert torch.equal(sample(loaded), images)


@pytest.mark.parametrize("name", sorted({tokenizer for _, _, tokenizer in MATRIX}))
def test_tokenizers_refuse_other_codes(name):
    tokenizer = build_model(name)
    size, count = tokenizer.codebook_size, tokenizer.num_tokens
    for number in (count - 1, count + 1):
        with pytest.raises(ValueError, match=rf"codes have shape \(1, {number}\)|{number} codes"):
            tokenizer.decode_codes(torch.zeros(1, number, dtype=torch.long))
    for wrong in (-1, size):
        with pytest.raises(ValueError, match=rf"{wrong}.*\[0, {size - 1}\]|\[0, {size - 1}\].*{wrong}"):
            tokenizer.decode_codes(torch.full((1, count), wrong))


@pytest.mark.parametrize(("pipeline_name", "generator_name", "tokenizer_name"), MATRIX)
def test_another_codebook_is_refused(pipeline_name, generator_name, tokenizer_name):
    tokenizer = build_model(tokenizer_name)
    arguments, size = RECIPES[pipeline_name].arguments(tokenizer), tokenizer.codebook_size
    model = build_model(generator_name, **arguments | {"num_codes": size + 1})
    with pytest.raises(ValueError, match=f"codebook size.*: {size} and {size + 1}"):
        getattr(hfgen, pipeline_name)(vq_model=tokenizer, transformer=model)
