"""How well decoders do against the noise in their latents: the numbers, their picture and their table."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from hfgen.counters import generator
from hfgen.evaluation.reconstruction import psnr
from hfgen.training.noisy_latents import add_noise


def noisy_latents(latents: Tensor, sigma: float, noise_type: str, seed: int) -> Tensor:
    """Latents (N, C, h, w) with noise that is a function of the seed alone: every sigma has the same draws."""
    noise = torch.randn(latents.shape, generator=generator(seed)).to(latents)
    return add_noise(latents, noise, sigma, noise_type)


def psnr_against_noise(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    pixels: Tensor,
    sigmas: Sequence[float],
    *,
    noise_type: str,
    batch_size: int,
    seed: int,
) -> list[float]:
    """The mean PSNR in dB of what a decoder makes of noisy latents; every sigma has the same draws.

    Args:
        decode: latents (B, C, h, w) -> pixels (B, 3, H, W).
        latents: (N, C, h, w) without noise.
        pixels: (N, 3, H, W) in [-1, 1], the images of the latents.
        sigmas: of the noise.
        noise_type: see :func:`hfgen.training.noisy_latents.add_noise`.
        batch_size: images at a time.
        seed: of the noise.
    """
    means = []
    for sigma in sigmas:
        noisy = noisy_latents(latents, sigma, noise_type, seed).split(batch_size)
        values = [psnr(decode(part).clamp(-1, 1), real) for part, real in zip(noisy, pixels.split(batch_size))]
        means.append(torch.cat(values).mean().item())
    return means


def noise_table(sigmas: Sequence[float], curves: Mapping[str, Sequence[float]]) -> str:
    """A Markdown table with a row for each noise level and a column for each curve, in dB."""
    lines = [f"| sigma | {' | '.join(curves)} |", "|---" * (1 + len(curves)) + "|"]
    for sigma, *values in zip(sigmas, *curves.values(), strict=True):
        lines.append(f"| {sigma:g} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines) + "\n"


def draw_noise_curves(sigmas: Sequence[float], curves: Mapping[str, Sequence[float]], trained: float) -> Image.Image:
    """The picture of the same numbers, with a mark at the noise that was trained on."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, values in curves.items():
        style = "--" if name.startswith("before") else "-"
        axes.plot(sigmas, values, f"o{style}", color="C1" if "codes" in name else "C0", markersize=3, label=name)
    axes.axvline(trained, color="grey", linewidth=0.8, label="trained on")
    axes.set_xlabel("standard deviation of the noise in the latents")
    axes.set_ylabel("PSNR of the decoded images (dB)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return Image.open(file).convert("RGB")
