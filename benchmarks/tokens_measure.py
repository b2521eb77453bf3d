"""What the tokenizers and pipelines of docs/tokens.md reach on unseen images, and their pictures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hfgen import MaskGITPipeline
from hfgen.counters import generator
from hfgen.data.shapes import CLASS_NAMES
from hfgen.data.sources import load_images
from hfgen.data.transforms import to_pixels
from hfgen.evaluation.judge import judge_labels
from hfgen.evaluation.reconstruction import reconstruction_metrics
from hfgen.images import make_grid, save_png
from hfgen.models.modeling import HFGenModel

BATCH = 48
SHOWN = 12  # images in a row of a picture
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def unseen_images(count: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, 32, 32) in [-1, 1] and labels (B,) of the test split."""
    data = load_images("shapes", resolution=32, split="test", limit=count)
    items = [data[(0, index)] for index in range(len(data))]
    labels = torch.tensor([int(item["label"]) for item in items])
    return to_pixels(torch.stack([item["pixels"] for item in items])), labels


@torch.no_grad()
def reconstruct(tokenizer: HFGenModel, pixels: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Reconstructions in [-1, 1], and their PSNR (dB), SSIM, code perplexity and judge accuracy of the class."""
    outputs = [tokenizer(part) for part in pixels.split(BATCH)]
    samples, codes = (torch.cat([output[name] for output in outputs]) for name in ("sample", "codes"))
    samples = samples.clamp(-1, 1)
    metrics = reconstruction_metrics(samples, pixels, codes=codes, num_codes=tokenizer.codebook_size)
    return samples, {
        "tokens": tokenizer.num_tokens,
        "parameters": sum(each.numel() for each in tokenizer.parameters()),
        "psnr": metrics["psnr"],
        "ssim": metrics["ssim"],
        "judge": judge_labels(samples, labels)["label"],
        "perplexity": metrics["perplexity"],
    }


def sample(
    pipe: MaskGITPipeline, steps: int, per_class: int, seed: int, advance: Callable[[int], object]
) -> tuple[Tensor, dict[str, float]]:
    """``per_class`` images of every class, class by class in turns: pixels in [-1, 1], judge accuracy and CPU time.

    Noise depends on the seed and the number of the image alone. The milliseconds are those of all CPU threads per
    image, the median over batches of :data:`BATCH` images.
    """
    labels = torch.arange(len(CLASS_NAMES)).repeat(per_class)
    images, seconds = [], []
    for part in torch.arange(len(labels)).split(BATCH):
        start = time.process_time()
        output = pipe(
            labels[part].tolist(),
            num_inference_steps=steps,
            generator=[generator(seed, index) for index in part.tolist()],
            output_type="pt",
        )
        seconds.append((time.process_time() - start) / len(part))
        images.append(output.images * 2 - 1)
        advance(len(part))
    pixels = torch.cat(images)
    row = {"steps": steps, "nfe": output.nfe, "judge": judge_labels(pixels, labels)["label"]}
    return pixels, row | {"milliseconds": 1000 * statistics.median(seconds)}


def save_rows(rows: Sequence[Tensor], path: Path) -> None:
    """A picture with the first images of each batch (B, 3, H, W) in a row."""
    tiles = torch.cat([row[:SHOWN] for row in rows])
    save_png(make_grid(tiles, columns=len(rows[0][:SHOWN]), upscale=2), path)


def save_curves(panels: Mapping[str, Lines], horizontal: str, path: Path) -> None:
    """A picture of lines by title and legend text, over a horizontal axis that doubles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.0), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for position, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), position + 1)
        for label, (x, y) in lines.items():
            axes.plot(x, y, "o-", markersize=4, label=label)
        ticks = sorted({value for x, _ in lines.values() for value in x})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(horizontal, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    canvas.draw()
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
