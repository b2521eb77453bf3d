"""Vector quantization with one codebook, trained by gradients or by moving averages."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfgen.models.modeling import QuantizerOutput
from hfgen.models.quantizers.nearest import full_float32, nearest_code
from hfgen.models.quantizers.restart import DeadCodeRestart
from hfgen.models.quantizers.usage import check_codes, code_counts, sum_over_ranks


class VectorQuantizer(nn.Module):
    """Replaces every latent vector z by the nearest code e.

    Neural Discrete Representation Learning (van den Oord et al. 2017, arXiv 1711.00937). The straight-through
    estimator hands the decoder's gradient to the encoder. Two terms of equation 3 train the rest, each a mean over all
    elements:

    - ``commitment``, ``beta * mse(sg(e), z)``, moves the encoder towards the codes.
    - ``codebook``, ``mse(e, sg(z))``, moves the codes towards the encoder. With ``codebook_update="ema"`` the codes
      follow moving averages instead and the term is absent (appendix A.1, equations 6 to 8): with n the number of
      vectors of a code in the step and s their sum, cluster_size = g cluster_size + (1 - g) n, embedding_sum =
      g embedding_sum + (1 - g) s, e = embedding_sum / cluster_size. Sizes are first moved towards each other by
      ``ema_eps`` (Laplace smoothing), so that no code divides by zero.

    Latents are (B, C, h, w) or (B, L, C); codes are (B, L), grids in raster order. Everything is computed in float32.
    Moving averages and restarts change in train mode only and count the vectors of all processes.

    Args:
        num_codes: size of the codebook.
        code_dim: channels of latents and codes.
        commitment_weight: beta.
        codebook_update: "gradient" or "ema".
        ema_decay: g of the moving averages.
        ema_eps: strength of the Laplace smoothing.
        restart_after: training steps without a hit after which a code moves to a random latent of the batch (see
            :class:`DeadCodeRestart`); 0 never restarts.
        normalize: compare latents and codes as unit vectors and put out unit vectors, as LlamaGen does (arXiv
            2406.06525, section 3.1). Both loss terms and the straight-through estimator then see the unit vectors. The
            forward pass is also that of ViT-VQGAN.
        legacy_beta: weight the codebook term with beta instead of the commitment term, as checkpoints of taming
            transformers were trained. Not with "ema", which has no codebook term.

    The codebook starts uniform in +-1 / num_codes.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        commitment_weight: float = 0.25,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        ema_decay: float = 0.99,
        ema_eps: float = 1e-5,
        restart_after: int = 0,
        normalize: bool = False,
        legacy_beta: bool = False,
    ):
        super().__init__()
        if codebook_update not in ("gradient", "ema"):
            raise ValueError(f"codebook_update={codebook_update!r} must be 'gradient' or 'ema'.")
        if legacy_beta and codebook_update == "ema":
            raise ValueError("legacy_beta weights the codebook term, which codebook_update='ema' does not have.")
        self.codebook_weight, self.commitment_weight = 1.0, commitment_weight
        if legacy_beta:
            self.codebook_weight, self.commitment_weight = commitment_weight, 1.0
        self.ema = codebook_update == "ema"
        self.ema_decay = ema_decay
        self.ema_eps = ema_eps
        self.normalize = normalize
        self.embedding = nn.Embedding(num_codes, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        if self.ema:
            self.embedding.weight.requires_grad_(False)
            # Every code starts as the mean of one vector, itself.
            self.register_buffer("cluster_size", torch.ones(num_codes, dtype=torch.float32))
            self.register_buffer("embedding_sum", self.embedding.weight.detach().float().clone())
        self.restart = DeadCodeRestart(num_codes, restart_after) if restart_after else None

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.embedding.num_embeddings

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """Quantize latents (B, C, h, w) or (B, L, C).

        Returns:
            ``latents`` in the layout and dtype of the input; ``codes`` (B, L); ``loss`` and its weighted terms in
            ``losses``, float32 scalars.
        """
        with full_float32(latents.device):
            vectors = self._vectors(latents)
            codes = self._nearest(vectors)
            quantized = self._lookup(codes)
            losses = {"commitment": self.commitment_weight * F.mse_loss(vectors, quantized.detach())}
            if not self.ema:
                losses["codebook"] = self.codebook_weight * F.mse_loss(quantized, vectors.detach())
            if vectors.requires_grad:
                quantized = vectors + (quantized - vectors).detach()
            if self.training and (self.ema or self.restart is not None):
                self._update_codebook(codes.flatten(), vectors.detach().flatten(0, 1))
        if latents.ndim == 4:
            quantized = quantized.transpose(1, 2).unflatten(2, latents.shape[2:])
        return QuantizerOutput(
            latents=quantized.to(latents.dtype),
            codes=codes,
            loss=sum(losses.values()),
            losses={name: term.detach() for name, term in losses.items()},
        )

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """Codes (B, L) of latents (B, C, h, w) or (B, L, C)."""
        with full_float32(latents.device):
            return self._nearest(self._vectors(latents))

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 latents (B, L, C) of codes (B, L), or a grid (B, C, h, w) of codes (B, h, w)."""
        check_codes(codes, self.codebook_size)
        if codes.ndim not in (2, 3):
            raise ValueError(f"codes have shape {tuple(codes.shape)}, expected (B, L) or (B, h, w).")
        latents = self._lookup(codes)
        return latents if codes.ndim == 2 else latents.permute(0, 3, 1, 2)

    def _vectors(self, latents: Tensor) -> Tensor:
        """Latents as float32 rows (B, L, C), of unit length if the quantizer normalizes."""
        channels = self.embedding.embedding_dim
        if latents.ndim not in (3, 4) or latents.shape[1 if latents.ndim == 4 else 2] != channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected (B, {channels}, h, w) or (B, L, {channels})."
            )
        vectors = latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors.float()

    def _nearest(self, vectors: Tensor) -> Tensor:
        codebook = self.embedding.weight.float()
        if self.normalize:
            codebook = F.normalize(codebook, dim=-1)
        return nearest_code(vectors.flatten(0, 1), codebook).view(vectors.shape[:2])

    def _lookup(self, codes: Tensor) -> Tensor:
        vectors = F.embedding(codes, self.embedding.weight).float()
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    @torch.no_grad()
    def _update_codebook(self, codes: Tensor, vectors: Tensor) -> None:
        """One step of the moving averages and of the restarts; ``codes`` (N,), ``vectors`` (N, C)."""
        counts = code_counts(codes, self.codebook_size)
        if self.ema:
            sums = vectors.new_zeros(self.codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)
            self.cluster_size.lerp_(counts.to(self.cluster_size.dtype), 1 - self.ema_decay)
            self.embedding_sum.lerp_(sum_over_ranks(sums).to(self.embedding_sum.dtype), 1 - self.ema_decay)
            total = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.ema_eps) / (total + self.codebook_size * self.ema_eps) * total
            self.embedding.weight.copy_(self.embedding_sum / smoothed.unsqueeze(1))
        if self.restart is not None:
            dead, replacements = self.restart(counts, vectors)
            self.embedding.weight[dead] = replacements.to(self.embedding.weight.dtype)
            if self.ema:
                self.cluster_size[dead] = 1
                self.embedding_sum[dead] = replacements.to(self.embedding_sum.dtype)
