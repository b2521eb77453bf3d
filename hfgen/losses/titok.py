"""The objectives that TiTok and its relatives train with (arXiv 2406.07550, section 3.3; arXiv 2501.07730).

Images are in [-1, 1] as everywhere; errors are measured on the scale [0, 1] of the published weights of the terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from hfgen.losses.adversarial import linear_generator_loss


def proxy_code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of stage 1: the decoder predicts the codes that a VQGAN has for the image.

    Args:
        logits: (B, L, num_codes).
        codes: (B, L) int64, the VQGAN's codes in raster order.

    Returns:
        The mean over all codes, a float32 scalar.

    Raises:
        ValueError: the grid of the VQGAN is not that of the decoder, or a code has no logit.
    """
    if logits.shape[:2] != codes.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and codes {tuple(codes.shape)}; expected (B, L, num_codes) and "
            "(B, L). The patches of the decoder must be as large as those of the VQGAN."
        )
    low, high = (bound.item() for bound in codes.aminmax())
    if low < 0 or high >= logits.shape[2]:
        raise ValueError(f"codes lie in [{low}, {high}], but there are {logits.shape[2]} logits.")
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def reconstruction_loss(
    sample: Tensor,
    pixels: Tensor,
    quantizer_loss: Tensor,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    fake_logits: Tensor | None = None,
    reconstruction_weight: float = 1.0,
    l1_weight: float = 0.0,
    perceptual_weight: float = 1.1,
    quantizer_weight: float = 1.0,
    adversarial_weight: float = 0.1,
    log_variance: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The generator's objective of stage 2 and of single-stage training, with fixed weights.

    The defaults are those of single-stage training with codes. With continuous latents ``quantizer_loss`` is the
    divergence and ``quantizer_weight`` 1e-6. Stage 2 has ``perceptual_weight`` 0.1, ``quantizer_weight`` 0 and
    ``adversarial_weight`` 0.01.

    Args:
        sample, pixels: reconstructions and images (B, 3, H, W) in [-1, 1].
        quantizer_loss: ``loss`` of the tokenizer's output, a scalar.
        perceptual: distance of (images, references), (B,), such as :class:`~hfgen.losses.convnext.ConvNeXtDistance`;
            None leaves the term out.
        fake_logits: the discriminator's logits of ``sample``; None until the adversarial term starts.
        l1_weight: weight of the absolute error on the scale [0, 1], which no publication has: it makes small models
            learn sharp images sooner.
        log_variance: of the decoder's Gaussian, by whose variance the squared error is divided.

    Returns:
        The loss, and its weighted terms ``reconstruction``, ``quantizer``, ``perceptual`` and ``adversarial`` and
        ``l1``, detached; the last three only if they are there.
    """
    squared_error = F.mse_loss(sample.float(), pixels.float()) / 4  # [-1, 1] is twice as wide as [0, 1]
    terms = {
        "reconstruction": reconstruction_weight * squared_error / math.exp(log_variance),
        "quantizer": quantizer_weight * quantizer_loss,
    }
    if l1_weight > 0:
        terms["l1"] = l1_weight * F.l1_loss(sample.float(), pixels.float()) / 2
    if perceptual is not None:
        terms["perceptual"] = perceptual_weight * perceptual(sample, pixels).mean()
    if fake_logits is not None:
        terms["adversarial"] = adversarial_weight * linear_generator_loss(fake_logits)
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}
