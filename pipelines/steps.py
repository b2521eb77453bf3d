"""The steps of masked-token and rectified-flow pipelines as pictures."""

from __future__ import annotations

import os
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from hfgen.images import to_numpy


class ImageRecorder(PipelineCallback, ABC):
    """Keeps something of every step of a pipeline, for pictures of how images come about."""

    def __init__(self) -> None:
        super().__init__(cutoff_step_ratio=1.0)

    @abstractmethod
    def frames(self, pipeline: Any, index: int = 0) -> list[PIL.Image.Image]:
        """One picture per step of the image ``index`` of the batch.

        Raises:
            ValueError: nothing was recorded, or there is no such image.
        """

    def save_gif(
        self, pipeline: Any, path: str | Path, *, index: int = 0, milliseconds: int = 200, upscale: int = 1
    ) -> Path:
        """Write the frames as an animated GIF that stays longer on the last one; the file appears complete.

        Args:
            pipeline: the one that was recorded.
            path: ends in ``.gif``; missing folders are made.
            index: of the image in its batch.
            milliseconds: of a frame.
            upscale: whole factor by which pixels are repeated, to show tiny images.

        Raises:
            ValueError: another suffix, a factor or time below 1, or nothing was recorded.
        """
        path = Path(path)
        if path.suffix != ".gif":
            raise ValueError(f"path {str(path)!r} must end in .gif")
        if upscale < 1 or milliseconds < 1:
            raise ValueError(f"upscale and milliseconds must be at least 1, got {upscale} and {milliseconds}.")
        frames = self.frames(pipeline, index)
        size = tuple(side * upscale for side in frames[0].size)
        first, *others = (frame.resize(size, PIL.Image.Resampling.NEAREST) for frame in frames)
        durations = [milliseconds] * len(others) + [5 * milliseconds]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(temporary, "wb") as file:
                first.save(file, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


class StepRecorder(ImageRecorder):
    """Keeps the tokens of every step of a masked-token pipeline.

    ::

        recorder = StepRecorder()
        pipe("red circle", callback_on_step_end=recorder)
        recorder.save_gif(pipe, "steps.gif")

    Attributes:
        codes: (B, N) int64 for each step, with the tokens that stay masked after it.
        predicted_codes: (B, N) int64 for each step, without masked tokens.
    """

    tensor_inputs = ["codes", "predicted_codes"]

    def __init__(self) -> None:
        super().__init__()
        self.codes: list[Tensor] = []
        self.predicted_codes: list[Tensor] = []

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: int, callback_kwargs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Called by the pipeline; the record of an earlier call is dropped."""
        if step_index == 0:
            self.codes, self.predicted_codes = [], []
        self.codes.append(callback_kwargs["codes"])
        self.predicted_codes.append(callback_kwargs["predicted_codes"])
        return callback_kwargs

    @torch.no_grad()
    def frames(self, pipeline: Any, index: int = 0) -> list[PIL.Image.Image]:
        """One picture per step of the image ``index`` of the batch.

        Left is the image of all predicted tokens. If the tokens are a grid, right is the same with those that are
        masked again in grey.

        Raises:
            ValueError: nothing was recorded, or there is no such image.
        """
        _check_recorded(self.codes, index)
        predicted = torch.stack([codes[index] for codes in self.predicted_codes])
        images = pipeline.decode_latents(predicted).float()
        grid = pipeline.grid_size
        if grid is not None:
            masked = torch.stack([codes[index] for codes in self.codes]) == pipeline.transformer.mask_token_id
            masked = F.interpolate(masked.unflatten(1, (1, *grid)).float(), images.shape[-2:])
            images = torch.cat([images, images.masked_fill(masked.bool(), 0.0)], dim=-1)
        return [PIL.Image.fromarray(np.ascontiguousarray(frame)) for frame in to_numpy(images)]


class DenoisedRecorder(ImageRecorder):
    """Keeps the image that every step of a rectified-flow pipeline points to.

    ::

        recorder = DenoisedRecorder()
        pipe("red circle", callback_on_step_end=recorder)
        recorder.save_gif(pipe, "steps.gif")

    Attributes:
        denoised: (B, C, h, w) float32 for each pass of the network, latents or pixels.
    """

    tensor_inputs = ["denoised"]

    def __init__(self) -> None:
        super().__init__()
        self.denoised: list[Tensor] = []

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: int, callback_kwargs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Called by the pipeline; the record of an earlier call is dropped."""
        if step_index == 0:
            self.denoised = []
        self.denoised.append(callback_kwargs["denoised"])
        return callback_kwargs

    @torch.no_grad()
    def frames(self, pipeline: Any, index: int = 0) -> list[PIL.Image.Image]:
        """One picture per pass of the image ``index`` of the batch, decoded one by one: they can be large.

        Raises:
            ValueError: nothing was recorded, or there is no such image.
        """
        _check_recorded(self.denoised, index)
        images = [pipeline.decode_latents(denoised[index : index + 1]).float() for denoised in self.denoised]
        return [PIL.Image.fromarray(np.ascontiguousarray(to_numpy(image)[0])) for image in images]


def _check_recorded(steps: list[Tensor], index: int) -> None:
    if not steps or not 0 <= index < len(steps[0]):
        raise ValueError(f"No steps of image {index} were recorded: pass the recorder as callback_on_step_end.")
