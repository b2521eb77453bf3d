"""What benchmarks/sampling.py compares for VAR: one greedy guided call."""

from __future__ import annotations

from pathlib import Path

import torch
from comparison import Comparison
from plain_var import sample_plain
from torch import Tensor

from hfgen import MultiScaleVQVAE, VARPipeline, VARTransformer

SIZES = ("zoo", *VARTransformer.presets)
ZOO = Path(__file__).resolve().parent.parent / "zoo" / "var-shapes"
GUIDANCE_SCALE = 2.5


def load(size: str, dtype: torch.dtype, device: str) -> VARPipeline:
    """The bundled model, or a published size with seeded random weights (speed does not depend on them)."""
    if size == "zoo":
        pipe = VARPipeline.from_pretrained(ZOO, dtype=dtype)
    else:
        torch.manual_seed(0)
        transformer = VARTransformer.from_preset(size)
        for parameter in transformer.parameters():  # the initial head is nearly constant: greedy codes would be ties
            torch.nn.init.normal_(parameter, std=0.02)
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
        tokenizer = MultiScaleVQVAE.from_preset("var-vqvae-512" if size == "var-d36" else "var-vqvae")
        torch.nn.init.normal_(tokenizer.quantizer.embedding.weight)
        pipe = VARPipeline(tokenizer.eval(), transformer.eval())
        pipe.to(dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_optimised(pipe: VARPipeline, class_labels: list[int]) -> tuple[Tensor, Tensor]:
    """Greedy codes and pixels of the pipeline."""
    codes = []

    def keep(pipe, scale, side, tensors):
        codes.append(tensors["codes"])
        return {}

    images = pipe(
        class_labels,
        guidance_scale=GUIDANCE_SCALE,
        top_k=1,
        top_p=1.0,
        output_type="pt",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["codes"],
    ).images
    return torch.cat(codes, dim=1), images * 2 - 1


def sample_codes_only(pipe: VARPipeline, class_labels: list[int]) -> Tensor:
    """The transformer's part of a call."""
    return pipe(class_labels, guidance_scale=GUIDANCE_SCALE, top_k=1, top_p=1.0, output_type="latent").images


def compare(pipe: VARPipeline, batch: int) -> list[Comparison]:
    labels = [(7 * index) % pipe.transformer.config.num_classes for index in range(batch)]
    return [
        Comparison(
            part="sample",
            batch=batch,
            plain=lambda: sample_plain(pipe, labels, GUIDANCE_SCALE),
            optimised=lambda: sample_optimised(pipe, labels),
            transformer=lambda: sample_codes_only(pipe, labels),
            dtype=pipe.transformer.dtype,
        )
    ]
