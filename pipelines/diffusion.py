"""Class-conditional diffusion in latents or pixels: DiT (arXiv 2212.09748) or a U-Net, with any discrete scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
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
from hfgen.pipelines.diffusion_networks import (
    check_components,
    check_scheduler,
    default_scheduler,
    latent_multiple,
    number_of_classes,
    uses_variance,
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
    check_output_type,
    decode_latents,
    downsample_factor,
    guide_channels,
    initial_noise,
)
from hfgen.pipelines.outputs import ImageGenerationOutput
from hfgen.publishing import PublishMixin
from hfgen.sampling.guidance import guidance_schedule
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler

_DEFAULT_STEPS = 50


class ImageDiffusionPipeline(ClassNamesMixin, PublishMixin, PortablePipelineMixin, DiffusionPipeline):
    """Image generation by diffusion.

    Schedulers can be swapped as in diffusers: ``pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)``. A
    network may predict a variance in a second half of channels: a :class:`RespacedDDPMScheduler` and a
    ``DDPMScheduler`` with a learned variance get it, other schedulers only the first half.

    Args:
        transformer: the network: a :class:`DiT`, or a ``UNet2DModel`` of diffusers, whose last class embedding stands
            for no class; without class embeddings it generates unconditionally.
        scheduler: a discrete diffusion scheduler, of hfgen or diffusers; None takes DiT's, with the variance that the
            network has.
        vae: decoder of the latents, diffusers' ``AutoencoderKL`` or a continuous tokenizer with grid latents; None if
            the network makes pixels.
        class_names: name of each class in order, so that labels can be given by name; or label -> name, as saved.
        guidance_channels: guidance acts on so many first channels of the prediction, the others are those of the
            condition: 3 for the published samplers of DiT (their FIDs are with this historical choice), None for all.
        prediction_type: what the network predicts: ``epsilon``, ``sample`` or ``v_prediction``; None takes that of
            the scheduler. Another scheduler must agree with it.

    Raises:
        ValueError: components that do not fit together.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["scheduler", "vae"]
    _callback_tensor_inputs = ["latents", "model_output"]

    def __init__(
        self,
        transformer: DiT | UNet2DModel,
        scheduler: SchedulerMixin | None = None,
        vae: LatentDecoder | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        guidance_channels: int | None = None,
        prediction_type: str | None = None,
    ):
        super().__init__()
        class_names = ordered_class_names(class_names)
        check_components(transformer, vae, class_names, guidance_channels)
        if scheduler is None:
            scheduler = default_scheduler(transformer, prediction_type or "epsilon")
        prediction_type = prediction_type or scheduler.config.get("prediction_type")
        check_scheduler(scheduler, transformer, prediction_type)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            class_names=saved_class_names(class_names),
            guidance_channels=guidance_channels,
            prediction_type=prediction_type,
        )
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> ImageDiffusionPipeline:
        """As in diffusers, which would only take over models of exactly the classes that the constructor names."""
        models = {name: model for name, model in pipeline.components.items() if name in ("transformer", "vae")}
        return super().from_pipe(pipeline, **{**models, **kwargs})

    def check_inputs(
        self,
        class_labels: ClassLabels | None,
        num_images_per_prompt: int,
        num_inference_steps: int | None,
        guidance_scale: float,
        height: int | None,
        width: int | None,
        eta: float | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ``ValueError`` for arguments that cannot be sampled with."""
        check_scheduler(self.scheduler, self.transformer, self.config.prediction_type)
        check_common(num_images_per_prompt, guidance_scale)
        trained = self.scheduler.config.num_train_timesteps
        if num_inference_steps is not None and not 1 <= num_inference_steps <= trained:
            raise ValueError(
                f"num_inference_steps must be between 1 and the {trained} timesteps of training, got "
                f"{num_inference_steps}."
            )
        if eta is not None and "eta" not in inspect.signature(self.scheduler.step).parameters:
            raise ValueError(f"eta is {eta}, but a {type(self.scheduler).__name__} has no such setting; leave it out.")
        check_output_type(output_type, self.vae, self.transformer.config.in_channels)
        labels = self.prepare_labels(class_labels, num_images_per_prompt, "cpu")
        batch_size = num_images_per_prompt if labels is None else len(labels)
        check_generators(generator, batch_size)
        expected = (batch_size, *self.latent_shape(height, width))
        if latents is not None and latents.shape != expected:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {expected}.")
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def prepare_labels(
        self, class_labels: ClassLabels | None, num_images_per_prompt: int, device: torch.device | str
    ) -> Tensor | None:
        """Labels as (B,) int64, each repeated ``num_images_per_prompt`` times; None is the unconditional class.

        Returns:
            None for a network without classes.

        Raises:
            ValueError: an unknown name, a label outside [0, num_classes], or a label for a network without classes.
        """
        num_classes = number_of_classes(self.transformer)
        if num_classes is None:
            if class_labels is not None:
                raise ValueError(
                    f"The network has no classes (num_class_embeds is None), got class_labels {class_labels!r}; leave "
                    "them out."
                )
            return None
        return label_rows(class_labels, self.class_names, num_classes, num_images_per_prompt, device)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image; by default of the size of training.

        Raises:
            ValueError: a size that the vae and the network's patches or blocks do not divide, or none is known.
        """
        config, factor = self.transformer.config, downsample_factor(self.vae)
        multiple = factor * latent_multiple(self.transformer)
        trained = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
        sides = []
        for name, pixels, latents in (("height", height, trained[0]), ("width", width, trained[1])):
            if pixels is None and latents is None:
                raise ValueError(f"The network does not say what size it was trained on (sample_size); give {name}.")
            pixels = latents * factor if pixels is None else pixels
            if pixels < multiple or pixels % multiple:
                raise ValueError(
                    f"{name} must be a multiple of {multiple} pixels (a vae factor of {factor} times "
                    f"{multiple // factor} for the network's patches or blocks), got {pixels}."
                )
            sides.append(pixels // factor)
        return (config.in_channels, *sides)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], also for those of a callback."""
        return decode_latents(self.vae, latents)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        height: int | None = None,
        width: int | None = None,
        eta: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[ImageDiffusionPipeline, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImageGenerationOutput | tuple:
        """Generate images.

        Args:
            class_labels: a class, by index or name, or a list of them; ``num_classes`` or None is unconditional.
            num_images_per_prompt: images per label.
            num_inference_steps: steps; None takes what the configuration of a :class:`RespacedDDPMScheduler` says (250
                for DiT), and 50 for other schedulers.
            guidance_scale: w of classifier-free guidance, 1 is off. DiT's FIDs are at 1.5.
            guidance_interval: guidance is on from and to these shares of the steps (arXiv 2404.07724), 0 is the first
                step and 1 the last.
            height, width: of the images, in pixels; those that the network was trained on by default.
            eta: noise of DDIM, 0 is deterministic; None takes the scheduler's.
            generator: one generator for the batch, or a list with one per image, which makes each image independent
                of the others in its batch.
            latents: (B, C, h, w) standard normal noise to start from instead of drawing it.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: return an :class:`ImageGenerationOutput` instead of a tuple.
            callback_on_step_end: called after each step as ``callback(pipe, step, timestep, tensors)``; it may return
                {"latents": ...} to change the latents.
            callback_on_step_end_tensor_inputs: which of "latents" (B, C, h, w) and "model_output" (B, C or 2C, h, w),
                guided, float32, it gets.

        Returns:
            ``images`` and ``nfe``, the passes of the network: as many as timesteps.

        Raises:
            ValueError: arguments that cannot be sampled with.
        """
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            class_labels,
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            height,
            width,
            eta,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device, scheduler = self._execution_device, self.scheduler
        labels = self.prepare_labels(class_labels, num_images_per_prompt, device)
        if num_inference_steps is None and not isinstance(scheduler, RespacedDDPMScheduler):
            num_inference_steps = _DEFAULT_STEPS
        scheduler.set_timesteps(num_inference_steps, device=device)
        num_steps = len(scheduler.timesteps)
        scales = guidance_schedule("interval", guidance_scale, num_steps, interval=guidance_interval)
        # Guiding an unconditional image by itself changes nothing, so its second half is not computed.
        scales = [1.0] * num_steps if class_labels is None else scales
        batch_size = num_images_per_prompt if labels is None else len(labels)
        if latents is None:
            latents = initial_noise((batch_size, *self.latent_shape(height, width)), generator, device)
        latents = latents.to(device=device, dtype=torch.float32) * scheduler.init_noise_sigma
        step_arguments = self._step_arguments(generator, eta)
        guided_labels = None
        if any(scale != 1 for scale in scales):
            guided_labels = torch.cat([labels, torch.full_like(labels, number_of_classes(self.transformer))])
        dtype = self.transformer.dtype  # diffusers visits all modules to tell: too much for every step

        with self.progress_bar(total=num_steps) as progress_bar:
            # Schedulers index tables on the CPU by the timestep: one from there needs no wait for the device.
            for i, timestep in enumerate(scheduler.timesteps.cpu()):
                scaled = scheduler.scale_model_input(latents, timestep).to(dtype)
                if scales[i] == 1:
                    model_output = self._predict(scaled, scheduler.timesteps[i], labels)
                else:
                    both = self._predict(scaled.repeat(2, 1, 1, 1), scheduler.timesteps[i], guided_labels)
                    channels = self.config.guidance_channels or latents.shape[1]
                    model_output = guide_channels(*both.chunk(2), scales[i], channels)
                latents = scheduler.step(
                    self._for_scheduler(model_output), timestep, latents, **step_arguments, return_dict=False
                )[0]
                if callback_on_step_end is not None:
                    available = {"latents": latents, "model_output": model_output}
                    tensors = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, timestep.item(), tensors)
                    latents = after_callback(returned, "latents", latents)
                progress_bar.update()

        images = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(latents).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, num_steps)
        return ImageGenerationOutput(images=images, nfe=num_steps)

    def _predict(self, latents: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        """(B, C or 2C, h, w) float32."""
        return self.transformer(latents, timestep.expand(len(latents)), labels).sample.float()

    def _for_scheduler(self, model_output: Tensor) -> Tensor:
        """Without the variance channels, unless the scheduler uses them."""
        return (
            model_output if uses_variance(self.scheduler) else model_output[:, : self.transformer.config.in_channels]
        )

    def _step_arguments(
        self, generator: torch.Generator | Sequence[torch.Generator] | None, eta: float | None
    ) -> dict[str, Any]:
        """What the scheduler's ``step`` takes of these; deterministic ones take no generator."""
        accepted = inspect.signature(self.scheduler.step).parameters
        arguments = {"generator": generator} if "generator" in accepted else {}
        return arguments if eta is None else arguments | {"eta": eta}
