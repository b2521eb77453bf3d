"""Sampling, in- and out-painting and class editing with masked-token generators (MaskGIT, arXiv 2202.04200; TiTok)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from hfgen.models.generators.masked import MaskedTokenTransformer
from hfgen.models.modeling import PortablePipelineMixin
from hfgen.pipelines.class_labels import (
    ClassLabels,
    ClassNamesMixin,
    class_ids,
    ordered_class_names,
    saved_class_names,
)
from hfgen.pipelines.editing import blend_edit, check_edit, painted_tokens
from hfgen.pipelines.inputs import (
    Images,
    after_callback,
    callback_inputs,
    check_callback_inputs,
    check_common,
    check_generators,
    to_mask,
    to_pixels,
)
from hfgen.pipelines.outputs import ImageGenerationOutput
from hfgen.publishing import PublishMixin
from hfgen.sampling.guidance import guide
from hfgen.sampling.masked_tokens import gumbel_draws, masked_positions
from hfgen.schedulers.masked_token import MaskedTokenScheduler, MaskedTokenStep


@runtime_checkable
class DiscreteTokenizer(Protocol):
    """An image tokenizer with a fixed number of codes: a grid in raster order, or a sequence without places."""

    codebook_size: int
    num_tokens: int

    def encode(self, pixels: Tensor) -> Any: ...

    def decode_codes(self, codes: Tensor) -> Any: ...


class MaskGITPipeline(ClassNamesMixin, PublishMixin, PortablePipelineMixin, DiffusionPipeline):
    """Class-conditional image generation by masked-token prediction.

    Args:
        vq_model: any discrete tokenizer with a fixed number of codes.
        transformer: the generator, for codebook size and number of codes of the tokenizer.
        scheduler: the sampling rule; None takes that of the published weights of the transformer's class.
        class_names: name of each class in order, so that labels can be given by name; or label -> name, as saved.

    Raises:
        ValueError: tokenizer and transformer do not fit together.
    """

    model_cpu_offload_seq = "transformer->vq_model"
    _optional_components = ["scheduler"]
    _callback_tensor_inputs = ["codes", "predicted_codes", "logits"]

    def __init__(
        self,
        vq_model: DiscreteTokenizer,
        transformer: MaskedTokenTransformer,
        scheduler: MaskedTokenScheduler | None = None,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
    ):
        super().__init__()
        class_names = ordered_class_names(class_names)
        _check_components(vq_model, transformer, class_names)
        if scheduler is None:
            scheduler = MaskedTokenScheduler.from_preset(transformer.default_scheduler)
        if not isinstance(scheduler, MaskedTokenScheduler):
            raise ValueError(f"scheduler is a {type(scheduler).__name__}, expected a MaskedTokenScheduler.")
        self.register_modules(vq_model=vq_model, transformer=transformer, scheduler=scheduler)
        self.register_to_config(class_names=saved_class_names(class_names))
        self.image_processor = VaeImageProcessor()

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> MaskGITPipeline:
        """As in diffusers, which would only take over models of exactly the classes that the constructor names."""
        models = {name: model for name, model in pipeline.components.items() if name in ("vq_model", "transformer")}
        return super().from_pipe(pipeline, **{**models, **kwargs})

    def check_inputs(
        self,
        class_labels: ClassLabels | None,
        num_images_per_prompt: int,
        guidance_scale: float | None,
        image: Images | None,
        mask_image: PIL.Image.Image | Tensor | None,
        mask_margin: int,
        mask_blur: float | None,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ``ValueError`` for arguments that cannot be sampled with; the scheduler checks the others."""
        hint = "A published scale of the form cond + s (cond - uncond) is guidance_scale - 1."
        check_common(num_images_per_prompt, guidance_scale, published=hint)
        if (image is None) != (mask_image is None):
            raise ValueError("Editing needs both image and mask_image; only one of them was given.")
        if mask_margin < 0:
            raise ValueError(f"mask_margin must be at least 0 tokens, got {mask_margin}.")
        if mask_blur is not None and not (math.isfinite(mask_blur) and mask_blur >= 0):
            raise ValueError(f"mask_blur must be a finite number of at least 0 pixels (0 is off), got {mask_blur}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        batch_size = len(self.prepare_labels(class_labels, num_images_per_prompt, "cpu"))
        check_generators(generator, batch_size)
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

    def prepare_labels(
        self, class_labels: ClassLabels | None, num_images_per_prompt: int, device: torch.device | str
    ) -> Tensor:
        """Labels as (B,) int64, each repeated ``num_images_per_prompt`` times; None is the unconditional class.

        Raises:
            ValueError: an unknown name, a label out of range, or None for a transformer without such a class.
        """
        unconditional = self.transformer.unconditional_label
        if class_labels is None:
            if unconditional is None:
                raise ValueError("This transformer has no unconditional class: give class_labels.")
            class_labels = [unconditional]
        num_classes = self.transformer.config.num_classes
        ids = class_ids(class_labels, self.class_names, num_classes, unconditional=unconditional is not None)
        return torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt)

    def prepare_edit(
        self,
        image: Images,
        mask_image: PIL.Image.Image | Tensor,
        batch_size: int,
        device: torch.device | str,
        mask_margin: int = 0,
    ) -> Tensor:
        """The codes of an image with the tokens to paint masked.

        Args:
            image: PIL, or pixels (1 or B, 3, H, W) in [-1, 1], of the size that the tokenizer is for.
            mask_image: PIL or a tensor ending in (height, width), in [0, 1]: 1 (white) is painted anew, 0 is kept.
                A token with any such pixel is painted.
            batch_size: B.
            device: of the result.
            mask_margin: tokens by which the painted area grows on each side.

        Returns:
            (B, N) int64.

        Raises:
            ValueError: the tokenizer has no grid; the image or the mask have another size or range; nothing is masked.
        """
        if self.grid_size is None:
            raise ValueError(
                f"A {type(self.vq_model).__name__} has no grid of tokens, so that no part of an image can be painted "
                "anew; use a pipeline with a grid tokenizer."
            )
        factor, side = self.vq_model.downsample_factor, self.vq_model.image_size
        pixels, paint = to_pixels(image), to_mask(mask_image)
        check_edit(pixels, paint, side, batch_size)
        codes = self.vq_model.encode(pixels.to(device)).codes.expand(batch_size, -1)
        masked = painted_tokens(paint.to(device), factor, mask_margin).expand(batch_size, -1)
        if not masked.any(dim=1).all():
            raise ValueError("mask_image masks no token, so there is nothing to paint; white is painted anew.")
        return codes.masked_fill(masked, self.transformer.mask_token_id)

    def decode_latents(self, codes: Tensor) -> Tensor:
        """Complete codes (B, N) -> pixels (B, 3, H, W) in [-1, 1], such as ``predicted_codes`` of a callback.

        Raises:
            ValueError: another number of codes, a masked token, or a code that the tokenizer has not.
        """
        if codes.ndim != 2 or codes.shape[1] != self.vq_model.num_tokens:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected (batch, {self.vq_model.num_tokens}).")
        if codes.min() < 0 or codes.max() >= self.vq_model.codebook_size:
            raise ValueError(
                f"Only complete codes in [0, {self.vq_model.codebook_size - 1}] make an image, got [{codes.min()}, "
                f"{codes.max()}]; in a callback use predicted_codes."
            )
        return self.vq_model.decode_codes(codes).sample.clamp(-1, 1)

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Rows and columns of the tokens, None if the tokenizer does not put them on a grid."""
        factor = getattr(self.vq_model, "downsample_factor", None)
        side = getattr(self.vq_model, "image_size", None)
        if factor is None or side is None or (side // factor) ** 2 != self.vq_model.num_tokens:
            return None
        return (side // factor, side // factor)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | Sequence[float] | None = None,
        token_temperature: float | None = None,
        choice_temperature: float | None = None,
        image: Images | None = None,
        mask_image: PIL.Image.Image | Tensor | None = None,
        mask_margin: int = 0,
        mask_blur: float | None = None,
        first_step: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[MaskGITPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("codes",),
    ) -> ImageGenerationOutput | tuple:
        """Generate images, or edit one.

        Args:
            class_labels: a class, by index or name, or a list of them; None is unconditional.
            num_images_per_prompt: images per label.
            num_inference_steps: T; None takes the scheduler's, as for the four arguments that follow.
            guidance_scale: w of classifier-free guidance at full strength, 1 is off.
            guidance_schedule: how w changes from step to step: a name of ``hfgen.sampling.guidance``, or a list of
                one scale per step.
            token_temperature: of the draw of codes, before annealing; 0 takes the likeliest.
            choice_temperature: of the choice of the tokens that stay, before annealing.
            image: an image to edit, PIL or pixels (1 or B, 3, H, W) in [-1, 1], together with ``mask_image``; needs a
                grid tokenizer.
            mask_image: white (1) where to paint anew. With a class label this edits towards the class, without one it
                is in-painting (mask the inside) or out-painting (mask the outside).
            mask_margin: tokens by which the painted area grows on each side; MaskGIT's editor uses 1.
            mask_blur: the pixels around the painted tokens are those of the given image, with a soft edge: this is
                the standard deviation in pixels of its Gaussian blur. None is that of MaskGIT's editor, side / 16 - 1;
                0 is a hard edge between tokens. What the tokenizer makes of all codes, without the given pixels, is
                ``decode_latents`` of output_type="latent".
            first_step: the steps before it are left out; MaskGIT's editor uses 2 of 12.
            generator: one generator for the batch, or a list with one per image, which makes each image independent
                of the others in its batch.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent", the codes (B, N).
            return_dict: return an :class:`ImageGenerationOutput` instead of a tuple.
            callback_on_step_end: called after each step as ``callback(pipe, i, masked, tensors)`` with the largest
                number of masked tokens left; it may return {"codes": ...} with as many masked tokens to change them.
                :class:`hfgen.pipelines.steps.StepRecorder` makes an animation of the steps.
            callback_on_step_end_tensor_inputs: which of "codes" (B, N) with masked tokens, "predicted_codes" (B, N)
                without, and "logits" (B, M, V), guided, of the tokens that were masked, it gets.

        Returns:
            ``images`` and ``nfe``, the number of steps.
        """
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            class_labels,
            num_images_per_prompt,
            guidance_scale,
            image,
            mask_image,
            mask_margin,
            mask_blur,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device, transformer = self._execution_device, self.transformer
        labels = self.prepare_labels(class_labels, num_images_per_prompt, device)
        mask_token_id, num_tokens = transformer.mask_token_id, transformer.num_tokens
        if image is None:
            codes = torch.full((len(labels), num_tokens), mask_token_id, device=device)
            num_masked = [num_tokens] * len(labels)
        else:
            codes = self.prepare_edit(image, mask_image, len(labels), device, mask_margin)
            painted = codes == mask_token_id
            num_masked = painted.sum(dim=1).tolist()
        plan = self.scheduler.plan(
            num_masked,
            num_inference_steps,
            num_tokens=num_tokens,
            first_step=first_step,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            token_temperature=token_temperature,
            choice_temperature=choice_temperature,
        )
        # Guiding an unconditional image by itself changes nothing, so its second half is not computed.
        guidable = class_labels is not None
        if guidable and transformer.unconditional_label is None and any(step.guidance_scale != 1 for step in plan):
            raise ValueError("This transformer has no unconditional class, so only guidance_scale=1 is possible.")

        predicted = codes
        with self.progress_bar(total=len(plan)) as progress_bar:
            for i, step in enumerate(plan):
                positions = masked_positions(codes, mask_token_id, step.num_positions)
                predict = self._predict_first if i == 0 and image is None else self._predict
                logits = predict(codes, labels, positions, step.guidance_scale if guidable else 1.0)
                noise = self._draw_noise(step, logits, generator)
                codes, predicted = self.scheduler.step(
                    logits, codes, positions, step, mask_token_id, *noise, return_dict=False
                )
                if callback_on_step_end is not None:
                    available = {"codes": codes, "predicted_codes": predicted, "logits": logits}
                    tensors = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, max(step.num_remasked), tensors)
                    changed = after_callback(returned, "codes", codes)
                    if changed is not codes:
                        _check_changed(changed, step, transformer)
                        codes = changed
                        predicted = codes if i + 1 == len(plan) else predicted
                progress_bar.update()

        images = predicted
        if output_type != "latent":
            pixels = self.decode_latents(predicted).float()
            if image is not None:
                blur = max(pixels.shape[-1] // 16 - 1, 0) if mask_blur is None else mask_blur
                pixels = blend_edit(pixels, to_pixels(image), painted.unflatten(1, self.grid_size), blur)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, len(plan))
        return ImageGenerationOutput(images=images, nfe=len(plan))

    def _predict(self, codes: Tensor, labels: Tensor, positions: Tensor, scale: float) -> Tensor:
        """(B, M, V) float32, the guided logits of the tokens at ``positions``."""
        if scale == 1:
            return self.transformer.forward_positions(codes, labels, positions)
        unconditional = torch.full_like(labels, self.transformer.unconditional_label)
        both = self.transformer.forward_positions(
            codes.repeat(2, 1), torch.cat([labels, unconditional]), positions.repeat(2, 1)
        )
        return guide(*both.chunk(2), scale)

    def _predict_first(self, codes: Tensor, labels: Tensor, positions: Tensor, scale: float) -> Tensor:
        """As :meth:`_predict` while all tokens of all images are masked.

        Images of one class are still alike and so are all without a class: the transformer sees each class once.
        """
        classes, image_classes = labels.unique(return_inverse=True)
        rows = classes
        if scale != 1:
            rows = torch.cat([classes, classes.new_tensor([self.transformer.unconditional_label])])
        logits = self.transformer.forward_positions(
            codes[:1].expand(len(rows), -1), rows, positions[:1].expand(len(rows), -1)
        )
        if scale != 1:
            logits = guide(logits[:-1], logits[-1:], scale)
        return logits[image_classes]

    def _draw_noise(
        self, step: MaskedTokenStep, logits: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gumbel noise for the codes and for the choice, where the step has any."""
        token_noise = choice_noise = None
        if step.token_temperature:
            token_noise = gumbel_draws(step.num_masked, logits.shape[-1:], generator, logits.device)
        if step.choice_temperature and any(step.num_remasked):
            choice_noise = gumbel_draws(step.num_masked, (), generator, logits.device)
        return token_noise, choice_noise


