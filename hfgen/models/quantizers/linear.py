"""Codes as classes: a linear layer and a softmax tell the code of a latent vector."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfgen.models.modeling import QuantizerOutput
from hfgen.models.quantizers.nearest import full_float32
from hfgen.models.quantizers.usage import check_codes


class _Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype of its weights."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class LinearQuantizer(nn.Module):
    """The likeliest of K classes is the code of a latent vector, and a table has the vector of each class.

    With p the softmax of ``projection(z)`` and e the row of the table of its largest entry, the loss is the
    ``reconstruction`` term ``mse(e, sg(z))``. Its gradient reaches the table directly and the projection by the
    straight-through estimator, as if the result were the mean of all rows weighted by p; with Gumbel noise the choice
    is a draw from p (Jang et al., arXiv 1611.01144, at temperature 1).

    Latents are (B, C, h, w) or (B, L, C); codes are (B, L), grids in raster order. Everything is computed in float32.

    Args:
        num_codes: K.
        code_dim: C.
    """

    def __init__(self, num_codes: int, code_dim: int):
        super().__init__()
        self.projection = _Float32Linear(code_dim, num_codes)
        self.embedding = nn.Embedding(num_codes, code_dim)

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.embedding.num_embeddings

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> QuantizerOutput:
        """Quantize latents (B, C, h, w) or (B, L, C).

        Args:
            generator: of Gumbel noise; without one the likeliest class is taken.

        Returns:
            ``latents`` in the layout and dtype of the input; ``codes`` (B, L); ``loss`` and its term in ``losses``,
            float32 scalars.
        """
        with full_float32(latents.device):
            vectors, logits = self._vectors(latents), self.logits(latents)
            if generator is not None:
                draws = torch.empty(logits.shape, device=generator.device).exponential_(generator=generator)
                logits = logits - draws.log().to(logits.device)
            codes, probabilities = logits.argmax(dim=-1), logits.softmax(dim=-1)
            chosen = F.one_hot(codes, self.codebook_size) + (probabilities - probabilities.detach())
            quantized = chosen @ self.embedding.weight.float()
            loss = F.mse_loss(quantized, vectors.detach())
        if latents.ndim == 4:
            quantized = quantized.transpose(1, 2).unflatten(2, latents.shape[2:])
        return QuantizerOutput(
            latents=quantized.to(latents.dtype), codes=codes, loss=loss, losses={"reconstruction": loss.detach()}
        )

    def logits(self, latents: Tensor) -> Tensor:
        """(B, L, K) float32 of latents (B, C, h, w) or (B, L, C); their softmax is the distribution of the code."""
        with full_float32(latents.device):
            return self.projection(self._vectors(latents))

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, L) of latents (B, C, h, w) or (B, L, C)."""
        return self.logits(latents).argmax(dim=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 latents (B, L, C) of codes (B, L), or a grid (B, C, h, w) of codes (B, h, w)."""
        check_codes(codes, self.codebook_size)
        if codes.ndim not in (2, 3):
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected (B, L) or (B, h, w).")
        latents = F.embedding(codes, self.embedding.weight).float()
        return latents if codes.ndim == 2 else latents.permute(0, 3, 1, 2)

    def _vectors(self, latents: Tensor) -> Tensor:
        """Latents as float32 rows (B, L, C)."""
        channels = self.embedding.embedding_dim
        if latents.ndim not in (3, 4) or latents.shape[1 if latents.ndim == 4 else 2] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (B, {channels}, h, w) or (B, L, {channels})."
            )
        return (latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents).float()
