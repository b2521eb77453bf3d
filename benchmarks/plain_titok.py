"""TiTok as published code runs it: the reference that the tokenizer is measured against.

Every token goes through every block, also those of the last block that nobody reads; the distances of all latents to
all codes are one matrix, and a code is looked up by a product with one-hot rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen import TiTok
from hfgen.models.layers.latent_vit import LatentViTDecoder, LatentViTEncoder


def _all_tokens(vit: LatentViTEncoder | LatentViTDecoder, grid: Tensor, latents: Tensor) -> Tensor:
    class_token = vit.class_embed.expand(len(grid), 1, -1)
    hidden_states = torch.cat([torch.cat([class_token, grid], dim=1) + vit.position_embed, latents], dim=1)
    hidden_states = vit.norm_pre(hidden_states)
    for block in vit.blocks:
        hidden_states = block(hidden_states)
    return hidden_states


@torch.no_grad()
def encode_plain(model: TiTok, pixels: Tensor) -> Tensor:
    """Codes (B, K) of pixels (B, 3, S, S) in [-1, 1]."""
    encoder, quantizer = model.encoder, model.quantizer
    patches = encoder.patch_embed(pixels.to(model.dtype) * 0.5 + 0.5).flatten(2).transpose(1, 2)
    latents = (encoder.latent_tokens + encoder.latent_position_embed).expand(len(pixels), -1, -1)
    latents = encoder.norm_post(_all_tokens(encoder, patches, latents)[:, -latents.shape[1] :])
    if encoder.reinterpret:
        latents = latents.reshape(len(latents), latents.shape[2], latents.shape[1]).transpose(1, 2)
    vectors, codebook = encoder.proj_out(latents).float(), quantizer.embedding.weight.float()
    if quantizer.normalize:
        vectors, codebook = F.normalize(vectors, dim=-1), F.normalize(codebook, dim=-1)
    distances = vectors.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * vectors @ codebook.T
    return distances.argmin(dim=-1)


@torch.no_grad()
def decode_plain(model: TiTok, codes: Tensor) -> Tensor:
    """Pixels (B, 3, S, S) of codes (B, K), of a two-stage model."""
    decoder, quantizer = model.decoder, model.quantizer
    latents = F.one_hot(codes, quantizer.codebook_size).float() @ quantizer.embedding.weight.float()
    if quantizer.normalize:
        latents = F.normalize(latents, dim=-1)
    latents = decoder.latent_proj(latents.to(model.dtype)) + decoder.latent_position_embed
    masks = decoder.mask_token.expand(len(codes), decoder.grid_tokens, -1)
    features = decoder.norm_post(_all_tokens(decoder, masks, latents))[:, 1 : 1 + decoder.grid_tokens]
    vectors = model.code_head(features).softmax(dim=-1) @ model.pixel_codebook
    side = model.image_size // model.config.decoder_patch_size
    return model.pixel_decoder(vectors.transpose(1, 2).unflatten(2, (side, side))) * 2 - 1
