"""Sampling from one transformer over text and images: tokens one by one, images by denoising or code by code.

Transfusion (Zhou et al., arXiv 2408.11039, section 3.4). What a sequence has gone through lies in a cache; every
function runs new tokens against it and nothing twice. An image is denoised by passes over its patches alone, since
the context does not depend on them; a last pass with the finished image stores it for what follows.

Legend: B images, R rows of the cache, T tokens, V vocabulary, K codes, n patches, D width. With guidance R = 2 B:
first the rows with the condition, then in the same order those without. Nothing here turns off gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hfgen.sampling.guidance import guide
from hfgen.sampling.logits import filter_logits, sample_codes
from hfgen.sampling.transfusion_cache import TransfusionCache

Draws = Callable[[Sequence[int]], Tensor]  # a shape -> Exponential(1) numbers; see hfgen.sampling.logits


class EmbeddedImages(Protocol):
    """Images as tokens (B, n, D), and what the way back needs besides."""

    hidden_states: Tensor

    def repeat(self, times: int) -> EmbeddedImages:
        """The same images ``times`` times, one after the other."""


class MixedModel(Protocol):
    """What sampling asks of a transformer over text and images."""

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """(R, T) int64 -> (R, T, D)."""

    def embed_images(self, latents: Tensor, timesteps: Tensor) -> EmbeddedImages:
        """(B, C, H, W) and (B,) -> tokens."""

    def run(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        cache: Any = None,
        mask: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        """(R, T, D) and (R, T) -> (R, T, D) after the last norm.

        Without a mask a token sees all in the cache, and of the new ones those before it, or all.
        """

    def read_images(self, hidden_states: Tensor, embedded: EmbeddedImages) -> Tensor:
        """(B, n, D) -> (B, C, H, W), the prediction of the network."""

    def text_logits(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""


def extend_text(model: MixedModel, cache: TransfusionCache, input_ids: Tensor) -> Tensor:
    """Run tokens (R, T) of text; returns their states (R, T, D)."""
    num_tokens, device = input_ids.shape[1], input_ids.device
    mask = cache.mask(num_tokens, causal=True, device=device)
    return model.run(model.embed_text(input_ids), cache.positions(num_tokens, device), cache, mask)


def read_texts(
    model: MixedModel, rows: Sequence[Sequence[int]], *, num_layers: int, pad_token_id: int, device: torch.device | str
) -> tuple[TransfusionCache, Tensor]:
    """Run texts of any lengths as one batch.

    Args:
        model: of L layers.
        rows: R lists of ids.
        num_layers: L.
        pad_token_id: fills the empty places, which nothing sees.
        device: of the ids.

    Returns:
        The filled cache, without room for more (see :meth:`TransfusionCache.join`), and the states (R, D) of the last
        tokens.
    """
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    input_ids = torch.tensor([[pad_token_id] * empty + list(row) for empty, row in zip(padding, rows)], device=device)
    cache = TransfusionCache(num_layers, longest, padding)
    return cache, extend_text(model, cache, input_ids)[:, -1]


def extend_images(
    model: MixedModel, cache: TransfusionCache, latents: Tensor, timesteps: Tensor, *, causal: bool = False
) -> tuple[Tensor, EmbeddedImages]:
    """Run one image per row of the cache, whose patches see each other.

    Args:
        model: of continuous images.
        cache: of R rows.
        latents: (B, C, H, W); with R = 2 B rows each image is that of two rows, b and B + b.
        timesteps: (B,), the noise in the images; 0 is none.
        causal: for a network whose patches see only those before them.

    Returns:
        The states (R, n, D) and the other argument of ``read_images``.
    """
    embedded = model.embed_images(latents, timesteps).repeat(len(cache.padding) // len(latents))
    num_patches, device = embedded.hidden_states.shape[1], latents.device
    positions, mask = cache.positions(num_patches, device), cache.mask(num_patches, causal=causal, device=device)
    return model.run(embedded.hidden_states, positions, cache, mask, causal=causal), embedded


def denoise(
    model: MixedModel,
    cache: TransfusionCache,
    latents: Tensor,
    scheduler: Any,
    *,
    guidance_scale: float = 1.0,
    causal: bool = False,
    step_arguments: dict[str, Any] | None = None,
    on_step: Callable[[int, float, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Draw images after what the rows of the cache hold; the cache is as long as before.

    Args:
        model: predicts what the scheduler takes.
        cache: R = B rows, or 2 B with guidance.
        latents: (B, C, H, W) float32 noise.
        scheduler: of diffusers, whose timesteps are set.
        guidance_scale: w; 1 is off.
        causal: for a network whose patches see only those before them.
        step_arguments: of the scheduler's ``step``, such as the generator of a stochastic one.
        on_step: called after each step as ``on_step(i, timestep, inputs, prediction, latents)`` with what the network
            got and said (guided), and the new latents; returns those to go on with.

    Returns:
        (B, C, H, W) float32 without noise.
    """
    length = cache.length
    scale_input = getattr(scheduler, "scale_model_input", None)
    # Schedulers look a timestep up in tables on the CPU: one from there needs no wait for the device.
    for i, timestep in enumerate(scheduler.timesteps.cpu()):
        inputs = latents if scale_input is None else scale_input(latents, timestep)
        times = scheduler.timesteps[i].to(latents.device).expand(len(latents))
        prediction = model.read_images(*extend_images(model, cache, inputs, times, causal=causal)).float()
        cache.crop(length)
        if guidance_scale != 1:
            prediction = guide(*prediction.chunk(2), guidance_scale)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **(step_arguments or {}))[0]
        if on_step is not None:
            latents = on_step(i, timestep.item(), inputs, prediction, latents)
    return latents


