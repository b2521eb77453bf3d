import math

import numpy as np
import pytest
import torch

from hfgen.evaluation.reconstruction import l1, psnr, reconstruction_metrics, ssim


def pair(size=16):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, size, size + 3, generator=generator) * 2 - 1
    return (target + 0.2 * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


def brute_force_ssim(x, y):
    """Wang et al. 2004 for values in [0, 1], with loops over every window."""
    window = np.array(
        [[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2)) for j in range(11)] for i in range(11)]
    )
    window /= window.sum()
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for channel in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = x[channel, i : i + 11, j : j + 11], y[channel, i : i + 11, j : j + 11]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                values.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


def test_ssim_equals_its_definition():
    prediction, target = ((image + 1) / 2 for image in pair())
    expected = [brute_force_ssim(x, y) for x, y in zip(prediction.double().numpy(), target.double().numpy())]
    np.testing.assert_allclose(ssim(prediction, target, value_range=(0, 1)), expected, rtol=1e-5)
    np.testing.assert_allclose(ssim(*pair()), expected, rtol=1e-5)
    np.testing.assert_allclose(ssim(prediction * 255, target * 255, value_range=(0, 255)), expected, rtol=1e-5)


def test_ssim_limits():
    _, target = pair()
    torch.testing.assert_close(ssim(target, target), torch.ones(2))
    assert (ssim(-target, target) < 0).all()
    with pytest.raises(ValueError, match="8 x 11 are smaller"):
        ssim(*pair(8))


def test_psnr_and_l1():
    target = torch.zeros(2, 3, 4, 4)
    prediction = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), -0.02)])
    torch.testing.assert_close(psnr(prediction, target), torch.tensor([20.0, 40.0]))
    torch.testing.assert_close(psnr(prediction * 127.5, target, data_range=255.0), torch.tensor([20.0, 40.0]))
    torch.testing.assert_close(l1(prediction, target), torch.tensor([0.2, 0.02]))
    assert psnr(target, target).isinf().all()
    with pytest.raises(ValueError, match="one shape"):
        psnr(target, target[:1])


def test_batch_metrics():
    prediction, target = pair()
    metrics = reconstruction_metrics(prediction * 3, target)
    assert set(metrics) == {"psnr", "ssim", "l1"}
    assert metrics["psnr"] == pytest.approx(psnr((prediction * 3).clamp(-1, 1), target).mean().item())
    codes = torch.tensor([[0, 1], [0, 1]])
    usage = reconstruction_metrics(prediction, target, codes=codes, num_codes=8)
    assert usage["perplexity"] == pytest.approx(2) and usage["used_fraction"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="both codes and num_codes"):
        reconstruction_metrics(prediction, target, codes=codes)
