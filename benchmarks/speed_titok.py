"""What benchmarks/sampling.py compares for TiTok: encoding and decoding of two-stage models."""

from __future__ import annotations

import torch
from comparison import Comparison
from plain_titok import decode_plain, encode_plain

from hfgen import TiTok
from hfgen.counters import generator

SIZES = ("tiny", "titok-s-128", "titok-b-64", "titok-l-32")


def load(size: str, dtype: torch.dtype, device: str) -> TiTok:
    """A size with seeded random weights (speed does not depend on them)."""
    torch.manual_seed(0)
    if size == "tiny":
        model = TiTok(
            image_size=32, encoder_patch_size=4, decoder_patch_size=4, num_latent_tokens=16, latent_channels=8,
            num_codes=256, normalize_codes=True, encoder_width=128, encoder_layers=4, encoder_heads=4,
            decoder_width=128, decoder_layers=4, decoder_heads=4, two_stage=True, num_proxy_codes=64,
            proxy_channels=16, pixel_channels=(32, 32, 64), pixel_layers_per_block=1, pixel_norm_num_groups=8,
        )  # fmt: skip
    else:
        model = TiTok.from_preset(size)
    return model.eval().to(device, dtype)


def compare(model: TiTok, batch: int) -> list[Comparison]:
    draws, size = generator(0), model.image_size
    pixels = (torch.rand(batch, 3, size, size, generator=draws) * 2 - 1).to(model.device, model.dtype)
    codes = torch.randint(model.codebook_size, (batch, model.num_tokens), generator=draws).to(model.device)
    return [
        Comparison(
            part="encode",
            batch=batch,
            plain=lambda: (encode_plain(model, pixels), None),
            optimised=lambda: (model.encode(pixels).codes, None),
            transformer=lambda: model.features(pixels),
            dtype=model.dtype,
        ),
        Comparison(
            part="decode",
            batch=batch,
            plain=lambda: (None, decode_plain(model, codes)),
            optimised=lambda: (None, model.decode_codes(codes).sample),
            transformer=lambda: model.proxy_logits(model.quantizer.decode(codes)),
            dtype=model.dtype,
        ),
    ]
