"""Losses of a discriminator that judges reconstructions, on its logits of any shape.

Hinge loss (Lim and Ye, arXiv 1705.02894), the original loss (Goodfellow et al., arXiv 1406.2661) and VQGAN's adaptive
weight (Esser et al., arXiv 2012.09841, equation 7).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean relu(1 - D(x)) + mean relu(1 + D(x'))) / 2."""
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def vanilla_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """(mean softplus(-D(x)) + mean softplus(D(x'))) / 2: cross entropy of real against fake."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def linear_generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(x'): the generator's side of the hinge loss; VQGAN uses it with both discriminator losses."""
    return -fake_logits.mean()


def non_saturating_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-D(x')): -log of the probability that the discriminator gives to real."""
    return F.softplus(-fake_logits).mean()


def adaptive_weight(
    reconstruction_loss: Tensor,
    generator_loss: Tensor,
    last_layer: Tensor,
    *,
    eps: float = 1e-4,
    minimum: float = 0.0,
    maximum: float = 1e4,
) -> Tensor:
    """clamp(|d reconstruction / d w| / (|d generator / d w| + eps), minimum, maximum), w the last layer's weight.

    It balances the two gradients where they enter the decoder. Both losses keep their graphs.

    Args:
        reconstruction_loss, generator_loss: scalars that depend on ``last_layer``.
        last_layer: weight of the decoder's last convolution, of the module itself and not of a wrapper.

    Returns:
        A detached scalar.
    """
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (generator_gradient,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    weight = reconstruction_gradient.norm() / (generator_gradient.norm() + eps)
    return weight.clamp(minimum, maximum).detach()


def r1_penalty(logits: Tensor, pixels: Tensor) -> Tensor:
    """Squared norm of the gradient of an image's mean logit by its pixels in [0, 1] (arXiv 1801.04406, eq. 9)."""
    (gradient,) = torch.autograd.grad(logits.mean(dim=(1, 2, 3)).sum(), pixels, create_graph=True)
    return (2 * gradient.float()).square().sum(dim=(1, 2, 3)).mean()  # [-1, 1] is twice as wide as [0, 1]
