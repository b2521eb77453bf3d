"""Pictures out of pixel tensors: grids, strips, reconstructions side by side, and files that appear complete.

Images are float pixels in [-1, 1], ``(B, 3, H, W)`` or a list of ``(3, H, W)``, or uint8 tensors of these shapes.
Float pixels become uint8 by the rounding rule of :func:`hfgen.data.transforms.to_uint8`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from hfgen.data.transforms import to_uint8

_FONT_SIZE = 10


def to_numpy(images: torch.Tensor | Sequence[torch.Tensor], rounding: str = "round") -> np.ndarray:
    """Images as a uint8 array ``(B, H, W, 3)``; a single channel is repeated.

    Raises:
        ValueError: if the images are not ``(B, 3, H, W)`` or ``(B, 1, H, W)``, or for an unknown rounding rule.
    """
    if not isinstance(images, torch.Tensor):
        images = torch.stack(list(images))
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, H, W)")
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        images = to_uint8(images, rounding)
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def make_grid(
    images: torch.Tensor | Sequence[torch.Tensor],
    *,
    columns: int | None = None,
    padding: int = 2,
    upscale: int = 1,
    labels: Sequence[str] | None = None,
    rounding: str = "round",
) -> Image.Image:
    """Tiles images in reading order on white.

    Args:
        columns: images per row; by default the grid is about square.
        padding: white pixels between and around the tiles.
        upscale: whole factor by which pixels are repeated, to show tiny images.
        labels: one text per image, written under its tile in as many lines as it needs.

    Raises:
        ValueError: if there are no images, for a column count or factor below 1, or if the labels are of another
            number than the images.
    """
    tiles = to_numpy(images, rounding)
    count, height, width = tiles.shape[:3]
    columns = int(np.ceil(np.sqrt(count))) if columns is None else columns
    if count < 1 or columns < 1 or upscale < 1 or padding < 0:
        raise ValueError(
            f"a grid needs at least one image, column and upscale factor and no negative padding; got {count} images, "
            f"columns={columns}, upscale={upscale}, padding={padding}"
        )
    if labels is not None and len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} images: pass one label per image")
    tiles = tiles.repeat(upscale, axis=1).repeat(upscale, axis=2)
    height, width = height * upscale, width * upscale

    font = ImageFont.load_default(_FONT_SIZE)
    texts = [_wrap(label, font, width) for label in labels] if labels is not None else []
    line_height = _FONT_SIZE + 2
    text_height = line_height * max((len(lines) for lines in texts), default=0)
    rows = -(-count // columns)
    step_x, step_y = width + padding, height + text_height + padding
    grid = Image.new("RGB", (columns * step_x + padding, rows * step_y + padding), "white")
    draw = ImageDraw.Draw(grid)
    for index, tile in enumerate(tiles):
        x, y = padding + index % columns * step_x, padding + index // columns * step_y
        grid.paste(Image.fromarray(tile), (x, y))
        for number, line in enumerate(texts[index] if texts else ()):
            draw.text((x, y + height + number * line_height), line, fill="black", font=font)
    return grid


def make_strip(
    images: torch.Tensor | Sequence[torch.Tensor],
    *,
    padding: int = 2,
    upscale: int = 1,
    labels: Sequence[str] | None = None,
    rounding: str = "round",
) -> Image.Image:
    """All images in one row, for example the stages of one sample."""
    return make_grid(images, columns=len(images), padding=padding, upscale=upscale, labels=labels, rounding=rounding)


def make_comparison(
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    *,
    columns: int = 8,
    padding: int = 2,
    upscale: int = 1,
    rounding: str = "round",
) -> Image.Image:
    """Rows of inputs, each with the row of their reconstructions below it; the last row may be shorter."""
    if inputs.shape != outputs.shape:
        raise ValueError(f"inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)} must have equal shapes")
    inputs, outputs = to_numpy(inputs, rounding), to_numpy(outputs, rounding)
    columns = min(columns, len(inputs))
    blank = np.full((-len(inputs) % columns, *inputs.shape[1:]), 255, dtype=np.uint8)
    pairs = [np.concatenate([images, blank]).reshape(-1, columns, *images.shape[1:]) for images in (inputs, outputs)]
    tiles = torch.from_numpy(np.stack(pairs, axis=1).reshape(-1, *inputs.shape[1:])).permute(0, 3, 1, 2)
    return make_grid(tiles, columns=columns, padding=padding, upscale=upscale)


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Writes a PNG; the file has its name only once it is complete. Missing folders are made."""
    return _write_atomically(path, ".png", lambda file: image.save(file, format="PNG"))


def save_npz(images: torch.Tensor | Sequence[torch.Tensor], path: str | Path, *, rounding: str = "round") -> Path:
    """Writes images as ``arr_0``, uint8 ``(B, H, W, 3)``, the file that ADM's evaluator reads.

    Args:
        images: float pixels in [-1, 1] or uint8.
        rounding: ``"round"``, ``"truncate"`` or ``"adm"``; scores depend on it, so state it beside them.
    """
    array = to_numpy(images, rounding)
    return _write_atomically(path, ".npz", lambda file: np.savez(file, arr_0=array))


def _write_atomically(path: str | Path, suffix: str, write: Callable[[BinaryIO], None]) -> Path:
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"path {str(path)!r} must end in {suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
