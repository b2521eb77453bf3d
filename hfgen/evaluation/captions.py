"""How well images show what their captions say, read by the analytic judge of the captioned shapes.

The objects of a caption are looked for in the cells that it names: all but one cell of the 3x3 grid is painted over
with the background, and the judge reads what remains. So each object of an image with two is read by itself, and a
right attribute at the wrong object is an error of binding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfgen.data.shapes import CELL_PHRASES, COLOURS, SHAPES, SIZES
from hfgen.data.transforms import to_pixels
from hfgen.evaluation.judge import ShapesReading, border_median, judge_shapes

_ATTRIBUTES = ("shape", "colour", "size", "cell")
_PHRASE = re.compile(
    rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) "
    rf"({'|'.join(sorted(CELL_PHRASES, key=len, reverse=True))})"
)


@dataclass(frozen=True)
class CaptionedObject:
    """The attributes of an object as indices into the names in ``hfgen.data.shapes``."""

    shape: int
    colour: int
    size: int
    cell: int


def parse_caption(caption: str) -> list[CaptionedObject]:
    """The objects of a caption such as "a small red circle at the top left and a large blue cross in the centre".

    Raises:
        ValueError: for a caption that is not built from the phrases of ``hfgen.data.shapes``.
    """
    objects = []
    for phrase in caption.split(" and "):
        match = _PHRASE.fullmatch(phrase)
        if match is None:
            raise ValueError(
                f"caption {caption!r} is none of the captioned shapes: expected phrases such as 'a small red circle "
                "at the top left', joined by ' and '"
            )
        size, colour, shape, cell = match.groups()
        objects.append(
            CaptionedObject(SHAPES.index(shape), COLOURS.index(colour), SIZES.index(size), CELL_PHRASES.index(cell))
        )
    return objects


def judge_captions(pixels: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """How well images show the captions that they were made for.

    Args:
        pixels: float ``(B, 3, H, W)`` in [-1, 1], or uint8.
        captions: B captions of one or two objects.

    Returns:
        Of images of one object the share with the right ``shape``, ``colour``, ``size``, ``cell``, with all four,
        ``object``, and with any object, ``found``. Of images of two objects: ``pair_shape``, ``pair_colour``,
        ``pair_size`` and ``pair_object``, the shares of objects with the right attribute, or with all three, in their
        cells; and ``pair``, the share of images where both objects are right. A kind of captions that there is none of
        has no values.

    Raises:
        ValueError: another number of captions, or one that is none of the captioned shapes.
    """
    if len(captions) != len(pixels):
        raise ValueError(f"got {len(captions)} captions for {len(pixels)} images: give one per image")
    objects = [parse_caption(caption) for caption in captions]
    pixels = to_pixels(pixels) if pixels.dtype == torch.uint8 else pixels.float()
    single = [row for row, each in enumerate(objects) if len(each) == 1]
    double = [row for row, each in enumerate(objects) if len(each) == 2]
    values = {}
    if single:
        reading = judge_shapes(pixels[single])
        right = _right(reading, [objects[row][0] for row in single])
        values |= {name: _share(right[name]) for name in _ATTRIBUTES}
        values |= {"object": _share(torch.stack(list(right.values())).all(dim=0)), "found": _share(reading.found)}
    if double:
        expected = [each for row in double for each in objects[row]]
        rows = torch.tensor(double).repeat_interleave(2)
        cells = torch.tensor([each.cell for each in expected])
        reading = judge_shapes(isolate_cells(pixels[rows.to(pixels.device)], cells))
        right = _right(reading, expected)
        correct = torch.stack(list(right.values())).all(dim=0)
        values |= {f"pair_{name}": _share(right[name]) for name in ("shape", "colour", "size")}
        values |= {"pair_object": _share(correct), "pair": _share(correct.view(-1, 2).all(dim=1))}
    return values


def isolate_cells(pixels: Tensor, cells: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)`` with all but one cell, int64 ``(B,)`` in row-major order, in the background's colour."""
    height, width = pixels.shape[-2:]
    cells = cells.to(pixels.device)
    row = (torch.arange(height, device=pixels.device) + 0.5) * 3 / height
    column = (torch.arange(width, device=pixels.device) + 0.5) * 3 / width
    in_row = row.floor()[None] == (cells // 3)[:, None]  # (B, H)
    in_column = column.floor()[None] == (cells % 3)[:, None]
    inside = in_row[:, None, :, None] & in_column[:, None, None, :]
    return torch.where(inside, pixels, border_median(pixels)[:, :, None, None])


def _right(reading: ShapesReading, expected: Sequence[CaptionedObject]) -> dict[str, Tensor]:
    """By attribute, bool ``(N,)``: whether the object that was read has it."""
    return {
        name: getattr(reading, name).cpu() == torch.tensor([getattr(each, name) for each in expected])
        for name in _ATTRIBUTES
    }


def _share(matches: Tensor) -> float:
    return matches.float().mean().item()
