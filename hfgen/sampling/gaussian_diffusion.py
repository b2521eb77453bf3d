"""The arithmetic of Gaussian diffusion: betas, the timesteps that sampling keeps, and tables in float64.

DDPM (Ho et al., arXiv 2006.11239), improved DDPM (Nichol and Dhariwal, arXiv 2102.09672). In the words of the papers::

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)        abar_t = prod (1 - beta_s) over s <= t

Tables are computed in float64 and rounded to float32 where they meet a tensor: at the last timesteps of the cosine
schedule 1 / sqrt(abar) is 2e4, and float32 tables are off in the first digits that matter at the lowest ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
_MAX_BETA = 0.999


def diffusion_betas(schedule: str, num_steps: int, start: float, end: float) -> np.ndarray:
    """(num_steps,) float64, under the names of diffusers.

    - ``linear``: from ``start`` to ``end`` (DDPM, guided diffusion, DiT)
    - ``scaled_linear``: square roots from that of ``start`` to that of ``end`` (latent diffusion)
    - ``squaredcos_cap_v2``: 1 - f(i + 1) / f(i), at most 0.999, with f(i) = cos((i / T + 0.008) / 1.008 pi / 2)^2,
      without ``start`` and ``end`` (improved DDPM, MAR)

    Raises:
        ValueError: an unknown name, or betas outside (0, 1).
    """
    if schedule not in BETA_SCHEDULES:
        raise ValueError(f"Unknown beta schedule {schedule!r}; choose one of {', '.join(BETA_SCHEDULES)}.")
    if schedule == "squaredcos_cap_v2":
        f = [math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_steps + 1)]
        return np.array([min(1 - after / before, _MAX_BETA) for before, after in zip(f, f[1:])])
    if not 0 < start <= end < 1:
        raise ValueError(f"Betas must satisfy 0 < beta_start <= beta_end < 1, got {start} and {end}.")
    if schedule == "linear":
        return np.linspace(start, end, num_steps, dtype=np.float64)
    return np.linspace(start**0.5, end**0.5, num_steps, dtype=np.float64) ** 2


def respaced_timesteps(respacing: str, num_train_timesteps: int) -> list[int]:
    """The ascending timesteps that a respacing of the published samplers keeps.

    Args:
        respacing: ``"250"``, so many evenly spaced ones, first and last included; ``"10,15,20"``, so many of each of
            equal sections (``"8,0"``: eight of the lower half); or ``"ddim50"``, every k-th from 0 with the smallest k
            that gives exactly so many.
        num_train_timesteps: T.

    Raises:
        ValueError: the text is none of these, or asks for more timesteps than there are.
    """
    count = respacing.removeprefix("ddim")
    if count != respacing and count.isdecimal():
        for stride in range(1, num_train_timesteps + 1):
            if len(range(0, num_train_timesteps, stride)) == int(count):
                return list(range(0, num_train_timesteps, stride))
        raise ValueError(
            f"No integer stride through {num_train_timesteps} timesteps makes {count} of them, as {respacing!r} asks "
            f"for; use a divisor of {num_train_timesteps}, or {count!r} for even spacing."
        )
    parts = [part.strip() for part in respacing.split(",")]
    if not all(part.isdecimal() for part in parts) or not any(map(int, parts)):
        raise ValueError(
            f"Unknown respacing {respacing!r}; expected '250', a count per section '10,15,20', or 'ddim50'."
        )
    size, extra = divmod(num_train_timesteps, len(parts))
    kept, start = [], 0
    for section, count in enumerate(map(int, parts)):
        length = size + (section < extra)
        if count > length:
            raise ValueError(
                f"Respacing {respacing!r} takes {count} of {length} timesteps in section {section}; it can take at "
                "most all of them."
            )
        # The published samplers add the stride up in floating point and round the sums, halves to even.
        stride, position = (length - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def spaced_timesteps(spacing: str, num_steps: int, num_train_timesteps: int) -> list[int]:
    """``num_steps`` ascending timesteps, under the names of diffusers.

    - ``linspace``: even, first and last included, as the respacing ``"N"``; a single one is the last
    - ``leading``: multiples of T // N from 0
    - ``trailing``: even from the last one down, which is the right one for few steps (arXiv 2305.08891)

    Raises:
        ValueError: fewer than one or more than T steps.
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be between 1 and the {num_train_timesteps} training timesteps, got {num_steps}."
        )
    if spacing == "leading":
        return [step * (num_train_timesteps // num_steps) for step in range(num_steps)]
    if spacing == "trailing" or num_steps == 1:
        stride = num_train_timesteps / num_steps
        return [round(num_train_timesteps - stride * step) - 1 for step in reversed(range(num_steps))]
    return respaced_timesteps(str(num_steps), num_train_timesteps)


class GaussianDiffusion:
    """Tables of one process and what can be computed from them.

    Methods take an ``index`` of its steps: an int for all samples, or (B,) int64 with one for each.

    Args:
        betas: (T,) float64 in (0, 1).
    """

    def __init__(self, betas: np.ndarray) -> None:
        alphas_cumprod = np.cumprod(1 - betas)
        previous = np.append(1.0, alphas_cumprod[:-1])
        variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # The posterior of the first step has no variance; its logarithm is that of the second one.
        clipped = np.append(variance[1:2] if len(betas) > 1 else betas, variance[1:])
        self.betas = torch.from_numpy(betas)
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod)
        self.alphas_cumprod_prev = torch.from_numpy(previous)
        self._posterior_log_variance = torch.from_numpy(np.log(clipped))
        self._large_log_variance = torch.from_numpy(np.log(np.append(clipped[:1], betas[1:])))
        self._log_betas = self.betas.log()
        self._signal, self._noise = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self._inverse_signal = (1 / self.alphas_cumprod).sqrt()
        self._inverse_noise = (1 / self.alphas_cumprod - 1).sqrt()
        self._x0_weight = torch.from_numpy(betas * np.sqrt(previous) / (1 - alphas_cumprod))
        self._sample_weight = torch.from_numpy((1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod))

    def __len__(self) -> int:
        return len(self.betas)

    def respaced(self, timesteps: Sequence[int]) -> GaussianDiffusion:
        """The process that visits only some timesteps (ascending), with the same marginals."""
        kept = self.alphas_cumprod[list(timesteps)].numpy()
        return GaussianDiffusion(1 - kept / np.append(1.0, kept[:-1]))

    def add_noise(self, x0: Tensor, noise: Tensor, index: int | Tensor) -> Tensor:
        """x_t of clean samples and noise."""
        return _at(self._signal, index, x0) * x0 + _at(self._noise, index, x0) * noise

    def target(self, prediction_type: str, x0: Tensor, noise: Tensor, index: int | Tensor) -> Tensor:
        """What a network learns: the noise, x_0, or v = sqrt(abar) noise - sqrt(1 - abar) x_0 (arXiv 2202.00512)."""
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "sample":
            return x0
        return _at(self._signal, index, x0) * noise - _at(self._noise, index, x0) * x0

    def to_x0(self, prediction_type: str, prediction: Tensor, sample: Tensor, index: int | Tensor) -> Tensor:
        """x_0 of a prediction at ``sample`` = x_t."""
        if prediction_type == "sample":
            return prediction
        if prediction_type == "epsilon":
            scale, share = _at(self._inverse_signal, index, sample), _at(self._inverse_noise, index, sample)
        else:
            scale, share = _at(self._signal, index, sample), _at(self._noise, index, sample)
        return scale * sample - share * prediction

    def to_epsilon(self, x0: Tensor, sample: Tensor, index: int | Tensor) -> Tensor:
        """The noise in ``sample`` = x_t if the clean sample is ``x0``."""
        inverse_noise = _at(self._inverse_noise, index, sample)
        return (_at(self._inverse_signal, index, sample) * sample - x0) / inverse_noise

    def posterior(self, x0: Tensor, sample: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0), both like ``sample``."""
        mean = _at(self._x0_weight, index, sample) * x0 + _at(self._sample_weight, index, sample) * sample
        return mean, torch.zeros_like(mean) + _at(self._posterior_log_variance, index, sample)

    def large_log_variance(self, sample: Tensor, index: int | Tensor) -> Tensor:
        """log beta like ``sample``, which for the first step is that of the posterior of the second one."""
        return torch.zeros_like(sample) + _at(self._large_log_variance, index, sample)

    def learned_log_variance(self, variance: Tensor, index: int | Tensor) -> Tensor:
        """The log variance between that of the posterior (-1) and log beta (1) (arXiv 2102.09672, eq. 15)."""
        share = (variance + 1) / 2
        low, high = _at(self._posterior_log_variance, index, variance), _at(self._log_betas, index, variance)
        return share * high + (1 - share) * low

    def snr(self, index: int | Tensor) -> Tensor:
        """(B,) float32 on the device of ``index``, abar / (1 - abar); a scalar for an int."""
        ratio = (self.alphas_cumprod / (1 - self.alphas_cumprod)).float()
        return ratio[index] if isinstance(index, int) else ratio.to(index.device)[index]


def _at(table: Tensor, index: int | Tensor, like: Tensor) -> float | Tensor:
    """The entry of a float64 table for all of ``like``, or one for each row of it."""
    if isinstance(index, int):
        return table[index].item()  # meets a float32 tensor as a float32 number
    return table.float().to(like.device)[index].view(-1, *[1] * (like.ndim - 1))
