"""Sampling with MeanFlow in one or a few steps (Geng et al., arXiv 2505.13447)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from hfgen.models.generators.dit import DiT
from hfgen.models.modeling import PortablePipelineMixin
from hfgen.pipelines.class_labels import (
    ClassLabels,
    ClassNamesMixin,
    label_rows,
    ordered_class_names,
    saved_class_names,
)
from hfgen.pipelines.inputs import (
    after_callback,
    callback_inputs,
    check_callback_inputs,
    check_common,
    check_generators,
)
from hfgen.pipelines.latents import (
    LatentDecoder,
    check_channels,
    check_output_type,
    decode_latents,
    downsample_factor,
    initial_noise,
)
from hfgen.pipelines.outputs import ImageGenerationOutput
from hfgen.publishing import PublishMixin
from hfgen.sampling.flow_paths import even_sigmas
from hfgen.sampling.guidance import guide


class MeanFlowPipeline(ClassNamesMixin, PublishMixin, PortablePipelineMixin, DiffusionPipeline):
    """Class-conditional image generation with average velocities.

    From time t to r a step is ``z_r = z_t - (t - r) u(z_t, r, t)``, equation 12; a single one goes from noise to data.

    Args:
        transformer: a :class:`DiT` with ``has_duration``.
        vae: decoder of the latents, diffusers' ``AutoencoderKL`` or a continuous tokenizer with grid latents; None if
            the transformer makes pixels.
        class_names: name of each class in order, so that labels can be given by name; or label -> name, as saved.

    Raises:
        ValueError: the transformer is of another kind; vae or class names do not fit it.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: DiT,
        vae: LatentDecoder | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
    ):
        super().__init__()
        class_names = ordered_class_names(class_names)
        if not transformer.config.get("has_duration", False):
            raise ValueError(
                f"This {type(transformer).__name__} predicts no average velocity: MeanFlow needs a DiT with "
                "has_duration."
            )
        check_channels(vae, transformer.config.in_channels)
        num_classes = transformer.config.num_classes
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"Got {len(class_names)} class_names for {num_classes} classes; give one each.")
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(class_names=saved_class_names(class_names))
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> MeanFlowPipeline:
        """As in diffusers, which would only take over models of exactly the classes that the constructor names."""
        models = {name: model for name, model in pipeline.components.items() if name in ("transformer", "vae")}
        return super().from_pipe(pipeline, **{**models, **kwargs})

    def check_inputs(
        self,
        class_labels: ClassLabels | None,
        num_images_per_prompt: int,
        num_inference_steps: int,
        sigmas: Sequence[float] | None,
        guidance_scale: float,
        height: int | None,
        width: int | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ``ValueError`` for arguments that cannot be sampled with."""
        check_common(num_images_per_prompt, guidance_scale)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}.")
        if sigmas is not None and (
            not len(sigmas) or sigmas[0] > 1 or any(a <= b for a, b in zip(sigmas, [*sigmas[1:], 0.0]))
        ):
            raise ValueError(
                f"sigmas are the times at which steps begin, such as [1.0, 0.5]: they fall from at most 1 and stay "
                f"above 0, where the last step ends. Got {list(sigmas)}."
            )
        check_output_type(output_type, self.vae, self.transformer.config.in_channels)
        batch_size = len(self.prepare_labels(class_labels, num_images_per_prompt, "cpu"))
        check_generators(generator, batch_size)
        expected = (batch_size, *self.latent_shape(height, width))
        if latents is not None and latents.shape != expected:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {expected}.")
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def prepare_labels(
        self, class_labels: ClassLabels | None, num_images_per_prompt: int, device: torch.device | str
    ) -> Tensor:
        """Labels as (B,) int64, each repeated ``num_images_per_prompt`` times; None is the unconditional class.

        Raises:
            ValueError: an unknown name, or a label outside [0, num_classes].
        """
        num_classes = self.transformer.config.num_classes
        return label_rows(class_labels, self.class_names, num_classes, num_images_per_prompt, device)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image; by default of the size of training.

        Raises:
            ValueError: a size that vae and patches do not divide.
        """
        config, factor = self.transformer.config, downsample_factor(self.vae)
        unit = factor * config.patch_size
        sides = []
        for name, pixels in (("height", height), ("width", width)):
            pixels = config.sample_size * factor if pixels is None else pixels
            if pixels < unit or pixels % unit:
                raise ValueError(
                    f"{name} must be a multiple of {unit} pixels (a vae factor of {factor} times a patch size of "
                    f"{config.patch_size}), got {pixels}."
                )
            sides.append(pixels // factor)
        return (config.in_channels, *sides)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of the transformer -> pixels (B, 3, H, W) in [-1, 1]."""
        return decode_latents(self.vae, latents)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 1,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[MeanFlowPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImageGenerationOutput | tuple:
        """Generate images.

        Args:
            class_labels: a class, by index or name, or a list of them; None is unconditional.
            num_images_per_prompt: images per label.
            num_inference_steps: equal steps from 1 to 0.
            sigmas: the times from 1 downwards at which the steps begin, instead of equal steps; the last ends at 0.
            guidance_scale: w of classifier-free guidance, 1 is off. Published models have learned their guidance and
                need none here; it is for those that were trained without.
            height, width: of the image in pixels, multiples of the vae's factor times the patch size; None is the size
                of training.
            generator: one generator for the batch, or a list with one per image, which makes each image independent
                of the others in its batch.
            latents: (B, C, h, w), the noise to start from instead of drawing it.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: return an :class:`ImageGenerationOutput` instead of a tuple.
            callback_on_step_end: called after each step as ``callback(pipe, i, t, tensors)`` with the time t at which
                the step began; it may return {"latents": ...} to replace them.
            callback_on_step_end_tensor_inputs: "latents" (B, C, h, w) float32.

        Returns:
            ``images`` and ``nfe``, the number of steps.
        """
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            class_labels,
            num_images_per_prompt,
            num_inference_steps,
            sigmas,
            guidance_scale,
            height,
            width,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        labels = self.prepare_labels(class_labels, num_images_per_prompt, device)
        if latents is None:
            latents = initial_noise((len(labels), *self.latent_shape(height, width)), generator, device)
        latents = latents.to(device=device, dtype=torch.float32)
        starts = even_sigmas(num_inference_steps) if sigmas is None else list(sigmas)
        # Guiding an unconditional image by itself changes nothing, so its second half is not computed.
        scale = 1.0 if class_labels is None else guidance_scale
        if scale != 1:
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.unconditional_label)])

        with self.progress_bar(total=len(starts)) as progress_bar:
            for i, (t, r) in enumerate(zip(starts, [*starts[1:], 0.0])):
                latents = latents - (t - r) * self._average_velocity(latents, t, r, labels, scale)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = after_callback(callback_on_step_end(self, i, t, tensors), "latents", latents)
                progress_bar.update()

        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(latents).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, len(starts))
        return ImageGenerationOutput(images=images, nfe=len(starts))

    def _average_velocity(self, latents: Tensor, t: float, r: float, labels: Tensor, scale: float) -> Tensor:
        """(B, C, h, w) float32, the mean velocity from t to r; a guided one needs the labels of both halves."""
        if scale != 1:
            latents = latents.repeat(2, 1, 1, 1)
        time, duration = (torch.full((len(latents),), value, device=latents.device) for value in (t, t - r))
        velocity = self.transformer(latents, time, labels, duration, return_dict=False)[0].float()
        return velocity if scale == 1 else guide(*velocity.chunk(2), scale)
