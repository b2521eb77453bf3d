"""Vector quantization whose rarely used codes follow the features."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from hfgen.models.modeling import QuantizerOutput
from hfgen.models.quantizers.nearest import full_float32, nearest_code
from hfgen.models.quantizers.usage import code_counts, world_size
from hfgen.models.quantizers.vector import VectorQuantizer

_STRENGTH = 10  # how fast a code stops to move as its usage grows


class ClusteringVectorQuantizer(VectorQuantizer):
    """A :class:`VectorQuantizer` trained by gradients that also pulls little used codes towards encoder features.

    Online Clustered Codebook (Zheng and Vedaldi 2023, arXiv 2307.15139, equations 4 to 6, with the nearest feature as
    anchor), as TA-TiTok is trained. After each forward pass in train mode, with u the share of each of the N codes in
    the batch: p <- g p + (1 - g) u, a = exp(-10 p N / (1 - g) - 1e-3), and code <- (1 - a) code + a feature, where the
    feature is the one of the batch that is nearest to the code. Batches are those of all processes, which must be of
    equal size.

    Args:
        num_codes, code_dim, commitment_weight, normalize: as in :class:`VectorQuantizer`.
        decay: g.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        commitment_weight: float = 0.25,
        normalize: bool = False,
        decay: float = 0.99,
    ):
        super().__init__(num_codes, code_dim, commitment_weight, normalize=normalize)
        self.decay = decay
        self.register_buffer("usage", torch.zeros(num_codes, dtype=torch.float32))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        """As in :class:`VectorQuantizer`; in train mode the codebook changes after the result was computed."""
        output = super().forward(latents)
        if self.training:
            with full_float32(latents.device):
                self._cluster(latents.detach(), output.codes)
        return output

    @torch.no_grad()
    def _cluster(self, latents: Tensor, codes: Tensor) -> None:
        rows = latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents
        features = _over_ranks(rows.flatten(0, 1).float())  # codes move towards features as they are, not normalized
        compared, codebook = _over_ranks(self._vectors(latents).flatten(0, 1)), self._lookup_all()
        anchors = features[nearest_code(codebook, compared)]

        counts = code_counts(codes, self.codebook_size).to(self.usage.dtype)
        self.usage.lerp_(counts / counts.sum(), 1 - self.decay)
        pull = (-_STRENGTH * self.codebook_size / (1 - self.decay) * self.usage.float() - 1e-3).exp()
        weight = self.embedding.weight
        weight.copy_(weight.float().lerp(anchors, pull[:, None]))

    def _lookup_all(self) -> Tensor:
        return self._lookup(torch.arange(self.codebook_size, device=self.embedding.weight.device))


def _over_ranks(rows: Tensor) -> Tensor:
    """The rows of all processes, which have equally many, in the order of their ranks."""
    if world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    distributed.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