def text_tokens(
    model: MixedModel,
    cache: TransfusionCache,
    hidden_states: Tensor,
    blocked: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draws: Draws | None = None,
) -> Iterator[Tensor]:
    """Token after token (R,) int64, without end; a token runs through the model when the next one is asked for.

    Args:
        model: of the text.
        cache: ends with the token that ``hidden_states`` (R, D) belong to.
        blocked: (V,) boolean, the ids that are never drawn; more can be set on the way.
        temperature, top_k, top_p: of the draw; a temperature of 0 takes the likeliest.
        draws: Exponential(1) numbers, None takes the likeliest.
    """
    while True:
        logits = model.text_logits(hidden_states).float().masked_fill(blocked, -torch.inf)
        tokens = _draw(logits, temperature, top_k, top_p, draws)
        yield tokens
        hidden_states = extend_text(model, cache, tokens[:, None])[:, -1]


def image_codes(
    model: MixedModel,
    cache: TransfusionCache,
    hidden_states: Tensor,
    *,
    num_codes: int,
    code_offset: int,
    codebook_size: int,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draws: Draws | None = None,
) -> Iterator[Tensor]:
    """The codes of an image one by one, each (B,) int64 in [0, K); all but the last have run through the model.

    Args:
        model: with ids ``code_offset + code`` for K = ``codebook_size`` codes.
        cache: R = B rows, or 2 B with guidance, that end with the token before the image.
        hidden_states: (R, D) of that token.
        num_codes: of an image.
        guidance_scale: w on the logits; 1 is off.
        temperature, top_k, top_p, draws: as of :func:`text_tokens`.
    """
    for i in range(num_codes):
        logits = model.text_logits(hidden_states).float()[:, code_offset : code_offset + codebook_size]
        if guidance_scale != 1:
            logits = guide(*logits.chunk(2), guidance_scale)
        codes = _draw(logits, temperature, top_k, top_p, draws)
        yield codes
        if i + 1 < num_codes:
            tokens = (codes + code_offset).repeat(len(hidden_states) // len(codes))
            hidden_states = extend_text(model, cache, tokens[:, None])[:, -1]


def _draw(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: Draws | None) -> Tensor:
    """(B, V) -> (B,)."""
    if temperature == 0 or draws is None:
        return sample_codes(logits, None)
    logits = filter_logits(logits / temperature, top_k=top_k, top_p=top_p)
    return sample_codes(logits, draws(logits.shape))
