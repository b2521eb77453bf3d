"""Masked-token sampling as published code does it: the reference that the pipeline is measured against.

The head and the softmax run on all tokens, and the conditional and the unconditional half of every image, one after
the other, in every step, whether or not the step is guided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfgen import MaskGITPipeline
from hfgen.sampling.guidance import guide
from hfgen.sampling.masked_tokens import confidence_of


@torch.no_grad()
def sample_plain(
    pipe: MaskGITPipeline, class_labels: list[int], guidance_scale: float, guidance_schedule: str
) -> tuple[Tensor, Tensor]:
    """Greedy codes (B, N) and pixels (B, 3, H, W) in [-1, 1]."""
    transformer, scheduler = pipe.transformer, pipe.scheduler
    num_tokens, mask_token_id = transformer.num_tokens, transformer.mask_token_id
    labels = torch.tensor(class_labels, device=pipe.device)
    no_class = torch.full_like(labels, transformer.unconditional_label)
    codes = torch.full((len(labels), num_tokens), mask_token_id, device=pipe.device)
    plan = scheduler.plan(
        [num_tokens] * len(labels),
        guidance_scale=guidance_scale,
        guidance_schedule=guidance_schedule,
        token_temperature=0.0,
        choice_temperature=0.0,
    )
    for step in plan:
        conditional = transformer(codes, labels).logits
        unconditional = transformer(codes, no_class).logits
        logits = guide(conditional, unconditional, step.guidance_scale) / step.softmax_temperature
        masked = codes == mask_token_id
        codes = torch.where(masked, logits.argmax(dim=-1), codes)
        confidence = confidence_of(scheduler.config.confidence, logits, codes).masked_fill(~masked, torch.inf)
        again = confidence.argsort(dim=1)[:, : step.num_remasked[0]]
        codes = codes.scatter(1, again, mask_token_id)
    return codes, pipe.decode_latents(codes)
