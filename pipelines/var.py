"""Sampling, in- and out-painting and class editing with VAR (Tian et al., arXiv 2404.02905)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from hfgen.models.generators.var import VARTransformer
from hfgen.models.modeling import PortablePipelineMixin
from hfgen.models.quantizers.multiscale import MultiScaleResidualQuantizer
from hfgen.models.tokenizers.multiscale_vqvae import MultiScaleVQVAE
from hfgen.pipelines.class_labels import (
    ClassLabels,
    ClassNamesMixin,
    label_rows,
    ordered_class_names,
    saved_class_names,
)
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
from hfgen.sampling.guidance import resolve_guidance
from hfgen.sampling.logits import exponential_draws, filter_logits, sample_codes
from hfgen.sampling.next_scale import keep_mask_at_scale, smooth_probabilities


class VARPipeline(ClassNamesMixin, PublishMixin, PortablePipelineMixin, DiffusionPipeline):
    """Class-conditional image generation by next-scale prediction.

    Args:
        vq_model: the multi-scale VQ-VAE.
        transformer: the VAR transformer; both have the same ``patch_nums``, codebook size and latent channels.
        class_names: name of each class in order, so that labels can be given by name; or label -> name, as saved.

    Raises:
        ValueError: tokenizer and transformer do not fit together.
    """

    model_cpu_offload_seq = "transformer->vq_model"
    _callback_tensor_inputs = ["f_hat", "codes", "logits"]

    def __init__(
        self,
        vq_model: MultiScaleVQVAE,
        transformer: VARTransformer,
        class_names: Sequence[str] | Mapping[str, str] | None = None,
    ):
        super().__init__()
        class_names = ordered_class_names(class_names)
        _check_components(vq_model, transformer, class_names)
        self.register_modules(vq_model=vq_model, transformer=transformer)
        self.register_to_config(class_names=saved_class_names(class_names))
        self.image_processor = VaeImageProcessor(vae_scale_factor=vq_model.downsample_factor)

    def check_inputs(
        self,
        class_labels: ClassLabels,
        num_images_per_prompt: int,
        guidance_scale: float,
        temperature: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise a ``ValueError`` for arguments that cannot be sampled with."""
        check_common(num_images_per_prompt, guidance_scale, published="A published `cfg` is guidance_scale - 1.")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be above 0, got {temperature}; for the likeliest codes use top_k=1.")
        num_codes = self.transformer.config.num_codes
        if not 0 <= top_k <= num_codes:
            raise ValueError(f"top_k must be between 0 (off) and the {num_codes} codes, got {top_k}.")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], where 1 is off, got {top_p}.")
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
            ValueError: an unknown name, or a label outside [0, num_classes].
        """
        num_classes = self.transformer.config.num_classes
        return label_rows(class_labels, self.class_names, num_classes, num_images_per_prompt, device)

    def prepare_edit(
        self, image: Images, mask_image: PIL.Image.Image | Tensor, batch_size: int, device: torch.device
    ) -> tuple[list[Tensor], Tensor]:
        """The codes of the image to edit and what of it to keep.

        Args:
            image: PIL, or pixels (1 or B, 3, H, W) in [-1, 1], of the model's size.
            mask_image: PIL or a tensor ending in (height, width), in [0, 1]: 1 (white) is painted anew, 0 is kept.
            batch_size: B.

        Returns:
            Codes per scale, each (B, p_k^2), and the keep mask (B, 1, P, P) float.
        """
        pixels = to_pixels(image)
        side = self.vq_model.image_size
        if pixels.shape[-2:] != (side, side):
            raise ValueError(
                f"The image to edit is {pixels.shape[-1]}x{pixels.shape[-2]} pixels, but the model makes "
                f"{side}x{side}; resize or crop it, for example with image.resize(({side}, {side}))."
            )
        repaint = to_mask(mask_image)
        for name, value in (("image", pixels), ("mask_image", repaint)):
            if value.shape[0] not in (1, batch_size):
                raise ValueError(
                    f"{name} has a batch of {value.shape[0]}, but there are {batch_size} images; give one or all."
                )
        codes = self.vq_model.encode(pixels.to(device)).codes
        codes = codes.expand(batch_size, -1).split(self.transformer.scale_lengths, dim=1)
        keep = F.adaptive_avg_pool2d(1 - repaint.to(device), self.transformer.patch_nums[-1])
        return list(codes), keep.expand(batch_size, -1, -1, -1)

    def decode_latents(self, f_hat: Tensor) -> Tensor:
        """Latents (B, C, P, P) -> pixels (B, 3, H, W) in [-1, 1], also for the unfinished latents of a callback."""
        return self.vq_model.decode(f_hat).sample.clamp(-1, 1)

    @property
    def num_timesteps(self) -> int:
        """Scales, that is steps, of a call."""
        return len(self.transformer.patch_nums)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        *,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 2.5,
        guidance_schedule: str | Sequence[float] = "linear",
        temperature: float = 1.0,
        top_k: int = 900,
        top_p: float = 0.96,
        smooth: bool = False,
        image: Images | None = None,
        mask_image: PIL.Image.Image | Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[VARPipeline, int, int, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("f_hat",),
    ) -> ImageGenerationOutput | tuple:
        """Generate images, or edit one.

        Args:
            class_labels: a class, by index or name, or a list of them; ``num_classes`` or None is unconditional.
            num_images_per_prompt: images per label.
            guidance_scale: w of classifier-free guidance at full strength, 1 is off. A published ``cfg`` is w - 1.
            guidance_schedule: how w grows from scale to scale: a name of ``hfgen.sampling.guidance`` ("linear" is the
                published one), or a list of one scale per step.
            temperature: the guided logits are divided by it.
            top_k: draw among the k likeliest codes, 0 is off, 1 takes the likeliest; the codebook size if smaller.
            top_p: then draw within this probability mass, 1 is off.
            smooth: mix code embeddings by a Gumbel-softmax instead of drawing one; nicer to look at, not for
                evaluation.
            image: an image to edit, PIL or pixels (1 or B, 3, H, W) in [-1, 1], together with ``mask_image``.
            mask_image: white (1) where to paint anew. With a class label this edits towards the class, without one it
                is in-painting (mask the inside) or out-painting (mask the outside).
            generator: one generator for the batch, or a list with one per image, which makes each image independent
                of the others in its batch.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: return an :class:`ImageGenerationOutput` instead of a tuple.
            callback_on_step_end: called after each scale as ``callback(pipe, scale, side, tensors)``; it may return
                {"f_hat": ...} to change the latents. ``pipe.decode_latents(tensors["f_hat"])`` shows the image so far.
            callback_on_step_end_tensor_inputs: which of "f_hat" (B, C, P, P), "codes" (B, side^2) and "logits"
                (B, side^2, V), guided and filtered, it gets.

        Returns:
            ``images`` and ``nfe``, the number of scales.
        """
        num_codes = self.transformer.config.num_codes
        top_k = min(top_k, num_codes)
        callback_on_step_end_tensor_inputs = callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            class_labels,
            num_images_per_prompt,
            guidance_scale,
            temperature,
            top_k,
            top_p,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        if (image is None) != (mask_image is None):
            raise ValueError("Editing needs both image and mask_image; only one of them was given.")
        patch_nums = self.transformer.patch_nums
        schedule = resolve_guidance(guidance_schedule, guidance_scale, len(patch_nums))
        device = self._execution_device

        labels = self.prepare_labels(class_labels, num_images_per_prompt, device)
        batch_size = len(labels)
        unconditional = torch.full_like(labels, self.transformer.config.num_classes)
        # Guiding an unconditional image by itself changes nothing, so its second half is not computed.
        guided = class_labels is not None and any(scale != 1 for scale in schedule)
        edit = None if image is None else self.prepare_edit(image, mask_image, batch_size, device)

        quantizer = self._quantizer_on(device)
        shape = (batch_size, self.transformer.config.code_dim, patch_nums[-1], patch_nums[-1])
        f_hat = torch.zeros(shape, device=device)
        next_input = None
        cache, condition = self.transformer.new_cache(torch.cat([labels, unconditional]) if guided else labels)
        with self.progress_bar(total=len(patch_nums)) as progress_bar:
            for scale, side in enumerate(patch_nums):
                logits = self.transformer.forward_scale(
                    next_input, condition, cache, scale, batch_size, schedule[scale] if guided else 1.0
                )
                if temperature != 1:
                    logits = logits / temperature
                logits = filter_logits(logits, top_k=top_k, top_p=top_p)
                draws = None if top_k == 1 else exponential_draws(logits.shape, generator, device)
                codes = sample_codes(logits, draws)
                if smooth:
                    draws = exponential_draws(logits.shape, generator, device)
                    weights = smooth_probabilities(logits, draws, scale / max(len(patch_nums) - 1, 1))
                    embeddings = weights @ quantizer.embedding.weight.float()
                else:
                    embeddings = quantizer.lookup(codes)
                embeddings = embeddings.transpose(1, 2).unflatten(-1, (side, side))  # (B, C, side, side)
                if edit is not None:
                    true_codes, keep = edit
                    true_embeddings = quantizer.lookup(true_codes[scale]).transpose(1, 2).unflatten(-1, (side, side))
                    embeddings = torch.where(keep_mask_at_scale(keep, side), true_embeddings, embeddings)
                f_hat, next_input = quantizer.accumulate(f_hat, embeddings, scale)
                if callback_on_step_end is not None:
                    available = {"f_hat": f_hat, "codes": codes, "logits": logits}
                    tensors = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    changed = after_callback(callback_on_step_end(self, scale, side, tensors), "f_hat", f_hat)
                    if changed is not f_hat:
                        f_hat = changed
                        if next_input is not None:
                            next_input = F.adaptive_avg_pool2d(f_hat, next_input.shape[-2:])
                progress_bar.update()

        images = f_hat
        if output_type != "latent":
            images = self.image_processor.postprocess(self.decode_latents(f_hat).float(), output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, len(patch_nums))
        return ImageGenerationOutput(images=images, nfe=len(patch_nums))

    def _quantizer_on(self, device: torch.device) -> MultiScaleResidualQuantizer:
        """The quantizer where the sampling runs.

        While the transformer runs, offloading may keep the tokenizer on another device. Its quantizer is small and
        needed at every scale, so the call works on a copy rather than moving the tokenizer back and forth.
        """
        quantizer = self.vq_model.quantizer
        here = quantizer.embedding.weight.device
        return quantizer if here.type in (device.type, "meta") else copy.deepcopy(quantizer).to(device)


def _check_components(
    vq_model: MultiScaleVQVAE, transformer: VARTransformer, class_names: Sequence[str] | None
) -> None:
    tokenizer, generator = vq_model.config, transformer.config
    pairs = (
        ("patch_nums", tuple(tokenizer.patch_nums), tuple(generator.patch_nums)),
        ("codebook size", tokenizer.num_codes, generator.num_codes),
        ("latent channels", tokenizer.latent_channels, generator.code_dim),
    )
    for what, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(
                f"Tokenizer and transformer have different {what}: {ours} and {theirs}; use the tokenizer that the "
                "transformer was trained with."
            )
    if class_names is not None and len(class_names) != generator.num_classes:
        raise ValueError(f"Got {len(class_names)} class_names for {generator.num_classes} classes; give one each.")
