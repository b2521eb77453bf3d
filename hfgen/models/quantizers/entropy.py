"""Vector quantization with an entropy term that spreads the codes and makes each choice sure."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen.models.modeling import QuantizerOutput
from hfgen.models.quantizers.nearest import full_float32
from hfgen.models.quantizers.vector import VectorQuantizer

# Keeps the logarithms finite, as in the code that the weights were trained with.
_EPS = 1e-5


def codebook_entropy_loss(
    distances: Tensor, temperature: float, assignment: Literal["softmax", "argmax"] = "softmax"
) -> Tensor:
    """E[H(p)] - H(E[p]) of the code probabilities p = softmax(-distances / temperature), a scalar.

    The first term is low where every vector is sure of its code, the second high where all codes are in use. The loss
    of MaskGIT's VQGAN, after Jansen et al. 2020 (arXiv 1911.05894, section 2.3).

    Args:
        distances: (..., num_codes) squared distances, float32.
        temperature: of the softmax.
        assignment: "softmax" averages p itself, "argmax" the one-hot choice with straight-through gradients.
    """
    logits = -distances.flatten(0, -2) / temperature
    probabilities = logits.softmax(dim=-1)
    target = probabilities
    if assignment == "argmax":
        one_hot = F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
        target = probabilities + (one_hot - probabilities).detach()
    sample_entropy = -(target * (logits + _EPS).log_softmax(dim=-1)).sum(dim=-1).mean()
    average = target.mean(dim=0)
    average_entropy = -(average * (average + _EPS).log()).sum()
    return sample_entropy - average_entropy


class EntropyVectorQuantizer(VectorQuantizer):
    """A :class:`VectorQuantizer` trained by gradients, with a term ``entropy`` in its loss.

    Args:
        num_codes, code_dim, commitment_weight, legacy_beta: as in :class:`VectorQuantizer`.
        entropy_weight: weight of :func:`codebook_entropy_loss`; 0 leaves the term out.
        entropy_temperature: its temperature.
        entropy_assignment: its ``assignment``.
        restart_after: as in :class:`VectorQuantizer`.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        commitment_weight: float = 0.25,
        legacy_beta: bool = False,
        entropy_weight: float = 0.1,
        entropy_temperature: float = 0.01,
        entropy_assignment: Literal["softmax", "argmax"] = "softmax",
        restart_after: int = 0,
    ):
        super().__init__(num_codes, code_dim, commitment_weight, restart_after=restart_after, legacy_beta=legacy_beta)
        if entropy_assignment not in ("softmax", "argmax"):
            raise ValueError(f"entropy_assignment={entropy_assignment!r} must be 'softmax' or 'argmax'.")
        if entropy_temperature <= 0:
            raise ValueError(f"entropy_temperature={entropy_temperature} must be above 0.")
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.entropy_assignment = entropy_assignment

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """As in :class:`VectorQuantizer`, with the entropy term; its matrix (B * L, num_codes) is kept in memory."""
        output = super().forward(latents)
        if self.entropy_weight:
            with full_float32(latents.device):
                entropy = self.entropy_weight * codebook_entropy_loss(
                    self.distances(latents), self.entropy_temperature, self.entropy_assignment
                )
            output.loss = output.loss + entropy
            output.losses["entropy"] = entropy.detach()
        return output

    def distances(self, latents: Tensor) -> Tensor:
        """(B, L, num_codes) float32 squared distances of latents (B, C, h, w) or (B, L, C) to all codes."""
        with full_float32(latents.device):
            vectors, codebook = self._vectors(latents), self.embedding.weight.float()
            squares = vectors.square().sum(dim=-1, keepdim=True) + codebook.square().sum(dim=-1)
            return squares - 2 * vectors @ codebook.T

    @torch.no_grad()
    def soft_codes(self, latents: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, L, num_codes) float32 probabilities softmax(-distances / temperature), for soft targets."""
        return (-self.distances(latents) / temperature).softmax(dim=-1)
