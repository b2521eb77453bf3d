"""How close reconstructions are to their images: PSNR, SSIM, mean absolute error and codebook usage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hfgen.models.quantizers.usage import codebook_usage

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def psnr(prediction: Tensor, target: Tensor, *, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of every image, from its mean squared error over channels and pixels.

    Args:
        prediction, target: ``(B, C, H, W)``.
        data_range: largest minus smallest possible value: 2 for pixels in [-1, 1], 1 for [0, 1], 255 for uint8.

    Returns:
        float32 ``(B,)``; infinite for equal images.
    """
    prediction, target = _as_float(prediction, target)
    return 10 * torch.log10(data_range**2 / (prediction - target).square().mean(dim=(1, 2, 3)))


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of every image, float32 ``(B,)``."""
    prediction, target = _as_float(prediction, target)
    return (prediction - target).abs().mean(dim=(1, 2, 3))


def ssim(prediction: Tensor, target: Tensor, *, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13) of every image, float32 ``(B,)``.

    Gaussian window of 11 pixels with standard deviation 1.5, K1 = 0.01, K2 = 0.03, population variances, averaged over
    the channels and over the places where the window lies inside of the image.

    Args:
        prediction, target: ``(B, C, H, W)`` with sides of at least 11.
        value_range: the values of black and white. The luminance term compares amounts of light, so SSIM is defined
            for values that start at 0: the images are shifted to it first, and pixels in [-1, 1] score as in [0, 1].
    """
    prediction, target = _as_float(prediction, target)
    batch, channels, height, width = prediction.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"images of {height} x {width} are smaller than the window of SSIM, {SSIM_WINDOW} pixels")
    black, white = value_range
    # Double precision: the variances are small differences of large numbers.
    x, y = (image.reshape(batch * channels, 1, height, width).double() - black for image in (prediction, target))
    offsets = torch.arange(SSIM_WINDOW, device=x.device, dtype=x.dtype) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    window = window / window.sum()

    moments = torch.cat([x, y, x * x, y * y, x * y])
    moments = F.conv2d(moments, window.view(1, 1, 1, -1))
    moments = F.conv2d(moments, window.view(1, 1, -1, 1))
    mean_x, mean_y, square_x, square_y, product = moments.chunk(5)
    variance_x, variance_y = square_x - mean_x**2, square_y - mean_y**2
    covariance = product - mean_x * mean_y
    c1, c2 = (0.01 * (white - black)) ** 2, (0.03 * (white - black)) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).view(batch, -1).mean(dim=1).float()


def reconstruction_metrics(
    prediction: Tensor, target: Tensor, *, codes: Tensor | None = None, num_codes: int | None = None
) -> dict[str, float]:
    """Means over a batch of pixels in [-1, 1]: ``psnr``, ``ssim``, ``l1``, and of its codes if given.

    The prediction is clamped to [-1, 1] first, as it is before an image is shown.

    Args:
        codes: int64 of any shape in [0, num_codes), for ``perplexity`` and ``used_fraction``.
    """
    if (codes is None) != (num_codes is None):
        raise ValueError("codebook usage needs both codes and num_codes: pass both, or neither")
    prediction = prediction.clamp(-1, 1)
    metrics = {
        "psnr": psnr(prediction, target).mean().item(),
        "ssim": ssim(prediction, target).mean().item(),
        "l1": l1(prediction, target).mean().item(),
    }
    if codes is not None:
        metrics.update({name: float(value) for name, value in codebook_usage(codes, num_codes).items()})
    return metrics


def _as_float(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape or prediction.ndim != 4:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must have one shape (B, C, H, W)"
        )
    return prediction.float(), target.float()
