"""The sampling rule of masked-token generators (MaskGIT, arXiv 2202.04200; TiTok; Muse, arXiv 2301.00704; Show-o)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from hfgen.sampling.guidance import GUIDANCE_SCHEDULES, guidance_schedule, resolve_guidance
from hfgen.sampling.masked_tokens import (
    ANNEALINGS,
    CONFIDENCES,
    anneal,
    check_mask_schedule,
    confidence_of,
    lowest,
    mask_ratio,
)
from hfgen.schedulers.base import HFGenScheduler

# Where the guidance schedule stands at step t of T.
GUIDANCE_PROGRESS = ("first-to-last", "before", "after")
# What the ratio of the mask schedule is a share of.
RATIO_OF = ("masked", "all")

_TITOK = {
    "mask_schedule": "arccos",
    "ratio_of": "all",
    "confidence": "logit",
    "token_annealing": "linear",
    "guidance_progress": "before",
}


def _titok_fid(temperature: float, guidance_scale: float, guidance_schedule: str) -> dict[str, Any]:
    return _TITOK | {
        "token_temperature": temperature,
        "choice_temperature": temperature,
        "softmax_temperatures": (1.3, 0.5),
        "guidance_scale": guidance_scale,
        "guidance_schedule": guidance_schedule,
        "guidance_power": 3.0,
    }


@dataclass(frozen=True)
class MaskedTokenStep:
    """What one step does; everything is known before the first one.

    Attributes:
        index: t, from 0 to T - 1.
        num_masked: masked tokens of each image before the step.
        num_remasked: how many of them are masked again after it; 0 in the last step.
        guidance_scale: w, where 1 means that the unconditional half is not needed.
        token_temperature: of the Gumbel noise on the logits; 0 takes the likeliest code.
        choice_temperature: of the Gumbel noise on the confidence; 0 keeps the most confident tokens.
        softmax_temperature: the logits are divided by it.
    """

    index: int
    num_masked: tuple[int, ...]
    num_remasked: tuple[int, ...]
    guidance_scale: float
    token_temperature: float
    choice_temperature: float
    softmax_temperature: float

    @property
    def num_positions(self) -> int:
        """M, the masked tokens of the image that has most."""
        return max(self.num_masked)


@dataclass
class MaskedTokenSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: (B, N) int64, the input of the next step, with masked tokens.
        pred_original_sample: (B, N) int64, the same before tokens were masked again: a complete image.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class MaskedTokenScheduler(HFGenScheduler):
    """Draws all masked tokens at once, keeps the most confident ones and masks the others again.

    One step t of T, for the guided logits l of the masked tokens::

        l      = l / softmax_temperature
        code   = argmax(l + token_temperature * Gumbel)
        score  = confidence(l, code) + choice_temperature * Gumbel
        masked = the m tokens of lowest score, m = max(1, min(masked - 1, floor(n * ratio((t + 1) / T))))

    where n tokens were masked at first, or n tokens are all. A token that was kept stays. The scheduler has no state:
    :meth:`plan` says what each step will do, :meth:`step` is a function of tensors and noise; pipelines can share one.

    Published guidance scales s of the form ``cond + s (cond - uncond)`` (Muse, Show-o, TiTok's constant and linear
    schedules) are w = 1 + s here; those of ``uncond + s (cond - uncond)`` (aMUSEd, TiTok's power-cosine) are w = s.

    Args:
        mask_schedule: how the share of masked tokens falls, see :func:`hfgen.sampling.masked_tokens.mask_ratio`.
        ratio_of: n in the formula: ``masked``, the tokens that were masked at first (MaskGIT, aMUSEd), or ``all``
            tokens (TiTok, Show-o); the same unless a part of an image is painted.
        confidence: ``log-probability``, ``logit`` or ``random``.
        token_temperature: of the draw of codes; 1 draws from the softmax.
        token_annealing: how it changes from step to step: ``constant``, ``linear``, ``ramp`` or ``product``, see
            :func:`hfgen.sampling.masked_tokens.anneal`.
        choice_temperature: of the choice of the tokens that stay.
        choice_annealing: how it changes.
        softmax_temperatures: (a, b): the logits of step t are divided by b + (a - b) (1 - (t + 1) / T).
        guidance_scale: default w, 1 is off.
        guidance_schedule: ``constant``, ``linear``, ``cosine``, ``power-cosine`` or ``interval`` of
            :mod:`hfgen.sampling.guidance`.
        guidance_power: exponent of ``power-cosine``.
        guidance_interval: (low, high) of ``interval``.
        guidance_progress: where the schedule is read at step t of T: t / (T - 1) ``first-to-last``, t / T ``before``
            the step, or (t + 1) / T ``after`` it.
        num_inference_steps: default T.

    Raises:
        ValueError: an unknown name, a negative temperature, or no steps.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
        {
            "maskgit": {},
            "maskgit-512": {"num_inference_steps": 12},
            "titok": _TITOK | {"token_temperature": 4.5, "guidance_scale": 4.0},
            # Those of the reported FIDs.
            "titok-l32": _titok_fid(9.5, 5.5, "linear"),
            "titok-b64": _titok_fid(11.0, 4.0, "linear"),
            "titok-s128": _titok_fid(2.8, 6.9, "power-cosine") | {"num_inference_steps": 64},
            "amused": {
                "choice_temperature": 2.0,
                "choice_annealing": "ramp",
                "guidance_scale": 10.0,
                "num_inference_steps": 12,
            },
            "showo": {
                "ratio_of": "all",
                "choice_temperature": 1.0,
                "choice_annealing": "product",
                "guidance_scale": 6.0,
                "num_inference_steps": 50,
            },
        }
    )

    @register_to_config
    def __init__(
        self,
        mask_schedule: str = "cosine",
        ratio_of: str = "masked",
        confidence: str = "log-probability",
        token_temperature: float = 1.0,
        token_annealing: str = "constant",
        choice_temperature: float = 4.5,
        choice_annealing: str = "linear",
        softmax_temperatures: tuple[float, float] = (1.0, 1.0),
        guidance_scale: float = 1.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_progress: str = "first-to-last",
        num_inference_steps: int = 8,
    ):
        check_mask_schedule(mask_schedule)
        choices = (
            ("ratio_of", ratio_of, RATIO_OF),
            ("confidence", confidence, CONFIDENCES),
            ("token_annealing", token_annealing, ANNEALINGS),
            ("choice_annealing", choice_annealing, ANNEALINGS),
            ("guidance_schedule", guidance_schedule, GUIDANCE_SCHEDULES),
            ("guidance_progress", guidance_progress, GUIDANCE_PROGRESS),
        )
        for name, value, known in choices:
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}.")
        _check_temperature("token_temperature", token_temperature)
        _check_temperature("choice_temperature", choice_temperature)
        if len(softmax_temperatures) != 2 or min(softmax_temperatures) <= 0:
            raise ValueError(f"softmax_temperatures must be two numbers above 0, got {softmax_temperatures}.")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")

    def plan(
        self,
        num_masked: Sequence[int],
        num_inference_steps: int | None = None,
        *,
        num_tokens: int | None = None,
        first_step: int = 0,
        guidance_scale: float | None = None,
        guidance_schedule: str | Sequence[float] | None = None,
        token_temperature: float | None = None,
        choice_temperature: float | None = None,
    ) -> list[MaskedTokenStep]:
        """What each step does to images with ``num_masked[i]`` masked tokens.

        Args:
            num_masked: for each image; may differ when parts of images are painted.
            num_inference_steps: T.
            num_tokens: N; None if all tokens of every image are masked.
            first_step: the steps before it are left out, as MaskGIT does when it edits an image.
            guidance_scale, guidance_schedule, token_temperature, choice_temperature: instead of those of the
                configuration, as None stands for; the schedule may be a list of one scale per step.

        Raises:
            ValueError: more steps than masked tokens, or another value out of range.
        """
        config = self.config
        num_steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        token_temperature = config.token_temperature if token_temperature is None else token_temperature
        choice_temperature = config.choice_temperature if choice_temperature is None else choice_temperature
        _check_temperature("token_temperature", token_temperature)
        _check_temperature("choice_temperature", choice_temperature)
        if num_steps < 1 or not 0 <= first_step < num_steps:
            raise ValueError(f"There is no step {first_step} of {num_steps}: give 0 <= first_step < steps.")
        if num_steps - first_step > min(num_masked):
            raise ValueError(
                f"{num_steps - first_step} steps are more than the {min(num_masked)} masked tokens of an image: every "
                "step keeps at least one token. Use fewer steps or mask more tokens."
            )
        scales = self._guidance(num_steps, guidance_scale, guidance_schedule)
        token_temperatures = anneal(config.token_annealing, token_temperature, num_steps)
        choice_temperatures = anneal(config.choice_annealing, choice_temperature, num_steps)
        start, end = config.softmax_temperatures
        totals = list(num_masked)
        if config.ratio_of == "all" and num_tokens is not None:
            totals = [num_tokens] * len(totals)
        plan, masked = [], tuple(num_masked)
        for index in range(first_step, num_steps):
            remasked = (0,) * len(masked)
            if index + 1 < num_steps:
                wanted = (self._count(count, index + 1, num_steps) for count in totals)
                remasked = tuple(max(1, min(have - 1, want)) for have, want in zip(masked, wanted))
            plan.append(
                MaskedTokenStep(
                    index=index,
                    num_masked=masked,
                    num_remasked=remasked,
                    guidance_scale=scales[index],
                    token_temperature=token_temperatures[index],
                    choice_temperature=choice_temperatures[index],
                    softmax_temperature=end + (start - end) * (1 - (index + 1) / num_steps),
                )
            )
            masked = remasked
        return plan

    def step(
        self,
        logits: Tensor,
        codes: Tensor,
        positions: Tensor,
        step: MaskedTokenStep,
        mask_token_id: int,
        token_noise: Tensor | None = None,
        choice_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> MaskedTokenSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw the masked tokens and mask some of them again.

        Args:
            logits: (B, M, V) float, guided, of the tokens at ``positions``.
            codes: (B, N) int64, masked tokens hold ``mask_token_id``.
            positions: (B, M) int64, those of :func:`hfgen.sampling.masked_tokens.masked_positions`.
            step: one of :meth:`plan`.
            mask_token_id: id of a masked token.
            token_noise: (B, M, V) standard Gumbel noise; not needed at token temperature 0.
            choice_noise: (B, M) standard Gumbel noise; not needed at choice temperature 0, nor in the last step.

        Raises:
            ValueError: shapes that do not fit together, or noise is missing.
        """
        _check_shapes(logits, codes, positions, step)
        logits = logits.float()
        if step.softmax_temperature != 1:
            logits = logits / step.softmax_temperature
        drawn = _add_noise(logits, token_noise, step.token_temperature, "token").argmax(dim=-1)  # (B, M)
        # Rows of images with fewer masked tokens end in positions that are known and stay.
        known = torch.arange(positions.shape[1], device=codes.device) >= positions.new_tensor(step.num_masked)[:, None]
        filled = torch.where(known, codes.gather(1, positions), drawn)
        predicted = remaining = codes.scatter(1, positions, filled)
        if any(step.num_remasked):
            score = confidence_of(self.config.confidence, logits, drawn)
            score = _add_noise(score, choice_noise, step.choice_temperature, "choice")
            again = lowest(score.masked_fill(known, torch.inf), positions.new_tensor(step.num_remasked))
            remaining = codes.scatter(1, positions, filled.masked_fill(again, mask_token_id))
        if not return_dict:
            return (remaining, predicted)
        return MaskedTokenSchedulerOutput(prev_sample=remaining, pred_original_sample=predicted)

    def _count(self, num_tokens: int, done: int, num_steps: int) -> int:
        """floor(n * ratio), in the precision of the published samplers: the product can be close to a whole number."""
        dtype = torch.float64 if self.config.mask_schedule == "arccos" else torch.float32
        progress = torch.tensor(done / num_steps, dtype=dtype)
        return math.floor((num_tokens * mask_ratio(self.config.mask_schedule, progress, num_tokens)).item())

    def _guidance(self, num_steps: int, scale: float | None, schedule: str | Sequence[float] | None) -> list[float]:
        config = self.config
        scale = config.guidance_scale if scale is None else scale
        schedule = config.guidance_schedule if schedule is None else schedule
        if not isinstance(schedule, str):
            return resolve_guidance(schedule, scale, num_steps)
        # T + 1 points from 0 to 1 are t / T without the last one, and (t + 1) / T without the first one.
        between = config.guidance_progress != "first-to-last"
        scales = guidance_schedule(
            schedule,
            scale,
            num_steps + between,
            power=config.guidance_power,
            interval=tuple(config.guidance_interval),
        )
        return scales[1:] if config.guidance_progress == "after" else scales[:num_steps]


def _check_temperature(name: str, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0 (no noise), got {temperature}.")


def _check_shapes(logits: Tensor, codes: Tensor, positions: Tensor, step: MaskedTokenStep) -> None:
    expected = (len(step.num_masked), step.num_positions)
    if codes.ndim != 2 or tuple(positions.shape) != expected or tuple(logits.shape[:-1]) != expected:
        raise ValueError(
            f"Step {step.index} draws {expected[1]} tokens of {expected[0]} images, but logits have shape "
            f"{tuple(logits.shape)}, positions {tuple(positions.shape)} and codes {tuple(codes.shape)}."
        )


def _add_noise(values: Tensor, noise: Tensor | None, temperature: float, name: str) -> Tensor:
    if temperature == 0:
        return values
    if noise is None or noise.shape != values.shape:
        given = None if noise is None else tuple(noise.shape)
        raise ValueError(f"A {name} temperature needs {name}_noise of shape {tuple(values.shape)}, got {given}.")
    return values + temperature * noise
