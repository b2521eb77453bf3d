"""What benchmarks/sampling.py compares for masked-token generators: one greedy call with growing guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comparison import Comparison
from plain_maskgit import sample_plain
from torch import Tensor

from hfgen import ImageBert, MaskGITPipeline, MaskGITTransformer, MaskGITVQGAN, TiTok, UViTBert
from hfgen.models.generators.masked import MaskedTokenTransformer

GUIDANCE_SCALE, GUIDANCE_SCHEDULE = 4.0, "linear"


def _tiny() -> tuple[MaskGITVQGAN, MaskedTokenTransformer]:
    tokenizer = MaskGITVQGAN(256, 16, 32, (1, 1, 2), 1, norm_num_groups=8, image_size=32)
    return tokenizer, MaskGITTransformer(
        256, 64, 24, unconditional_class=True, hidden_size=128, num_layers=4, num_attention_heads=4,
        intermediate_size=512,
    )  # fmt: skip


def _maskgit() -> tuple[MaskGITVQGAN, MaskedTokenTransformer]:
    """The published sizes, with a row for "no class", which the released weights lack."""
    return MaskGITVQGAN.from_preset("maskgit-vqgan-256"), MaskGITTransformer(unconditional_class=True)


SIZES: dict[str, Callable[[], tuple[torch.nn.Module, MaskedTokenTransformer]]] = {
    "tiny": _tiny,
    "maskgit-256": _maskgit,
    "titok-l32": lambda: (TiTok.from_preset("titok-l-32"), ImageBert.from_preset("titok-l32")),
    "titok-b64": lambda: (TiTok.from_preset("titok-b-64"), ImageBert.from_preset("titok-b64")),
    "titok-s128": lambda: (TiTok.from_preset("titok-s-128"), UViTBert.from_preset("titok-s128")),
}


def load(size: str, dtype: torch.dtype, device: str) -> MaskGITPipeline:
    """A size with seeded random weights (speed does not depend on them)."""
    torch.manual_seed(0)
    tokenizer, transformer = SIZES[size]()
    for parameter in transformer.parameters():  # the initial weights hardly tell one token from the next
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    pipe = MaskGITPipeline(tokenizer.eval(), transformer.eval())
    pipe.to(dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_codes(pipe: MaskGITPipeline, class_labels: list[int]) -> Tensor:
    """The transformer's part of a call."""
    return pipe(
        class_labels,
        guidance_scale=GUIDANCE_SCALE,
        guidance_schedule=GUIDANCE_SCHEDULE,
        token_temperature=0.0,
        choice_temperature=0.0,
        output_type="latent",
    ).images


def sample_optimised(pipe: MaskGITPipeline, class_labels: list[int]) -> tuple[Tensor, Tensor]:
    """Greedy codes and pixels of the pipeline."""
    codes = sample_codes(pipe, class_labels)
    return codes, pipe.decode_latents(codes)


def compare(pipe: MaskGITPipeline, batch: int) -> list[Comparison]:
    labels = [(7 * index) % pipe.transformer.config.num_classes for index in range(batch)]
    return [
        Comparison(
            part="sample",
            batch=batch,
            plain=lambda: sample_plain(pipe, labels, GUIDANCE_SCALE, GUIDANCE_SCHEDULE),
            optimised=lambda: sample_optimised(pipe, labels),
            transformer=lambda: sample_codes(pipe, labels),
            dtype=pipe.transformer.dtype,
        )
    ]