def _check_components(
    vq_model: DiscreteTokenizer, transformer: MaskedTokenTransformer, class_names: Sequence[str] | None
) -> None:
    if not isinstance(vq_model, DiscreteTokenizer) or vq_model.codebook_size is None:
        raise ValueError(
            f"{type(vq_model).__name__} is no discrete tokenizer with a fixed number of codes: it has no "
            "codebook_size, num_tokens, encode or decode_codes."
        )
    if not isinstance(transformer, MaskedTokenTransformer):
        raise ValueError(f"{type(transformer).__name__} is no masked-token generator of hfgen.")
    pairs = (
        ("codebook sizes", vq_model.codebook_size, transformer.config.num_codes),
        ("numbers of codes per image", vq_model.num_tokens, transformer.config.num_tokens),
    )
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(
                f"Tokenizer and transformer have different {what}: {ours} and {theirs}; use the tokenizer that the "
                "transformer was trained with."
            )
    num_classes = transformer.config.num_classes
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"Got {len(class_names)} class_names for {num_classes} classes; give one each.")


def _check_changed(codes: Tensor, step: MaskedTokenStep, transformer: MaskedTokenTransformer) -> None:
    """The plan counts on the masked tokens, so a callback can change codes but not how many are masked."""
    transformer.check_codes(codes)
    masked = tuple((codes == transformer.mask_token_id).sum(dim=1).tolist())
    if masked != step.num_remasked:
        raise ValueError(
            f"The codes that the callback returned have {masked} masked tokens, expected {step.num_remasked}; move "
            "masked tokens, or change the others, but keep their number."
        )
