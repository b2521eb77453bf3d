"""How well written captions of the captioned shapes name what is in the scenes.

A written caption need not be well formed: an attribute is read from the words of the phrase that should name it. The
order of two objects cannot be seen in an image, so written objects are compared in the order that fits better.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import permutations

from hfgen.data.shapes import CELL_PHRASES, COLOURS, SHAPES, SIZES
from hfgen.evaluation.captions import CaptionedObject, parse_caption

ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "cell": CELL_PHRASES}


def caption_accuracy(written: Sequence[str], captions: Sequence[str]) -> dict[str, float]:
    """The attributes that written captions name right.

    Args:
        written: N texts, one about each image.
        captions: N captions of one or two objects that the images were drawn from.

    Returns:
        Of images of one object the share of written captions with the right ``shape``, ``colour``, ``size``, ``cell``,
        the mean of these four, ``attributes``, and the share with all of them, ``object``. Of images of two objects
        the same by object, ``pair_shape`` and so on, and ``pair``, the share of captions with both objects right. And
        ``objects``, the share of all captions that speak of as many objects as there are. Kinds of captions that there
        is none of have no values.

    Raises:
        ValueError: another number of texts, or a caption that is none of the captioned shapes.
    """
    if len(written) != len(captions):
        raise ValueError(f"got {len(written)} written texts for {len(captions)} captions: give one per image")
    counted, right = [], {1: [], 2: []}
    for text, caption in zip(written, captions):
        expected, phrases = parse_caption(caption), text.split(" and ")
        counted.append(len(phrases) == len(expected))
        right[len(expected)].append(_right(phrases, expected))
    values = {}
    for rows, prefix in ((right[1], ""), (right[2], "pair_")):
        objects = [each for row in rows for each in row]
        if not objects:
            continue
        shares = {name: _mean([each[name] for each in objects]) for name in ATTRIBUTES}
        values |= {f"{prefix}{name}": share for name, share in shares.items()}
        values[f"{prefix}attributes"] = _mean(list(shares.values()))
        values[f"{prefix}object"] = _mean([all(each.values()) for each in objects])
    if right[2]:
        values["pair"] = _mean([all(all(each.values()) for each in row) for row in right[2]])
    return values | ({"objects": _mean(counted)} if counted else {})


def _right(phrases: Sequence[str], expected: Sequence[CaptionedObject]) -> list[dict[str, bool]]:
    """For each object the attributes that its phrase names right; phrases beyond the objects are not looked at."""
    found = [_read(phrase) for phrase in phrases[: len(expected)]]
    found += [{}] * (len(expected) - len(found))
    orders = [
        [{name: read.get(name) == getattr(each, name) for name in ATTRIBUTES} for read, each in zip(order, expected)]
        for order in permutations(found)
    ]
    return max(orders, key=lambda order: sum(sum(each.values()) for each in order))


def _read(phrase: str) -> dict[str, int]:
    """The attributes that a phrase names exactly once, as indices."""
    read = {}
    for name, words in ATTRIBUTES.items():
        # Longer ones first: "at the top left" is not "at the top".
        longest_first = sorted(words, key=len, reverse=True)
        named = re.findall(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", phrase)
        if len(named) == 1:
            read[name] = words.index(named[0])
    return read


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
