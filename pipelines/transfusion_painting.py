"""How a mixed-modal transformer draws an image after a context: by denoising, or code by code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from hfgen.models.generators.transfusion import TransfusionTransformer
from hfgen.pipelines.inputs import after_callback
from hfgen.pipelines.latents import initial_noise
from hfgen.pipelines.transfusion_images import ContinuousImages, ImageForm
from hfgen.pipelines.transfusion_schedule import denoised, set_timesteps, step_arguments
from hfgen.sampling.logits import exponential_draws
from hfgen.sampling.transfusion import denoise, image_codes, read_texts
from hfgen.sampling.transfusion_cache import TransfusionCache

# After a step: (index, timestep or code index, tensors by name) -> tensors to go on with.
OnStep = Callable[[int, float, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class PaintingSettings:
    """The arguments of a pipeline's call that say how images are drawn."""

    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Context:
    """What images are drawn on: the ``rows`` (B,) of a cache and of the states (R, D) of its last tokens."""

    cache: TransfusionCache
    rows: Sequence[int]
    hidden_states: Tensor


class Painter:
    """Draws the images of one call.

    Args:
        transformer: that draws.
        form: what images are to it.
        scheduler: of continuous images.
        settings: of the call.
        generator: of all draws.
        device: of the transformer's inputs.

    Raises:
        ValueError: a number of steps that is not possible.
    """

    def __init__(
        self,
        transformer: TransfusionTransformer,
        form: ImageForm,
        scheduler: SchedulerMixin | None,
        settings: PaintingSettings,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        device: torch.device,
    ):
        self.transformer, self.form, self.scheduler, self.settings = transformer, form, scheduler, settings
        self.generator, self.device = generator, device
        self.num_tokens = form.num_tokens(settings.height, settings.width)
        self.num_steps = self.num_tokens
        if isinstance(form, ContinuousImages):
            set_timesteps(scheduler, settings.num_inference_steps, device)
            self.num_steps = len(scheduler.timesteps)

    def check_noise(self, noise: Tensor | None, batch_size: int) -> None:
        """Raise a ``ValueError`` for noise that images cannot start from."""
        if noise is None:
            return
        if not isinstance(self.form, ContinuousImages):
            raise ValueError("Discrete images begin with no noise: leave latents out.")
        expected = (batch_size, *self.form.latent_shape(self.settings.height, self.settings.width))
        if tuple(noise.shape) != expected:
            raise ValueError(f"latents have shape {tuple(noise.shape)}, expected {expected}.")

    def read(self, rows: Sequence[Sequence[int]]) -> Context:
        """Run the texts before B images; equal ones are run once."""
        config = self.transformer.config
        unique = list(dict.fromkeys(map(tuple, rows)))
        cache, hidden_states = read_texts(
            self.transformer,
            unique,
            num_layers=config.num_layers,
            pad_token_id=config.pad_token_id,
            device=self.device,
        )
        return Context(cache, [unique.index(tuple(row)) for row in rows], hidden_states)

    def paint(self, context: Context, null: Context | None, on_step: OnStep, noise: Tensor | None = None) -> Tensor:
        """Draw an image for each of the B rows.

        Args:
            context: ends with the marker that begins an image.
            null: the same without the condition; None if there is no guidance.
            on_step: called after each step.
            noise: (B, C, h, w) to start from.

        Returns:
            Latents (B, C, h, w) or codes (B, n).
        """
        halves = [context] if null is None else [context, null]
        cache = TransfusionCache.join([(half.cache, half.rows) for half in halves], room=self.num_tokens)
        scale = 1.0 if null is None else self.settings.guidance_scale
        if isinstance(self.form, ContinuousImages):
            return self._denoise(cache, len(context.rows), scale, on_step, noise)
        hidden_states = torch.cat([half.hidden_states[list(half.rows)] for half in halves])
        return self._draw_codes(cache, hidden_states, scale, on_step)

    def _denoise(
        self, cache: TransfusionCache, batch_size: int, scale: float, on_step: OnStep, noise: Tensor | None
    ) -> Tensor:
        shape = (batch_size, *self.form.latent_shape(self.settings.height, self.settings.width))
        if noise is None:
            noise = initial_noise(shape, self.generator, self.device)
        latents = noise.to(self.device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

        def after(i: int, timestep: float, inputs: Tensor, prediction: Tensor, latents: Tensor) -> Tensor:
            clean = denoised(self.scheduler, i, timestep, inputs, prediction)
            return after_callback(on_step(i, timestep, {"latents": latents, "denoised": clean}), "latents", latents)

        set_timesteps(self.scheduler, self.settings.num_inference_steps, self.device)
        return denoise(
            self.transformer,
            cache,
            latents,
            self.scheduler,
            guidance_scale=scale,
            causal=not self.transformer.config.bidirectional_images,
            step_arguments=step_arguments(self.scheduler, self.generator),
            on_step=after,
        )

    def _draw_codes(self, cache: TransfusionCache, hidden_states: Tensor, scale: float, on_step: OnStep) -> Tensor:
        config, settings, codes = self.transformer.config, self.settings, []
        stream = image_codes(
            self.transformer,
            cache,
            hidden_states,
            num_codes=self.num_tokens,
            code_offset=config.code_offset,
            codebook_size=config.codebook_size,
            guidance_scale=scale,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            draws=partial(exponential_draws, generator=self.generator, device=self.device),
        )
        for i, drawn in enumerate(stream):
            codes.append(drawn)
            on_step(i, i, {"codes": torch.stack(codes, dim=1)})
        return torch.stack(codes, dim=1)


def check_draws(temperature: float, top_k: int, top_p: float) -> None:
    """Raise a ``ValueError`` for settings of draws out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a finite number of at least 0 (the likeliest), got {temperature}.")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (off), got {top_k}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], where 1 is off, got {top_p}.")


def check_settings(settings: PaintingSettings, form: ImageForm) -> None:
    """Raise a ``ValueError`` for draws out of range, a size that ``form`` has not, or steps of discrete images."""
    check_draws(settings.temperature, settings.top_k, settings.top_p)
    form.num_tokens(settings.height, settings.width)
    if settings.num_inference_steps is not None and not isinstance(form, ContinuousImages):
        raise ValueError("Discrete images take one step for each code: leave num_inference_steps out.")
