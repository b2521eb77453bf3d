"""Reflow: the times of training, the losses of distillation, and the measure of how bent paths are."""

import pytest
import torch

from hfgen.losses.flow import flow_velocity
from hfgen.losses.reflow import one_step_loss, reflow_sigmas, straightness


def pairs():
    draws = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return draws[0], draws[1]


def test_times_cover_the_way_or_the_first_points_of_the_steps():
    uniform = torch.linspace(0, 0.999, 1000)
    reflow = reflow_sigmas(uniform)
    assert reflow.max() == 0.999 and reflow.min() < 2e-3  # never closer to the noise than the margin
    assert torch.equal(reflow_sigmas(uniform, 1), torch.full_like(uniform, 0.999))
    assert reflow_sigmas(uniform, 0).abs().max() == 0
    found, counts = reflow_sigmas(uniform, 4).unique(return_counts=True)
    torch.testing.assert_close(found, 0.999 * torch.tensor([0.25, 0.5, 0.75, 1.0]))
    assert counts.tolist() == [250] * 4
    with pytest.raises(ValueError, match="got -1"):
        reflow_sigmas(uniform, -1)


def test_one_step_losses_compare_the_image_that_is_reached():
    images, noise = pairs()
    velocity = flow_velocity(images, noise) + torch.tensor([0.0, 0.1, 0.2]).reshape(3, 1, 1, 1)
    torch.testing.assert_close(one_step_loss(velocity, images, noise), torch.tensor([0.0, 0.01, 0.04]))

    def perceptual(reached, goal):
        return (reached - goal).abs().mean(dim=(1, 2, 3))

    both = one_step_loss(velocity, images, noise, distance="lpips+l2", perceptual=perceptual)
    torch.testing.assert_close(both, torch.tensor([0.0, 0.11, 0.24]))
    decoded = one_step_loss(
        velocity, images, noise, distance="lpips", perceptual=perceptual, decode=lambda latents: 10 * latents
    )
    torch.testing.assert_close(decoded, torch.tensor([0.0, 1.0, 2.0]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs a perceptual loss"):
        one_step_loss(velocity, images, noise, distance="lpips")
    with pytest.raises(ValueError, match="'l3'"):
        one_step_loss(velocity, images, noise, distance="l3")


def test_straight_paths_have_straightness_zero_whatever_their_speed():
    _, noise = pairs()
    speeds = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    assert straightness(lambda points, sigma: speeds, noise, 5).max() < 1e-9


def test_straightness_is_the_variance_of_the_velocity_along_the_path():
    _, noise = pairs()
    bent = straightness(lambda points, sigma: torch.full_like(points, sigma), noise, 1000, margin=0)
    torch.testing.assert_close(bent, torch.full((3,), noise[0].numel() / 12), rtol=1e-3, atol=0)  # sigma is uniform
