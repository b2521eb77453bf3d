"""Texts and images from one transformer: Transfusion (arXiv 2408.11039), with continuous or discrete images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hfgen.models.generators.transfusion import TransfusionTransformer
from hfgen.models.modeling import PortablePipelineMixin
from hfgen.models.quantizers.noisy_latents import NoisyLatentQuantizer
from hfgen.pipelines.class_labels import ClassLabels, ClassNamesMixin, ordered_class_names, saved_class_names
from hfgen.pipelines.inputs import (
    Images,
    callback_inputs,
    check_callback_inputs,
    check_common,
    check_count,
    check_generators,
    to_pixels,
)
from hfgen.pipelines.latents import check_output_type
from hfgen.pipelines.outputs import ImageGenerationOutput
from hfgen.pipelines.transfusion_images import ImageForm, image_form, one_image
from hfgen.pipelines.transfusion_outputs import CaptionOutput, MixedOutput
from hfgen.pipelines.transfusion_painting import (
    Context,
    OnStep,
    Painter,
    PaintingSettings,
    check_draws,
    check_settings,
)
from hfgen.pipelines.transfusion_prompts import Texts, negative_rows, prompt_texts
from hfgen.pipelines.transfusion_schedule import check_scheduler, default_scheduler
from hfgen.pipelines.transfusion_sequence import MixedSequence, begin_sequence, check_length
from hfgen.pipelines.transfusion_text import TransfusionVocabulary
from hfgen.pipelines.transfusion_writing import TextSettings, write_mixed, write_texts
from hfgen.publishing import PublishMixin

logger = logging.getLogger(__name__)

Part = str | PIL.Image.Image | Tensor


class TransfusionPipeline(ClassNamesMixin, PublishMixin, PortablePipelineMixin, DiffusionPipeline):
    """Text to image, image to text, and texts and images in any order.

    - ``pipe("a small red circle").images``: images for prompts, classes, or nothing
    - ``pipe.caption(image).texts``: texts about images
    - ``pipe.generate(["a red circle", image, "and now in blue"]).parts``: what the transformer goes on with

    Args:
        transformer: with continuous images, which are denoised, or discrete ones, drawn code by code.
        tokenizer: of text; without it there are only unconditional images.
        scheduler: for continuous images, what the transformer was trained with: a diffusion scheduler of hfgen or
            diffusers, or one for flows; None is the paper's. It can be replaced at any time.
        vae: diffusers' ``AutoencoderKL`` or a continuous tokenizer with grid latents; None for pixels. For discrete
            images without a ``quantizer``, any discrete tokenizer of images of one size.
        quantizer: for discrete images, the codes of the latents of the ``vae``.
        class_names: prompt of each class in order, so that images can be asked for by class; or label -> prompt, as
            saved.
        image_size: side in pixels of the images of training, the default of a call. A discrete tokenizer knows it.

    Raises:
        ValueError: parts that do not fit together.
    """

    model_cpu_offload_seq = "transformer->quantizer->vae"
    _optional_components = ["tokenizer", "scheduler", "vae", "quantizer"]

    def __init__(
        self,
        transformer: TransfusionTransformer,
        tokenizer: PreTrainedTokenizerBase | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        quantizer: NoisyLatentQuantizer | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        TransfusionVocabulary(transformer, tokenizer)
        image_form(transformer, vae, quantizer, image_size)
        if scheduler is None and not transformer.is_discrete:
            scheduler = default_scheduler()
        if scheduler is not None:
            check_scheduler(scheduler, latents=vae is not None)
        self.register_modules(
            transformer=transformer, tokenizer=tokenizer, scheduler=scheduler, vae=vae, quantizer=quantizer
        )
        names = ordered_class_names(class_names)
        self.register_to_config(class_names=saved_class_names(names), image_size=image_size)
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> TransfusionPipeline:
        """As in diffusers, which would only take over models of exactly the classes that the constructor names."""
        names = ("transformer", "vae", "quantizer", "tokenizer")
        parts = {name: part for name, part in pipeline.components.items() if name in names}
        return super().from_pipe(pipeline, **{**parts, **kwargs})

    @property
    def vocabulary(self) -> TransfusionVocabulary:
        """The ids of text, codes and markers."""
        return TransfusionVocabulary(self.transformer, self.tokenizer)

    @property
    def image_form(self) -> ImageForm:
        """What images are to the transformer."""
        return image_form(self.transformer, self.vae, self.quantizer, self.config.image_size)

    @property
    def _callback_tensor_inputs(self) -> list[str]:
        return ["codes"] if self.transformer.is_discrete else ["latents", "denoised"]

    def check_inputs(
        self,
        num_images_per_prompt: int,
        settings: PaintingSettings,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ``ValueError`` for arguments that cannot be sampled with; what is read checks the prompts."""
        check_common(num_images_per_prompt, settings.guidance_scale)
        check_settings(settings, self.image_form)
        if not self.transformer.is_discrete:
            check_scheduler(self.scheduler, latents=self.vae is not None)
        # Codes can always be decoded; without a vae they are those of pixels.
        channels = 3 if self.transformer.is_discrete else self.transformer.config.latent_channels
        check_output_type(output_type, self.vae, channels)
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def encode_prompts(
        self, prompt: Texts | None, class_labels: ClassLabels | None, num_images_per_prompt: int
    ) -> list[list[int]]:
        """What precedes each image: beginning, text, and the marker of an image; without a condition no text.

        Raises:
            ValueError: both kinds of condition, an unknown class, or a text that cannot be encoded.
        """
        texts = prompt_texts(prompt, class_labels, self.class_names or [])
        return [row for row in self.vocabulary.prompt_rows(texts) for _ in range(num_images_per_prompt)]

    def decode_latents(self, latents: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Latents (B, C, h, w) or codes (B, n) -> pixels (B, 3, H, W) in [-1, 1], also ``denoised`` of a callback.

        Args:
            latents: of the transformer.
            height, width: in pixels, of images that are codes; by default those of training.
        """
        return self.image_form.decode(latents, height, width)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Texts | None = None,
        class_labels: ClassLabels | None = None,
        *,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[TransfusionPipeline, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> ImageGenerationOutput | tuple:
        """Draw images.

        Args:
            prompt: a text or a list of them; None, or an empty text, is unconditional.
            class_labels: instead, a class, by index or name, or a list of them.
            negative_prompt: what to guide away from, one text or one per prompt; None is no text.
            num_images_per_prompt: images per prompt or label.
            height, width: of the images in pixels; those of training by default.
            num_inference_steps: of continuous images; None is 50 for a flow, and for diffusion what a
                :class:`hfgen.RespacedDDPMScheduler` says, else 250.
            guidance_scale: w of classifier-free guidance, 1 is off.
            temperature, top_k, top_p: of the draw of codes of discrete images: 0 takes the likeliest code, 0 and 1
                keep all codes.
            generator: one generator for the batch, or a list with one per image, which makes each image independent
                of the others in its batch.
            latents: (B, C, h, w) standard normal noise to start from instead of drawing it.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent": latents (B, C, h, w) or codes (B, n).
            return_dict: return an :class:`ImageGenerationOutput` instead of a tuple.
            callback_on_step_end: called after each step as ``callback(pipe, i, timestep, tensors)``; it may return
                {"latents": ...} to replace them.
            callback_on_step_end_tensor_inputs: which of "latents" and "denoised" (the image that the prediction points
                to, which ``pipe.decode_latents`` shows), each (B, C, h, w), it gets, and of discrete images "codes"
                (B, i + 1), those drawn so far, with the last one as timestep; by default the first of them.

        Returns:
            ``images`` and ``nfe``, the passes over them: one for each step of the scheduler or for each code. The text
            before is run once and not counted.

        Raises:
            ValueError: arguments that cannot be sampled with.
        """
        names = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        settings = PaintingSettings(height, width, num_inference_steps, guidance_scale, temperature, top_k, top_p)
        self.check_inputs(num_images_per_prompt, settings, output_type, names)
        if not self.transformer.is_discrete and (temperature, top_k, top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k and top_p are of discrete images; continuous ones are denoised.")
        rows = self.encode_prompts(prompt, class_labels, num_images_per_prompt)
        check_generators(generator, len(rows))
        null_rows = negative_rows(self.encode_prompts(negative_prompt, None, 1), rows, num_images_per_prompt)
        painter = self._painter(settings, generator)
        check_length(self.transformer, max(map(len, rows + null_rows)) + painter.num_tokens)
        painter.check_noise(latents, len(rows))

        # Guiding an unconditional image by itself changes nothing, so its second half is not computed.
        guided = guidance_scale != 1 and null_rows != rows
        with self.progress_bar(total=painter.num_steps) as progress_bar:
            on_step = self._step_callback(callback_on_step_end, names, progress_bar)
            null = painter.read(null_rows) if guided else None
            latents = painter.paint(painter.read(rows), null, on_step, latents)
        images: Any = latents
        if output_type != "latent":
            pixels = self.decode_latents(latents, height, width).float()
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        output = ImageGenerationOutput(images=images, nfe=painter.num_steps)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def caption(
        self,
        image: Images,
        prompt: str = "",
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
        callback_on_text: Callable[[TransfusionPipeline, list[str]], None] | None = None,
    ) -> CaptionOutput | tuple:
        """Write texts about images, all of one size.

        Args:
            image: PIL or a list of them, or pixels (B, 3, H, W) in [-1, 1], of the size of training.
            prompt: after the image, such as a question or the beginning of the text; it is not repeated in the texts.
            max_new_tokens: of each text, which ends earlier where the transformer ends it.
            temperature, top_k, top_p: of the draw of tokens; a temperature of 0 takes the likeliest.
            generator: one generator for the batch, or a list with one per image.
            return_dict: return a :class:`CaptionOutput` instead of a tuple.
            callback_on_text: called as ``callback(pipe, pieces)`` after each token, with what it adds to each text,
                which can be nothing.

        Raises:
            ValueError: arguments that cannot be sampled with.
        """
        check_draws(temperature, top_k, top_p)
        check_count("max_new_tokens", max_new_tokens, 1)
        pixels = to_pixels(image)
        check_generators(generator, len(pixels))
        sequence = self._begin([pixels, prompt], max_new_tokens)
        settings = TextSettings(temperature, top_k, top_p, generator)
        on_text = None if callback_on_text is None else partial(callback_on_text, self)
        with self.progress_bar(total=max_new_tokens) as progress_bar:
            most = min(max_new_tokens, sequence.room + 1)
            texts, nfe = write_texts(sequence, self.vocabulary, settings, most, progress_bar.update, on_text)
        self.maybe_free_model_hooks()
        output = CaptionOutput(texts=texts, nfe=nfe)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def generate(
        self,
        parts: Part | Sequence[Part] = (),
        *,
        max_new_tokens: int = 256,
        max_images: int = 1,
        begin_with_image: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_text: Callable[[TransfusionPipeline, str], None] | None = None,
        callback_on_step_end: Callable[[TransfusionPipeline, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> MixedOutput | tuple:
        """Go on with a sequence of texts and images, as the transformer decides.

        Text is drawn token by token. Where the transformer begins an image, the image is drawn as in a call, on
        everything before it as the condition, and text follows.

        Args:
            parts: texts and images in order; images are PIL, or pixels (3, H, W) or (1, 3, H, W) in [-1, 1].
            max_new_tokens: of text; it ends earlier where the transformer ends it.
            max_images: after so many the transformer begins no more; 0 is text alone.
            begin_with_image: draw an image first, without asking the transformer.
            height, width, num_inference_steps, guidance_scale: of images, as in a call.
            temperature, top_k, top_p: of the draw of tokens of text and codes; 0 takes the likeliest.
            generator: of all draws.
            output_type, return_dict: as in a call, of a :class:`MixedOutput`.
            callback_on_text: called as ``callback(pipe, text)`` with each new piece of text.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in a call, for each image.

        Raises:
            ValueError: arguments that cannot be sampled with, or a sequence longer than the transformer's context.
        """
        names = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        settings = PaintingSettings(height, width, num_inference_steps, guidance_scale, temperature, top_k, top_p)
        self.check_inputs(1, settings, output_type, names)
        check_count("max_new_tokens", max_new_tokens, 0)
        check_count("max_images", max_images, 1 if begin_with_image else 0)
        config = self.transformer.config
        painter = self._painter(settings, generator)
        parts = [parts] if isinstance(parts, (str, PIL.Image.Image, Tensor)) else parts
        if not isinstance(parts, Sequence):
            raise ValueError(f"parts must be texts and images in order, got {parts!r}.")
        contents = [part if isinstance(part, str) else one_image(part) for part in parts]
        sequence = self._begin(contents, max_new_tokens + max_images * (painter.num_tokens + 2))
        if begin_with_image:
            check_length(self.transformer, sequence.length + painter.num_tokens + 2)
        null = painter.read([[config.bos_token_id, config.boi_token_id]]) if guidance_scale != 1 else None
        num_tokens, written = 0, []

        def paint(context: Context) -> Tensor:
            with self.progress_bar(total=painter.num_steps) as progress_bar:
                return painter.paint(context, null, self._step_callback(callback_on_step_end, names, progress_bar))

        def on_token(text: str, count: int) -> None:
            nonlocal num_tokens
            num_tokens += count
            if text and callback_on_text is not None:
                callback_on_text(self, text)

        stream = write_mixed(
            sequence,
            self.vocabulary,
            TextSettings(temperature, top_k, top_p, generator),
            paint=paint,
            num_image_tokens=painter.num_tokens,
            max_new_tokens=max_new_tokens,
            max_images=max_images,
            begin_with_image=begin_with_image,
            on_token=on_token,
        )
        for part in stream:
            written.append(part if isinstance(part, str) else self._output_image(part, settings, output_type))
        nfe = num_tokens + painter.num_steps * sum(not isinstance(part, str) for part in written)
        self.maybe_free_model_hooks()
        output = MixedOutput(parts=written, nfe=nfe)
        return output if return_dict else output.to_tuple()

    def _begin(self, parts: Sequence[str | Tensor], room: int) -> MixedSequence:
        known = self.config.image_size
        for height, width in {tuple(part.shape[-2:]) for part in parts if isinstance(part, Tensor)}:
            if known not in (None, height) or known not in (None, width):
                logger.warning(
                    "An image of %dx%d pixels is read by a transformer that was trained on %dx%d: resize it to these.",
                    height, width, known, known,
                )  # fmt: skip
        return begin_sequence(self.transformer, self.vocabulary, self.image_form, parts, room, self._execution_device)

    def _painter(
        self, settings: PaintingSettings, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> Painter:
        return Painter(self.transformer, self.image_form, self.scheduler, settings, generator, self._execution_device)

    def _output_image(self, latents: Tensor, settings: PaintingSettings, output_type: str) -> Any:
        """One image as ``output_type`` asks."""
        if output_type == "latent":
            return latents[0]
        pixels = self.decode_latents(latents, settings.height, settings.width).float()
        return self.image_processor.postprocess(pixels, output_type=output_type)[0]

    def _callback_inputs(self, callback: Callable | None, names: Sequence[str] | None) -> Sequence[str]:
        return callback_inputs(callback, self._callback_tensor_inputs[:1] if names is None else names)

    def _step_callback(self, callback: Callable | None, names: Sequence[str], progress_bar: Any) -> OnStep:
        """What is done after each step of an image."""

        def on_step(i: int, timestep: float, available: dict[str, Tensor]) -> dict[str, Tensor] | None:
            progress_bar.update()
            if callback is None:
                return None
            return callback(self, i, timestep, {name: available[name] for name in names})

        return on_step
