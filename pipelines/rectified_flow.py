"""Sampling, editing and inversion with flow networks: rectified flow (arXiv 2209.03003), SD3 (2403.03206), SiT."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfgen.models.generators.dit import DiT
from hfgen.models.generators.ncsnpp import NCSNpp
from hfgen.models.modeling import PortablePipelineMixin
from hfgen.pipelines.class_labels import ClassLabels, ClassNamesMixin, ordered_class_names, saved_class_names
from hfgen.pipelines.flow_conditions import ConditionArguments, FlowConditions, prepare_conditions
from hfgen.pipelines.flow_latents import check_noise, flow_latent_shape, image_to_latents, mask_to_latents
from hfgen.pipelines.flow_networks import TIME_UNITS, FlowNetwork, PromptFlowNetwork, flow_network
from hfgen.pipelines.flow_steps import (
    FlowScheduler,
    check_numbers,
    check_scheduler,
    first_step,
    guidance_scales,
    set_network_timesteps,
)
from hfgen.pipelines.inputs import Images, after_callback, callback_inputs, check_callback_inputs, to_pixels
from hfgen.pipelines.latents import check_channels, check_guidance_channels, decode_latents, initial_noise
from hfgen.pipelines.outputs import ImageGenerationOutput
from hfgen.pipelines.text_conditioning import TextEncoder, check_encoders
from hfgen.publishing import PublishMixin
from hfgen.sampling.ode import passes_per_step, solve_ode


class RectifiedFlowPipeline(ClassNamesMixin, PublishMixin, PortablePipelineMixin, DiffusionPipeline):
    """Images from noise along the velocity of a flow, for a class, a prompt, or neither.

    Args:
        transformer: the network that predicts ``noise - image``: :class:`hfgen.DiT` (class labels),
            ``diffusers.SD3Transformer2DModel`` or ``diffusers.FluxTransformer2DModel`` (prompts), or
            :class:`hfgen.NCSNpp` (unconditional).
        scheduler: Euler or Heun for flows of diffusers, another of its solvers with flow sigmas, or the stochastic
            :class:`hfgen.InterpolantSDEScheduler`; None is Euler without shift. It can be replaced at any time.
        vae: decoder of the latents, diffusers' ``AutoencoderKL`` or a continuous tokenizer with grid latents; None if
            the network makes pixels.
        text_encoder, text_encoder_2, text_encoder_3: CLIP and T5 of transformers, in the order of SD3 or Flux, or a
            single T5; see :func:`hfgen.pipelines.text_conditioning.encode_prompts`. Without one, calls need
            ``prompt_embeds``.
        tokenizer, tokenizer_2, tokenizer_3: those of the encoders.
        class_names: name of each class in order, so that labels can be given by name; or label -> name, as saved.
        guidance_channels: guidance acts on so many first channels of the velocity, the others are those of the
            condition: 3 for the published samplers of SiT (their FIDs are with this historical choice), None for all.

    Raises:
        ValueError: parts that do not fit together.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = [
        "scheduler",
        "vae",
        *(f"{part}{suffix}" for suffix in ("", "_2", "_3") for part in ("text_encoder", "tokenizer")),
    ]
    _callback_tensor_inputs = ["latents", "velocity", "denoised"]

    def __init__(
        self,
        transformer: DiT | NCSNpp | SD3Transformer2DModel | FluxTransformer2DModel,
        scheduler: FlowScheduler | None = None,
        vae: AutoencoderKL | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder_2: PreTrainedModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        guidance_channels: int | None = None,
    ):
        super().__init__()
        network = flow_network(transformer)
        scheduler = FlowMatchEulerDiscreteScheduler() if scheduler is None else scheduler
        check_scheduler(scheduler)
        check_channels(vae, network.channels)
        check_guidance_channels(guidance_channels, network.channels)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        names = ordered_class_names(class_names)
        if isinstance(network, PromptFlowNetwork):
            check_encoders(
                self.text_encoders, network.context_width, network.pooled_width, clip_context=network.clip_context
            )
        elif self.text_encoders:
            raise ValueError(f"{type(transformer).__name__} reads no text; leave the text encoders out.")
        num_classes = network.config.get("num_classes", 0)
        if names is not None and len(names) != num_classes:
            raise ValueError(f"Got {len(names)} class_names for {num_classes} classes; give one each.")
        self.register_to_config(class_names=saved_class_names(names), guidance_channels=guidance_channels)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> RectifiedFlowPipeline:
        """As in diffusers, also from its pipelines for SD3 and Flux."""
        names = inspect.signature(cls.__init__).parameters
        parts = {name: part for name, part in pipeline.components.items() if name in names}
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    @property
    def network(self) -> FlowNetwork:
        """How the transformer is called."""
        return flow_network(self.transformer, self.config.guidance_channels)

    @property
    def text_encoders(self) -> list[TextEncoder]:
        """The text encoders that there are, each with its tokenizer."""
        pairs = (
            (self.text_encoder, self.tokenizer),
            (self.text_encoder_2, self.tokenizer_2),
            (self.text_encoder_3, self.tokenizer_3),
        )
        return [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None]

    def check_inputs(
        self,
        num_images_per_prompt: int,
        num_inference_steps: int,
        guidance_scale: float | None,
        image: Images | None,
        mask_image: PIL.Image.Image | Tensor | None,
        strength: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ``ValueError`` for arguments that cannot be sampled with; the conditions check theirs."""
        check_scheduler(self.scheduler)
        check_numbers(num_images_per_prompt, num_inference_steps, guidance_scale, strength)
        if mask_image is not None and image is None:
            raise ValueError("mask_image says what of an image to paint anew: give the image too.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        channels = self.network.channels
        if self.vae is None and channels != 3 and (output_type != "latent" or image is not None):
            raise ValueError(
                f"The transformer works on latents of {channels} channels and the pipeline has no vae: give it one "
                "with register_modules(vae=...), or ask for output_type='latent'."
            )
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) of the network -> pixels (B, 3, H, W) in [-1, 1], also ``denoised`` of a callback."""
        return decode_latents(self.vae, latents)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: ClassLabels | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | Sequence[float] = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: Images | None = None,
        mask_image: PIL.Image.Image | Tensor | None = None,
        strength: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[RectifiedFlowPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImageGenerationOutput | tuple:
        """Generate images, or change some.

        Args:
            prompt: a text or a list of them, for a network that reads text.
            class_labels: a class, by index or name, or a list of them, for a network with classes; ``num_classes`` is
                the unconditional class.
            negative_prompt: what to guide away from, one text or one per prompt; None is the empty text.
            num_images_per_prompt: images per prompt or label.
            height, width: of the image in pixels; None is the size of training, or that of ``image``.
            num_inference_steps: of the scheduler, at full strength.
            sigmas: the flow times at which the steps begin, falling from 1, before the shift of the scheduler.
            guidance_scale: w of classifier-free guidance, 1 is off; None is 4.5 where there is a condition. Networks
                that were distilled from guided sampling get it as an input (Flux dev, 3.5) or need none (schnell, 1).
            guidance_schedule: how w changes from pass to pass: a name of ``hfgen.sampling.guidance``, or a list of one
                scale per pass of the network.
            guidance_interval: the flow times (low, high) between which guidance is on (arXiv 2404.07724); outside, the
                unconditional half is not computed.
            image: PIL, or pixels (1 or B, 3, H, W) in [-1, 1], to start from, at the flow time that ``strength`` says.
            mask_image: white (1) where to paint ``image`` anew; after each step the rest is the image with the noise
                of that time.
            strength: share of the steps that are made from ``image``, in (0, 1]; 1 begins with pure noise.
            generator: one generator for the batch, or a list with one per image, which makes each image independent
                of the others in its batch.
            latents: (B, C, h, w), the noise to start from instead of drawing it, such as that of :meth:`invert`.
            prompt_embeds, pooled_prompt_embeds: (B, N, D) and (B, P), instead of ``prompt``.
            negative_prompt_embeds, negative_pooled_prompt_embeds: the same of ``negative_prompt``.
            max_sequence_length: tokens of T5; None is what its tokenizer allows, at most 256.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: return an :class:`ImageGenerationOutput` instead of a tuple.
            callback_on_step_end: called after each pass as ``callback(pipe, i, timestep, tensors)``; it may return
                {"latents": ...} to replace them.
            callback_on_step_end_tensor_inputs: which of "latents", "velocity" (guided) and "denoised" (the image that
                it points to, which ``pipe.decode_latents`` shows), each (B, C, h, w) float32, it gets.

        Returns:
            ``images`` and ``nfe``, the number of passes: Heun makes two per step, and one in the last.
        """
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        num_inference_steps = num_inference_steps if sigmas is None else len(sigmas)
        self.check_inputs(
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            image,
            mask_image,
            strength,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device, network, scheduler = self._execution_device, self.network, self.scheduler
        pixels = None if image is None else to_pixels(image)
        if pixels is not None:
            if height is not None or width is not None:
                raise ValueError("height and width are those of the image: leave them out, or resize it.")
            height, width = pixels.shape[-2:]
        shape = flow_latent_shape(network, self.vae, height, width)
        set_network_timesteps(scheduler, network, num_inference_steps, sigmas, shape, device)
        start = 0 if image is None else first_step(scheduler, num_inference_steps, strength)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)  # else the scheduler would look for each timestep on the device
        times = scheduler.sigmas.tolist()[start:]
        guidance_scale = network.default_guidance if guidance_scale is None else guidance_scale
        scales = guidance_scales(guidance_schedule, guidance_scale, guidance_interval, times[:-1])
        arguments = ConditionArguments(
            prompt,
            class_labels,
            negative_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            max_sequence_length,
        )
        conditions = self._conditions(network, arguments, num_images_per_prompt, scales, device)
        shape = (conditions.batch_size, *shape)
        check_noise(shape, generator, latents)
        noise = initial_noise(shape, generator, device) if latents is None else latents.to(device, torch.float32)
        latents, mask = noise, None
        if pixels is not None:
            known = image_to_latents(self.vae, pixels.to(device), shape[0])
            latents = (1 - times[0]) * known + times[0] * noise
            mask = None if mask_image is None else mask_to_latents(mask_image, self.vae, known)

        step_arguments = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            step_arguments["generator"] = list(generator) if isinstance(generator, Sequence) else generator
        with self.progress_bar(total=len(scales)) as progress_bar:
            for i, scale in enumerate(scales):
                before, timestep = latents, scheduler.timesteps[start + i]
                velocity = conditions.velocity(network, latents, TIME_UNITS * times[i], scale)
                latents = scheduler.step(velocity, timestep, latents, return_dict=False, **step_arguments)[0]
                if mask is not None:
                    latents = torch.where(mask, latents, (1 - times[i + 1]) * known + times[i + 1] * noise)
                if callback_on_step_end is not None:
                    available = {"latents": latents, "velocity": velocity, "denoised": before - times[i] * velocity}
                    tensors = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    latents = after_callback(callback_on_step_end(self, i, timestep, tensors), "latents", latents)
                progress_bar.update()

        images: Any = latents
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(latents).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        output = ImageGenerationOutput(images=images, nfe=len(scales))
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def invert(
        self,
        image: Images,
        prompt: str | Sequence[str] | None = None,
        class_labels: ClassLabels | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 1.0,
        method: str = "midpoint",
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
    ) -> ImageGenerationOutput:
        """The noise that the flow turns into an image, by going its way backwards.

        ``pipe(..., latents=pipe.invert(image, ...).images)`` makes the image again, up to the error of the solvers,
        with the same condition and guidance; with another condition it edits the image.

        Args:
            image: PIL, or pixels (B, 3, H, W) in [-1, 1].
            prompt, class_labels, negative_prompt: as of a call; one, or one per image.
            num_inference_steps: steps, at the times of the scheduler.
            guidance_scale: as of a call; without guidance the way back is more exact.
            method: a solver of ``hfgen.sampling.ode``.
            prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds,
                max_sequence_length: as of a call.

        Returns:
            ``images``: latents (B, C, h, w) float32 at flow time 1; ``nfe``, the passes of the network.
        """
        self.check_inputs(1, num_inference_steps, guidance_scale, image, None, 1.0, "latent", ())
        passes = passes_per_step(method)
        device, network, pixels = self._execution_device, self.network, to_pixels(image)
        shape = flow_latent_shape(network, self.vae, *pixels.shape[-2:])
        set_network_timesteps(self.scheduler, network, num_inference_steps, None, shape, device)
        times = sorted(set(self.scheduler.sigmas.tolist()))  # Heun lists most of them twice
        arguments = ConditionArguments(
            prompt,
            class_labels,
            negative_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            max_sequence_length,
        )
        conditions = self._conditions(network, arguments, 1, [guidance_scale], device)
        batch_size = max(len(pixels), conditions.batch_size)
        conditions = conditions.expand(batch_size)
        latents = image_to_latents(self.vae, pixels.to(device), batch_size)
        nfe = passes * (len(times) - 1)
        with self.progress_bar(total=nfe) as progress_bar:

            def velocity(latents: Tensor, time: float) -> Tensor:
                progress_bar.update()
                return conditions.velocity(network, latents, TIME_UNITS * time, guidance_scale)

            latents = solve_ode(velocity, latents, times, method)
        self.maybe_free_model_hooks()
        return ImageGenerationOutput(images=latents, nfe=nfe)

    def _conditions(
        self,
        network: FlowNetwork,
        arguments: ConditionArguments,
        num_images_per_prompt: int,
        scales: Sequence[float],
        device: torch.device,
    ) -> FlowConditions:
        return prepare_conditions(
            arguments,
            network,
            self.text_encoders,
            self.class_names,
            num_images=num_images_per_prompt,
            guided=any(scale != 1 for scale in scales),
            device=device,
        )
