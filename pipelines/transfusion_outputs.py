"""What the Transfusion pipeline returns beside images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class MixedOutput(BaseOutput):
    """A sequence of texts and images.

    Attributes:
        parts: in order, texts and images; images as ``output_type`` asks: PIL, numpy (H, W, 3), tensors (3, H, W) in
            [0, 1], or latents.
        nfe: passes of the transformer: one for each token of text, and those of the images.
    """

    parts: list[Any]
    nfe: int


@dataclass
class CaptionOutput(BaseOutput):
    """Texts about images.

    Attributes:
        texts: one per image.
        nfe: passes of the transformer for the text, as many as the longest has tokens.
    """

    texts: list[str]
    nfe: int
