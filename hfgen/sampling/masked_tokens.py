"""Rules of masked-token generation: how many tokens stay masked, which ones, and the noise of both draws.

Masked generators start from a sequence of mask tokens, draw all of them in every step, keep those of which they are
most confident and mask the others again (MaskGIT, Chang et al., arXiv 2202.04200, section 3.2). In training a random
set of tokens is masked (section 3.1).

Legend: B images, N tokens, M masked tokens of the image that has most, V codes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from hfgen.sampling.logits import Generators, exponential_draws

MASK_SCHEDULES = ("cosine", "arccos", "linear", "square", "cubic", "root", "log", "exp")
ANNEALINGS = ("constant", "linear", "ramp", "product")
CONFIDENCES = ("log-probability", "logit", "random")

_POWERS = {"linear": 1.0, "square": 2.0, "cubic": 3.0, "root": 0.5}
_MIN_RATIO = 1e-6


def mask_ratio(schedule: str, progress: Tensor, num_tokens: int) -> Tensor:
    """The share of tokens that is masked, which falls from 1 to 0 with the progress r.

    - ``cosine``: cos(pi r / 2) (MaskGIT, Muse)
    - ``arccos``: arccos(r) / (pi / 2) (TiTok)
    - ``linear``, ``square``, ``cubic``, ``root`` and ``powX`` for a number X: 1 - r^X with X = 1, 2, 3, 0.5
    - ``log``: -log2(r) / log2(num_tokens)
    - ``exp``: 1 - num_tokens^(r - 1)

    Args:
        schedule: its name.
        progress: float tensor in [0, 1], of any shape: the share of the steps that are done, or in training a uniform
            draw for each image.
        num_tokens: tokens to draw in all, which two of the schedules depend on.

    Returns:
        A tensor like ``progress``, in [1e-6, 1].

    Raises:
        ValueError: unknown name.
    """
    power = _power(schedule)
    if power is not None:
        ratio = 1 - progress**power
    elif schedule == "cosine":
        ratio = torch.cos(progress * (math.pi / 2))
    elif schedule == "arccos":
        ratio = torch.arccos(progress) / (math.pi / 2)
    elif schedule == "log":
        ratio = -torch.log2(progress) / math.log2(max(num_tokens, 2))
    else:
        ratio = 1 - torch.exp2(-math.log2(max(num_tokens, 2)) * (1 - progress))
    return ratio.clamp(_MIN_RATIO, 1.0)


def check_mask_schedule(schedule: str) -> None:
    """Raises ``ValueError`` unless :func:`mask_ratio` knows the name."""
    _power(schedule)


def _power(schedule: str) -> float | None:
    """The exponent of a schedule 1 - r^X, None for the others."""
    found = re.fullmatch(r"pow(\d+(?:\.\d+)?)", schedule)
    if found and float(found[1]) > 0:
        return float(found[1])
    if schedule not in MASK_SCHEDULES:
        raise ValueError(f"Unknown mask schedule {schedule!r}; choose one of {', '.join(MASK_SCHEDULES)} or 'powX'.")
    return _POWERS.get(schedule)


def anneal(annealing: str, temperature: float, num_steps: int) -> list[float]:
    """The temperature of each step t of T.

    - ``constant``: as it is
    - ``linear``: times 1 - (t + 1) / T, so that the last step is free of noise (MaskGIT's choice, TiTok)
    - ``ramp``: times 1 - t / (T - 1), from the full temperature to zero (aMUSEd)
    - ``product``: times the product of 1 - (i + 1) / T over the steps i up to t (Show-o, open-muse)

    Raises:
        ValueError: unknown name.
    """
    if annealing not in ANNEALINGS:
        raise ValueError(f"Unknown annealing {annealing!r}; choose one of {', '.join(ANNEALINGS)}.")
    if annealing == "constant":
        return [temperature] * num_steps
    if annealing == "ramp":
        return [temperature * (1 - step / max(num_steps - 1, 1)) for step in range(num_steps)]
    remaining = [1 - (step + 1) / num_steps for step in range(num_steps)]
    if annealing == "product":
        remaining = [math.prod(remaining[: step + 1]) for step in range(num_steps)]
    return [temperature * share for share in remaining]


def masked_positions(codes: Tensor, mask_token_id: int, num_positions: int) -> Tensor:
    """Where the masked tokens are.

    Args:
        codes: (B, N) int64.
        mask_token_id: id of a masked token.
        num_positions: M; it is given so that nothing is read back from the device.

    Returns:
        (B, M) int64, ascending positions of masked tokens, then those of other tokens if an image has fewer.
    """
    return (codes != mask_token_id).to(torch.uint8).argsort(dim=1, stable=True)[:, :num_positions]


def confidence_of(rule: str, logits: Tensor, codes: Tensor) -> Tensor:
    """How sure the network is of drawn codes, (B, M) float.

    Args:
        rule: ``log-probability`` (MaskGIT, Muse, Show-o), ``logit`` (TiTok), or ``random``: all the same, so that
            the noise alone decides.
        logits: (B, M, V) that the codes were drawn from.
        codes: (B, M) int64.
    """
    if rule not in CONFIDENCES:
        raise ValueError(f"Unknown confidence rule {rule!r}; choose one of {', '.join(CONFIDENCES)}.")
    if rule == "random":
        return logits.new_zeros(codes.shape)
    drawn = logits.gather(-1, codes[..., None]).squeeze(-1)
    return drawn if rule == "logit" else drawn - logits.logsumexp(dim=-1)


def lowest(confidence: Tensor, counts: Tensor) -> Tensor:
    """(B, M) boolean: the ``counts`` (B,) least confident entries of each row of ``confidence`` (B, M)."""
    ranks = confidence.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts[:, None]


def gumbel_draws(
    counts: Sequence[int], shape: Sequence[int], generator: Generators, device: torch.device | str
) -> Tensor:
    """Standard Gumbel noise (B, M, *shape) float32 for ``counts[i]`` masked tokens of image i.

    With a list of generators each image draws for its own tokens only, so that it does not depend on the other images
    of its batch; what is missing to M, the largest count, is zero.
    """
    if not isinstance(generator, Sequence):
        return -exponential_draws((len(counts), max(counts), *shape), generator, device).log()
    if len(generator) != len(counts):
        raise ValueError(f"Got {len(generator)} generators for a batch of {len(counts)}; give one per image.")
    noise = torch.zeros(len(counts), max(counts), *shape, device=device)
    for row, (count, one) in enumerate(zip(counts, generator)):
        noise[row, :count] = -exponential_draws((count, *shape), one, device).log()
    return noise


def random_token_mask(ratio: Tensor, draws: Tensor) -> Tensor:
    """Tokens to mask in training: round(N * ratio) random ones of each image, at least one.

    Args:
        ratio: (B,) float in [0, 1].
        draws: (B, N) uniform draws that decide which ones.

    Returns:
        (B, N) boolean.
    """
    num_tokens = draws.shape[1]
    counts = (num_tokens * ratio).round().clamp(min=1)
    # A random permutation is compared with the count, as in the published training code; any other would do.
    return draws.argsort(dim=-1) < counts[:, None]
