"""Sequences of text and images, and sampling, for the open implementation of Transfusion.

Text is drawn token by token. The id that opens an image switches to an ordinary differential equation over its
patches, from noise to data, after which the id that closes it is appended by rule. What a sequence has gone through
lies in a cache and runs once. The network is ``hfgen.TransfusionFlowTransformer``.

What github.com/lucidrains/transfusion-pytorch does and this does not: it keeps the keys and values of the last
evaluation, a midpoint, for the text after an image instead of those of the finished image (``keep_midpoint`` does so
too); with a cache it leaves out the id that opens an image, and without one it draws the time of finished images anew
for every token; it reads no grid with a comma; and it lets any id follow, also ones that only rules append
(``any_id`` does so too).

Legend: B sequences, R rows of a cache, L tokens, V ids of the vocabulary, n patches of an image, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hfgen.sampling.guidance import guide
from hfgen.sampling.logits import Generators, exponential_draws, filter_logits, sample_codes
from hfgen.sampling.mixed_parts import PADDING_ID, MixedFlowModel, MixedPart, assemble, stack_sequences
from hfgen.sampling.ode import ode_step, passes_per_step

StepCallback = Callable[[int, Tensor], None]

_CLEAN, _NOISE = 0.0, 1000.0


@dataclass
class MixedSample:
    """What :func:`generate` made.

    Attributes:
        parts: the prompt and what follows it: texts, int64 (L,) with all ids, and images (modality, latents).
        nfe: passes of the network.
    """

    parts: list[MixedPart]
    nfe: int


@torch.no_grad()
def generate_images(
    transformer: MixedFlowModel,
    prompts: Sequence[Sequence[MixedPart]],
    grid: tuple[int, ...],
    *,
    modality: int = 0,
    num_inference_steps: int = 15,
    guidance_scale: float = 3.0,
    method: str = "midpoint",
    generator: torch.Generator | list[torch.Generator] | None = None,
    noise: Tensor | None = None,
    callback: StepCallback | None = None,
) -> tuple[Tensor, int]:
    """One image after each prompt.

    Args:
        transformer: in evaluation mode.
        prompts: B lists of parts, see :func:`hfgen.sampling.mixed_parts.assemble`; they may have different lengths.
        grid: of the images.
        modality: of the images.
        num_inference_steps: intervals of equal length; the implementation counts their ends, one more.
        guidance_scale: w; 1 is off. Without the condition all text is the null id.
        method: solver, see :mod:`hfgen.sampling.ode`.
        generator: of the noise; a list has one for each image.
        noise: (B, n, C) to begin with instead.
        callback: called with the number of steps done and the latents (B, ...) after each.

    Returns:
        The latents (B, C, *grid), or (B, *grid, C) where the modality has its channels last, and the number of passes.

    Raises:
        ValueError: no prompts; bad parts; noise of another shape.
    """
    if not prompts:
        raise ValueError("prompts is empty; give a list of parts for each image, [] for one without a prompt.")
    vocabulary = transformer.vocabulary
    opening = torch.tensor(vocabulary.opening(modality, grid), device=transformer.device)
    rows, images = [], []
    for parts in prompts:
        ids, context = assemble(transformer, parts)
        rows.append(torch.cat([ids, opening]))
        images += context
    ids = stack_sequences(rows, left=True)
    if guidance_scale != 1:
        ids, images = torch.cat([ids, _without_text(ids, vocabulary.null_id)]), images * 2
    cache = transformer.new_cache(len(ids), ids.shape[1] + math.prod(grid))
    _append(transformer, cache, ids, images)
    start = _initial_noise(transformer, modality, grid, len(prompts), noise, generator)
    latents, _ = denoise(
        transformer, cache, modality, grid, start, num_inference_steps, guidance_scale, method, callback
    )
    return latents, 1 + num_inference_steps * passes_per_step(method)


def denoise(
    transformer: MixedFlowModel,
    cache: Any,
    modality: int,
    grid: tuple[int, ...],
    noise: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    method: str = "midpoint",
    callback: StepCallback | None = None,
) -> tuple[Tensor, tuple[Tensor, float]]:
    """Solve the flow of one image per row against a context, which runs no more.

    Args:
        cache: the context up to the opening of the image, left as it is; with guidance 2 B rows, first those with the
            condition, then in the same order those without.
        noise: (B, ...) latents.

    Returns:
        The latents, and the point and the timestep of the last evaluation.
    """
    guided = guidance_scale != 1
    slots = torch.tensor(transformer.slots(modality, grid), device=noise.device)
    layout = transformer.layout(slots.expand(len(noise) * (1 + guided), -1), cache)
    last = (noise, _NOISE)

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        nonlocal last
        last = (latents, sigma * _NOISE)
        timestep = torch.full((1,), sigma * _NOISE, device=noise.device)
        network_input = torch.cat([latents, latents]) if guided else latents
        sample = transformer.extend(layout, cache, network_input, timestep, num_logits=0).sample.to(noise.dtype)
        return guide(*sample.chunk(2), guidance_scale) if guided else sample

    sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps + 1)]
    latents = noise
    for step in range(num_inference_steps):
        latents = ode_step(velocity, latents, sigmas[step], sigmas[step + 1], method)
        if callback is not None:
            callback(step + 1, latents)
    return latents, last


@torch.no_grad()
def generate(
    transformer: MixedFlowModel,
    prompt: Sequence[MixedPart],
    *,
    max_length: int = 512,
    image: tuple[int, tuple[int, ...]] | None = None,
    default_grid: tuple[int, ...] | None = None,
    num_inference_steps: int = 15,
    guidance_scale: float = 3.0,
    method: str = "midpoint",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.1,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    on_token: Callable[[int], None] | None = None,
    on_step: StepCallback | None = None,
    any_id: bool = False,
    keep_midpoint: bool = False,
) -> MixedSample:
    """Continue one sequence of texts and images, until the model closes it.

    Args:
        transformer: in evaluation mode.
        prompt: parts, see :func:`hfgen.sampling.mixed_parts.assemble`.
        max_length: most places, ids and patches, that follow the prompt.
        image: begin with an image of this modality and grid.
        default_grid: of an image whose description cannot be read; by default this ends the sequence.
        num_inference_steps, guidance_scale, method: as for :func:`generate_images`.
        temperature: of the text; 0 takes the most likely id.
        top_k, top_p: see :func:`hfgen.sampling.logits.filter_logits`.
        min_p: no id less likely than this share of the most likely one (arXiv 2407.01082).
        generator: of the noise and of the text.
        noise: (n, C) or more rows, with which every image begins instead.
        on_token: called with every id that was drawn.
        on_step: called with the number of steps done and the latents (1, ...) after each step of an image.
        any_id: let every id follow, also those that only rules append.
        keep_midpoint: go on from the last evaluation of an image, not from the finished one.

    Raises:
        ValueError: bad parts; an image that has no room in ``max_length``; noise of another shape.
    """
    session = _Session(transformer, prompt, max_length, keep_midpoint)
    if image is not None:
        session.append(transformer.vocabulary.opening(*image))
    allowed = None if any_id else _sampled_ids(transformer.vocabulary, transformer.device)
    while True:
        modality = session.open_modality()
        if modality is not None:
            grid = transformer.vocabulary.read_grid(session.ids)
            if grid is None or len(grid) != transformer.config.num_axes[modality]:
                grid = default_grid
            if grid is None or not session.has_room(math.prod(grid) + 1):
                if image is not None and not session.images_made:
                    raise ValueError(
                        f"An image with the grid {image[1]} needs {math.prod(image[1]) + 1} places after its opening; "
                        f"max_length={max_length} leaves {max(session.room, 0)}."
                    )
                break
            start = _initial_noise(transformer, modality, grid, 1, None if noise is None else noise[None], generator)
            session.append_image(modality, grid, start, num_inference_steps, guidance_scale, method, on_step)
        if not session.has_room(1):
            break
        logits = session.logits()
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        token = _draw(logits, temperature, top_k, top_p, min_p, generator)
        session.append([token])
        if on_token is not None:
            on_token(token)
        if token == transformer.vocabulary.eos_id:
            break
    return MixedSample(session.parts(), session.nfe)


class _Session:
    """One growing sequence: its ids, its images, the cache, and ids that have not run yet."""

    def __init__(self, transformer: MixedFlowModel, prompt: Sequence[MixedPart], max_length: int, keep_midpoint: bool):
        self.transformer = transformer
        self.keep_midpoint = keep_midpoint
        ids, self.images = assemble(transformer, prompt)
        self.ids: list[int] = ids.tolist()
        self.capacity = len(self.ids) + max_length
        self.cache = transformer.new_cache(1, self.capacity)
        self.images_made = self.nfe = 0
        self._last_logits: Tensor | None = None

    @property
    def room(self) -> int:
        """Places that are left."""
        return self.capacity - len(self.ids)

    def has_room(self, places: int) -> bool:
        return self.room >= places

    def append(self, ids: Sequence[int]) -> None:
        self.ids += ids

    def open_modality(self) -> int | None:
        """The modality of the image that the last id opens."""
        openings = [self.transformer.vocabulary.som_id(m) for m in range(self.transformer.vocabulary.num_modalities)]
        return openings.index(self.ids[-1]) if self.ids[-1] in openings else None

    def logits(self) -> Tensor:
        """(V,) float32 of the id that follows."""
        self._run()
        return self._last_logits

    def append_image(
        self,
        modality: int,
        grid: tuple[int, ...],
        noise: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        method: str,
        callback: StepCallback | None,
    ) -> None:
        """Draw an image, keep its keys and values, and close it."""
        transformer = self.transformer
        self._run()
        context = self.cache
        if guidance_scale != 1:
            ids = _without_text(self._tensor(self.ids), transformer.vocabulary.null_id)
            unconditional = transformer.new_cache(1, ids.shape[1])
            _append(transformer, unconditional, ids, self.images)
            context = self.cache.joined(unconditional, room=math.prod(grid))
            self.nfe += 1
        latents, (point, timestep) = denoise(
            transformer, context, modality, grid, noise, num_inference_steps, guidance_scale, method, callback
        )
        self.nfe += num_inference_steps * passes_per_step(method)
        stored = (point, timestep) if self.keep_midpoint else (latents, _CLEAN)
        slots = transformer.slots(modality, grid)
        _append(transformer, self.cache, self._tensor(slots), *stored)
        self.nfe += 1
        self.images.append(latents[0])
        self.images_made += 1
        self.ids += [*slots, transformer.vocabulary.eom_id(modality)]

    def parts(self) -> list[MixedPart]:
        """The sequence, taken apart at its images."""
        parts: list[MixedPart] = []
        text: list[int] = []
        images = iter(self.images)
        for token, previous in zip(self.ids, [0, *self.ids]):
            if token >= 0:
                text.append(token)
            elif token != previous:
                parts += [torch.tensor(text), (PADDING_ID - 1 - token, next(images))]
                text = []
        return [*parts, torch.tensor(text)]

    def _run(self) -> None:
        """Run the ids that are not in the cache."""
        new = self.ids[self.cache.length :]
        if new:
            images = self.images if self.cache.length == 0 else []
            self._last_logits = _append(self.transformer, self.cache, self._tensor(new), images)[0]
            self.nfe += 1

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.transformer.device)


def _append(
    transformer: MixedFlowModel,
    cache: Any,
    ids: Tensor,
    images: Tensor | Sequence[Tensor] = (),
    timestep: float = _CLEAN,
) -> Tensor:
    """Run ids (R, L) and keep them; the logits (R, V) after the last one. Finished images are clean."""
    layout = transformer.layout(ids, cache)
    latents, timesteps = (images, torch.full((1,), timestep, device=ids.device)) if len(images) else (None, None)
    logits = transformer.extend(layout, cache, latents, timesteps, num_logits=1).logits[:, -1]
    cache.keep(layout)
    return logits


def _without_text(ids: Tensor, null_id: int) -> Tensor:
    return torch.where(ids >= 0, null_id, ids)


def _initial_noise(
    transformer: MixedFlowModel,
    modality: int,
    grid: tuple[int, ...],
    batch_size: int,
    noise: Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """(B, C, *grid) or (B, *grid, C) float32; the numbers of a place stay together in any layout."""
    channels = transformer.config.latent_channels[modality]
    length = math.prod(grid)
    if noise is None:
        shape = (batch_size, length, channels)
        noise = randn_tensor(shape, generator=generator, device=transformer.device, dtype=torch.float32)
    if noise.ndim != 3 or len(noise) != batch_size or noise.shape[1] < length or noise.shape[2] < channels:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected at least ({batch_size}, {length}, {channels})."
        )
    noise = noise[:, :length, :channels].unflatten(1, grid)
    return noise.movedim(-1, 1) if transformer.config.channel_first[modality] else noise


def _sampled_ids(vocabulary: Any, device: torch.device) -> Tensor:
    """(V,) boolean: ids that a model may choose, not those that begin a sequence, close an image or stand for none."""
    allowed = torch.ones(vocabulary.size, dtype=torch.bool, device=device)
    closing = [vocabulary.eom_id(modality) for modality in range(vocabulary.num_modalities)]
    allowed[[vocabulary.bos_id, vocabulary.null_id, *closing]] = False
    return allowed


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, generator: Generators) -> int:
    """One id from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.max() + math.log(min_p), -torch.inf)
    draws = exponential_draws(logits.shape, generator, logits.device)
    return int(sample_codes(logits, draws))
