"""The multi-scale residual quantizer of VAR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfgen.models.modeling import QuantizerOutput
from hfgen.models.quantizers.nearest import full_float32, nearest_code
from hfgen.models.quantizers.restart import DeadCodeRestart
from hfgen.models.quantizers.usage import check_codes, code_counts

PatchNums = Sequence[int | Sequence[int]]


def scale_sizes(patch_nums: PatchNums) -> tuple[tuple[int, int], ...]:
    """``patch_nums`` as (height, width) pairs; an integer stands for a square."""
    sizes = tuple((size, size) if isinstance(size, int) else (size[0], size[1]) for size in patch_nums)
    if not sizes or min(min(size) for size in sizes) < 1:
        raise ValueError(f"patch_nums={patch_nums!r} must be a non-empty list of positive sizes, coarse to fine.")
    return sizes


def residual_conv_index(scale: int, num_scales: int, num_convs: int) -> int:
    """Which of ``num_convs`` residual convs the scale number ``scale`` of ``num_scales`` uses.

    The one whose tick is nearest to the scale's position in [0, 1], the first of equally near ones. Ticks are the
    centres of ``num_convs`` equal intervals, except that four convs have ticks from 1/12 to 11/12. Many positions lie
    midway between two ticks and float64 rounding decides, so the operations and their order are those of
    ``numpy.linspace``.
    """
    margin = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    first, last = margin, 1 - margin
    step = (last - first) / max(num_convs - 1, 1)
    ticks = [tick * step + first for tick in range(num_convs)]
    if num_convs > 1:
        ticks[-1] = last
    position = scale / max(num_scales - 1, 1)
    distances = [abs(tick - position) for tick in ticks]
    return distances.index(min(distances))


def draw_num_scales(batch_size: int, num_scales: int, dropout: float, generator: torch.Generator) -> Tensor:
    """How many scales to keep of each image under quantizer dropout: (batch_size,) int64 on the generator's device.

    With probability ``dropout`` a uniform number below ``num_scales``, else all of them.
    """
    device = generator.device
    fewer = torch.randint(1, num_scales, (batch_size,), generator=generator, device=device)
    dropped = torch.rand(batch_size, generator=generator, device=device) < dropout
    return fewer.where(dropped, num_scales)


class MultiScaleResidualQuantizer(nn.Module):
    """Residual quantization over a pyramid of code maps with one shared codebook.

    Visual Autoregressive Modeling (Tian et al. 2024, arXiv 2404.02905), section 3.2, algorithms 1 and 2. Starting from
    the features f, each scale area-downsamples the residual to its size, takes the nearest codes, upsamples them
    (bicubic) to the size of f, passes them through a residual conv phi(h) = (1 - a) h + a conv(h) and moves the result
    from the residual to the sum f_hat. The last scale has the size of f and is not resized.

    The loss is the mean over scales k of ``commitment_weight * mse(sg(f_hat_k), f) + mse(f_hat_k, sg(f))`` with
    f_hat_k the sum up to scale k: the first term trains the encoder, the second the codes and the residual convs. The
    straight-through estimator passes the decoder's gradient to the encoder only.

    Everything is computed in float32 whatever the dtype of weights, inputs and autocast. Codes are int64, each scale
    in raster order, scales concatenated coarse to fine: (B, L) with L the sum of all h * w. Every method that takes
    ``patch_nums`` accepts another list of scales than the constructor's, of integers or (height, width) pairs; its
    last entry must be the size of f. The weights do not depend on the list.

    Args:
        num_codes: size of the codebook.
        code_dim: channels of the features and codes.
        patch_nums: side length of each scale, coarse to fine.
        residual_conv_ratio: a, in [0, 1]; 0 leaves the residual convs out.
        num_residual_convs: n >= 1 convs, which the scales share by their position; 0 makes one per entry of
            ``patch_nums``. With n above the number of scales some convs are never used and get no gradient.
        cosine_codes: choose codes by cosine similarity. The sum still takes codes as they are.
        commitment_weight: weight of the encoder's loss term (beta).
        restart_after: training steps without a hit after which a code moves to a random residual of the batch (see
            :class:`DeadCodeRestart`); 0 never restarts.

    The codebook starts uniform in +-1 / (36 sqrt(code_dim)), the initialisation of the authors' VAE trainer.
    """

    def __init__(
        self,
        num_codes: int = 4096,
        code_dim: int = 32,
        patch_nums: PatchNums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        residual_conv_ratio: float = 0.5,
        num_residual_convs: int = 4,
        cosine_codes: bool = False,
        commitment_weight: float = 0.25,
        restart_after: int = 0,
    ):
        super().__init__()
        if not 0 <= residual_conv_ratio <= 1:
            raise ValueError(f"residual_conv_ratio={residual_conv_ratio} must be between 0 and 1.")
        self.sizes = scale_sizes(patch_nums)
        self.residual_conv_ratio = residual_conv_ratio
        self.cosine_codes = cosine_codes
        self.commitment_weight = commitment_weight
        self.embedding = nn.Embedding(num_codes, code_dim)
        bound = 1 / (36 * code_dim**0.5)
        nn.init.uniform_(self.embedding.weight, -bound, bound)
        num_convs = (num_residual_convs or len(self.sizes)) if residual_conv_ratio else 0
        self.residual_convs = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(num_convs))
        self.restart = DeadCodeRestart(num_codes, restart_after) if restart_after else None

    @property
    def codebook_size(self) -> int:
        """The number of codes."""
        return self.embedding.num_embeddings

    @property
    def num_tokens(self) -> int:
        """L: the codes of one image over all scales."""
        return sum(height * width for height, width in self.sizes)

    def forward(
        self, latents: Tensor, patch_nums: PatchNums | None = None, *, num_scales: Tensor | None = None
    ) -> QuantizerOutput:
        """Quantize features (B, code_dim, P, P).

        Args:
            num_scales: (B,) int64 in 1..number of scales, the scales that each image's ``latents`` sum up; by default
                all. Random numbers make quantizer dropout (SoundStream, Zeghidour et al. 2021, arXiv 2107.03312,
                section III-C), which teaches the coarse codes to stand on their own. ``codes`` and ``loss`` are always
                those of all scales.

        Returns:
            ``latents`` f_hat in the dtype of the input, with straight-through gradients; ``codes`` (B, L); ``loss``
            and its two weighted terms ``losses["commitment"]`` and ``losses["codebook"]``, float32 scalars.
        """
        sizes = self._sizes(patch_nums)
        features = latents.float()
        codes, residuals, sums = [], [], []
        commitment = codebook = features.new_zeros(())
        with full_float32(latents.device):
            for scale_codes, residual, f_hat in self._scales(features, sizes):
                codes.append(scale_codes)
                residuals.append(residual)
                sums.append(f_hat)
                commitment = commitment + F.mse_loss(features, f_hat.detach())
                codebook = codebook + F.mse_loss(f_hat, features.detach())
        commitment = commitment * (self.commitment_weight / len(sizes))
        codebook = codebook / len(sizes)
        codes = torch.cat(codes, dim=1)
        if self.training and self.restart is not None:
            self._restart_dead_codes(codes, torch.cat(residuals))
        if num_scales is not None:
            f_hat = torch.stack(sums)[num_scales - 1, torch.arange(len(features), device=features.device)]
        if features.requires_grad:
            quantized = features + (f_hat - features).detach()
        else:
            quantized = f_hat.detach()
        return QuantizerOutput(
            latents=quantized.to(latents.dtype),
            codes=codes,
            loss=commitment + codebook,
            losses={"commitment": commitment.detach(), "codebook": codebook.detach()},
        )

    @torch.no_grad()
    def encode(self, latents: Tensor, patch_nums: PatchNums | None = None) -> Tensor:
        """Codes (B, L) of features (B, code_dim, P, P)."""
        with full_float32(latents.device):
            scales = self._scales(latents.float(), self._sizes(patch_nums))
            return torch.cat([codes for codes, _, _ in scales], dim=1)

    def decode(self, codes: Tensor, patch_nums: PatchNums | None = None, *, all_to_max_scale: bool = True) -> Tensor:
        """The sum f_hat (B, code_dim, P, P), float32, of codes (B, L).

        ``all_to_max_scale=False`` gives an experimental variant of the official code, for which the model was not
        trained: f_hat starts at the size of the first scale and is itself resized (bicubic) from scale to scale.
        """
        if all_to_max_scale:
            return self.f_hat_per_scale(codes, patch_nums)[-1]
        sizes = self._sizes(patch_nums)
        f_hat = None
        with full_float32(codes.device):
            for scale, embeddings in enumerate(self._embeddings(codes, sizes)):
                added = self._residual_conv(embeddings, scale, len(sizes))
                f_hat = added if f_hat is None else F.interpolate(f_hat, sizes[scale], mode="bicubic") + added
        return f_hat

    def f_hat_per_scale(self, codes: Tensor, patch_nums: PatchNums | None = None) -> list[Tensor]:
        """The sum after each scale, every one (B, code_dim, P, P) float32, of codes (B, L)."""
        sizes = self._sizes(patch_nums)
        sums: list[Tensor] = []
        with full_float32(codes.device):
            for scale, embeddings in enumerate(self._embeddings(codes, sizes)):
                added = self._to_full_size(embeddings, scale, sizes)
                sums.append(sums[-1] + added if sums else added)
        return sums

    @torch.no_grad()
    def generator_inputs(self, codes: Tensor, patch_nums: PatchNums | None = None) -> Tensor:
        """What a next-scale generator reads under teacher forcing: (B, L - p_1^2, code_dim), float32.

        For every scale after the first, the true sum up to the scale before, area-downsampled to the scale's size.

        Args:
            codes: (B, L) true codes.
        """
        sizes = self._sizes(patch_nums)
        weight = self.embedding.weight
        f_hat = weight.new_zeros(len(codes), weight.shape[1], *sizes[-1], dtype=torch.float32)
        inputs = [f_hat.new_zeros(len(codes), 0, weight.shape[1])]
        for scale, scale_codes in enumerate(self.split(codes, sizes)[:-1]):
            embeddings = self._grid(scale_codes, sizes[scale])
            f_hat, next_input = self.accumulate(f_hat, embeddings, scale, sizes)
            inputs.append(next_input.flatten(2).transpose(1, 2))
        return torch.cat(inputs, dim=1)

    def accumulate(
        self, f_hat: Tensor, embeddings: Tensor, scale: int, patch_nums: PatchNums | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Add one scale to the sum: a step of next-scale generation.

        Args:
            f_hat: (B, code_dim, P, P) float32, the sum so far, zeros before scale 0. Not changed.
            embeddings: (B, code_dim, p, p), the codes (or a soft mixture of codes) of this scale.
            scale: index of this scale.

        Returns:
            The new sum, and that sum area-downsampled to the next scale (B, code_dim, p', p'), None after the last.
        """
        sizes = self._sizes(patch_nums)
        with full_float32(f_hat.device):
            f_hat = f_hat + self._to_full_size(embeddings.float(), scale, sizes)
            if scale == len(sizes) - 1:
                return f_hat, None
            return f_hat, F.interpolate(f_hat, sizes[scale + 1], mode="area")

    def lookup(self, codes: Tensor) -> Tensor:
        """The codes' vectors (..., code_dim), float32, of ids of any shape."""
        return F.embedding(codes, self.embedding.weight).float()

    def split(self, codes: Tensor, patch_nums: PatchNums | None = None) -> list[Tensor]:
        """Codes (B, L) as one (B, h * w) tensor per scale."""
        sizes = self._sizes(patch_nums)
        lengths = [height * width for height, width in sizes]
        if codes.ndim != 2 or codes.shape[1] != sum(lengths):
            raise ValueError(
                f"codes have shape {tuple(codes.shape)}, but the scales {sizes} need (batch, {sum(lengths)}); "
                "pass the patch_nums that the codes were made with."
            )
        return list(codes.split(lengths, dim=1))

    def residual_conv_index(self, scale: int, num_scales: int) -> int:
        """Which residual conv the scale number ``scale`` of ``num_scales`` uses."""
        return residual_conv_index(scale, num_scales, len(self.residual_convs))

    def _sizes(self, patch_nums: PatchNums | None) -> tuple[tuple[int, int], ...]:
        return self.sizes if patch_nums is None else scale_sizes(patch_nums)

    def _scales(self, features: Tensor, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each scale: codes (B, h * w), the vectors (B * h * w, C) that they stand for, and f_hat so far."""
        if features.ndim != 4 or features.shape[1] != self.embedding.embedding_dim or features.shape[2:] != sizes[-1]:
            raise ValueError(
                f"latents have shape {tuple(features.shape)}, expected "
                f"(batch, {self.embedding.embedding_dim}, {sizes[-1][0]}, {sizes[-1][1]}) for patch_nums {sizes}."
            )
        residual = features.detach()
        f_hat = torch.zeros_like(residual)
        for scale, size in enumerate(sizes):
            target = residual if scale == len(sizes) - 1 else F.interpolate(residual, size, mode="area")
            rows = target.permute(0, 2, 3, 1).flatten(0, 2)
            codes = nearest_code(rows, self.embedding.weight, cosine=self.cosine_codes).view(len(features), -1)
            added = self._to_full_size(self._grid(codes, size), scale, sizes)
            f_hat = f_hat + added
            residual = residual - added.detach()
            yield codes, rows, f_hat

    def _embeddings(self, codes: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The code vectors of each scale (B, C, h, w), after a check of all ids."""
        check_codes(codes, self.codebook_size)
        return [self._grid(scale_codes, size) for scale_codes, size in zip(self.split(codes, sizes), sizes)]

    def _grid(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        return self.lookup(codes).transpose(1, 2).unflatten(2, size)

    def _to_full_size(self, embeddings: Tensor, scale: int, sizes: Sequence[tuple[int, int]]) -> Tensor:
        if scale < len(sizes) - 1:
            embeddings = F.interpolate(embeddings, sizes[-1], mode="bicubic")
        return self._residual_conv(embeddings, scale, len(sizes))

    def _residual_conv(self, hidden: Tensor, scale: int, num_scales: int) -> Tensor:
        if not self.residual_convs:
            return hidden
        conv = self.residual_convs[self.residual_conv_index(scale, num_scales)]
        ratio = self.residual_conv_ratio
        return hidden * (1 - ratio) + ratio * F.conv2d(hidden, conv.weight.float(), conv.bias.float(), padding=1)

    @torch.no_grad()
    def _restart_dead_codes(self, codes: Tensor, residuals: Tensor) -> None:
        dead, vectors = self.restart(code_counts(codes, self.codebook_size), residuals)
        self.embedding.weight[dead] = vectors.to(self.embedding.weight.dtype)
