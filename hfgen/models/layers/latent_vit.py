"""Vision transformers between an image and a short sequence of latents.

Yu et al., "An Image is Worth 32 Tokens for Reconstruction and Generation", arXiv 2406.07550, section 3.2: learned
latent tokens travel through the encoder beside the patches, and the decoder fills a grid of mask tokens from them.

Legend: B batch, G tokens of the patch grid, K latents, T text tokens, W width.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from hfgen.models.layers.attention import SelfAttention

_NORM_EPS = 1e-5


class ViTBlock(nn.Module):
    """Pre-norm self-attention and an MLP with the exact GELU, both with biases (arXiv 2010.11929, equations 2 and 3).

    Args:
        width: of the tokens.
        num_heads: divides ``width``.
        mlp_ratio: width of the MLP / ``width``.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: int = 4):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"The width {width} is no multiple of the {num_heads} attention heads.")
        self.norm1 = nn.LayerNorm(width, _NORM_EPS)
        self.attn = SelfAttention(width, num_heads, width // num_heads)
        self.norm2 = nn.LayerNorm(width, _NORM_EPS)
        self.ff = FeedForward(width, inner_dim=mlp_ratio * width, activation_fn="gelu")

    def forward(self, hidden_states: Tensor, kept: slice = slice(None)) -> Tensor:
        """(B, N, W) -> (B, M, W): the ``kept`` ones of the N tokens, of which all are attended to."""
        hidden_states = (hidden_states + self.attn(self.norm1(hidden_states)))[:, kept]
        return hidden_states + self.ff(self.norm2(hidden_states))


class _LatentViT(nn.Module):
    """What both directions share: a class token, learned positions of one image size, and the blocks."""

    def __init__(self, grid_size: int, num_latents: int, width: int, num_layers: int, num_heads: int):
        super().__init__()
        self.grid_tokens = grid_size**2
        self.class_embed = nn.Parameter(torch.empty(1, width))
        self.position_embed = nn.Parameter(torch.empty(self.grid_tokens + 1, width))
        self.latent_position_embed = nn.Parameter(torch.empty(num_latents, width))
        self.norm_pre = nn.LayerNorm(width, _NORM_EPS)
        self.blocks = nn.ModuleList(ViTBlock(width, num_heads) for _ in range(num_layers))
        self.norm_post = nn.LayerNorm(width, _NORM_EPS)
        self.gradient_checkpointing = False

    def _run(self, kept: slice, grid: Tensor, *others: Tensor) -> Tensor:
        """All blocks over [class, grid, others], of which the ``kept`` tokens come out."""
        class_token = self.class_embed.expand(len(grid), 1, -1)
        grid = torch.cat([class_token, grid], dim=1) + self.position_embed
        hidden_states = self.norm_pre(torch.cat([grid, *others], dim=1))
        for block in self.blocks:
            tokens = kept if block is self.blocks[-1] else slice(None)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, tokens)
            else:
                hidden_states = block(hidden_states, tokens)
        return hidden_states

    @torch.no_grad()
    def _init_weights(self) -> None:
        """The published initialisation, and :func:`init_layer` for narrower networks than the published ones."""
        width = self.class_embed.shape[-1]
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                init_layer(module, width)
        for block in self.blocks:
            for projection in (block.attn.to_q, block.attn.to_k, block.attn.to_v):
                # Xavier's bound for the fused projection (3 W, W) of the published network.
                nn.init.uniform_(projection.weight, -((1.5 / width) ** 0.5), (1.5 / width) ** 0.5)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=width**-0.5)


def init_layer(layer: nn.Linear | nn.Conv2d, width: int) -> None:
    """Truncated normal weights and zero bias, for a layer of a network of the given width.

    The published networks, of width 512 and more, start with standard deviation 0.02. In a narrower one that lets so
    little of the image through to the latent tokens that it does not learn to use them; there it is fan_in**-0.5.
    """
    nn.init.trunc_normal_(layer.weight, std=0.02 if width >= 512 else layer.weight[0].numel() ** -0.5)
    nn.init.zeros_(layer.bias)


class LatentViTEncoder(_LatentViT):
    """Images to features of K latent tokens.

    Args:
        grid_size, patch_size: the image has sides ``grid_size * patch_size``.
        num_latents: K.
        width, num_layers, num_heads: sizes of the transformer.
        out_channels: channels of the features.
        reinterpret: read the (K, W) block of latent tokens as (W, K) without a transpose before the last layer, as
            the first published weights need it.
    """

    def __init__(
        self,
        grid_size: int,
        patch_size: int,
        num_latents: int,
        width: int,
        num_layers: int,
        num_heads: int,
        out_channels: int,
        reinterpret: bool,
    ):
        super().__init__(grid_size, num_latents, width, num_layers, num_heads)
        self.reinterpret = reinterpret
        self.latent_tokens = nn.Parameter(torch.empty(num_latents, width))
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.proj_out = nn.Linear(width, out_channels)
        self._init_weights()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, out_channels)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        latents = (self.latent_tokens + self.latent_position_embed).expand(len(images), -1, -1)
        latents = self.norm_post(self._run(slice(1 + self.grid_tokens, None), patches, latents))
        if self.reinterpret:
            latents = latents.reshape(len(latents), latents.shape[2], latents.shape[1]).transpose(1, 2)
        return self.proj_out(latents)


class LatentViTDecoder(_LatentViT):
    """Latents to features of every patch of the grid.

    Args:
        grid_size: patches along each side.
        in_channels: channels of the latents.
        num_latents, width, num_layers, num_heads: as in :class:`LatentViTEncoder`.
        text_length: text tokens T that the decoder also reads; 0 for none.
        text_channels: their channels.
    """

    def __init__(
        self,
        grid_size: int,
        in_channels: int,
        num_latents: int,
        width: int,
        num_layers: int,
        num_heads: int,
        text_length: int,
        text_channels: int,
    ):
        super().__init__(grid_size, num_latents, width, num_layers, num_heads)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.latent_proj = nn.Linear(in_channels, width)
        if text_length:
            self.text_proj = nn.Linear(text_channels, width)
            self.text_position_embed = nn.Parameter(torch.empty(text_length, width))
        self._init_weights()

    def forward(self, latents: Tensor, text_embeds: Tensor | None = None) -> Tensor:
        """(B, K, in_channels), and (B, T, text_channels) if the decoder reads text -> (B, G, W)."""
        others = [self.latent_proj(latents) + self.latent_position_embed]
        if text_embeds is not None:
            others.append(self.text_proj(text_embeds) + self.text_position_embed)
        masks = self.mask_token.expand(len(latents), self.grid_tokens, -1)
        return self.norm_post(self._run(slice(1, 1 + self.grid_tokens), masks, *others))
