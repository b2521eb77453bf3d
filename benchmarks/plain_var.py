"""VAR sampling as the published code does it: the reference that the pipeline is measured against.

Keys and values are concatenated scale by scale, every block's modulation is computed again at each scale for every
sequence, and the head runs on both halves of the guided batch whether or not the scale is guided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfgen import VARPipeline
from hfgen.models.generators.var import VARCache
from hfgen.sampling.guidance import guidance_schedule, guide


class ConcatenatingCache:
    """A key-value cache that grows by concatenation; it stands in for ``KVCache``."""

    def __init__(self, num_layers: int):
        self.stored: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.stored[layer] is not None:
            old_key, old_value = self.stored[layer]
            key, value = torch.cat([old_key, key], dim=1), torch.cat([old_value, value], dim=1)
        self.stored[layer] = key, value
        return key, value

    def advance(self, num_tokens: int) -> None:
        """Concatenation needs no count."""


@torch.no_grad()
def sample_plain(pipe: VARPipeline, class_labels: list[int], guidance_scale: float) -> tuple[Tensor, Tensor]:
    """Greedy codes (B, L) and pixels (B, 3, H, W) in [-1, 1]."""
    transformer, quantizer = pipe.transformer, pipe.vq_model.quantizer
    config, sides = transformer.config, transformer.patch_nums
    labels = torch.tensor(class_labels, device=pipe.device)
    labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    batch_size = len(class_labels)
    rows = torch.arange(len(labels), device=pipe.device)
    condition = transformer.class_embed(labels)
    kv = ConcatenatingCache(config.num_layers)
    f_hat = torch.zeros(batch_size, config.code_dim, sides[-1], sides[-1], device=pipe.device)
    latents, all_codes = None, []
    for scale, (side, weight) in enumerate(zip(sides, guidance_schedule("linear", guidance_scale, len(sides)))):
        cache = VARCache(kv, rows, config.num_layers)  # a new one knows no modulation
        logits = transformer.forward_scale(latents, condition, cache, scale, num_logit_rows=len(labels))
        codes = guide(*logits.chunk(2), weight).argmax(dim=-1)
        embeddings = quantizer.lookup(codes).transpose(1, 2).unflatten(-1, (side, side))
        f_hat, latents = quantizer.accumulate(f_hat, embeddings, scale)
        all_codes.append(codes)
    return torch.cat(all_codes, dim=1), pipe.decode_latents(f_hat)
