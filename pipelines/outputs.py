"""What the image pipelines return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput


@dataclass
class ImageGenerationOutput(BaseOutput):
    """Generated images.

    Attributes:
        images: a list of PIL images, a numpy array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or latents, as
            ``output_type`` asks.
        nfe: forward passes of the generator for each image.
    """

    images: Any
    nfe: int
