from __future__ import annotations

import math

import pytest
import torch

from hfgen.losses.adversarial import (
    adaptive_weight,
    hinge_discriminator_loss,
    linear_generator_loss,
    non_saturating_generator_loss,
    vanilla_discriminator_loss,
)

REAL = torch.tensor([[2.0, 0.5], [-1.0, 1.0]])
FAKE = torch.tensor([[-3.0, -0.5], [1.0, 0.0]])


def test_hinge():
    # real: 0, 0.5, 2, 0; fake: 0, 0.5, 2, 1
    assert hinge_discriminator_loss(REAL, FAKE).item() == pytest.approx(0.5 * (2.5 / 4 + 3.5 / 4))


def test_vanilla_is_cross_entropy():
    logits = torch.cat([REAL, FAKE])
    targets = torch.cat([torch.ones_like(REAL), torch.zeros_like(FAKE)])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert vanilla_discriminator_loss(REAL, FAKE).item() == pytest.approx(expected.item())


def test_generator_losses():
    assert linear_generator_loss(FAKE).item() == pytest.approx(2.5 / 4)
    expected = sum(-math.log(1 / (1 + math.exp(-value))) for value in FAKE.flatten().tolist()) / 4
    assert non_saturating_generator_loss(FAKE).item() == pytest.approx(expected, rel=1e-6)


def test_adaptive_weight():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction = (weight * torch.tensor([6.0, 8.0])).sum()  # gradient of norm 10
    generator = (weight * torch.tensor([0.0, 2.0])).sum()  # of norm 2
    value = adaptive_weight(reconstruction, generator, weight, eps=0.5)
    assert value.item() == pytest.approx(10 / 2.5)
    assert not value.requires_grad and weight.grad is None
    assert adaptive_weight(reconstruction, generator, weight, maximum=3.0).item() == 3.0
    assert adaptive_weight(reconstruction, generator, weight, minimum=7.0).item() == 7.0
    assert adaptive_weight(reconstruction, 0 * generator, weight).item() == 1e4
    (reconstruction + value * generator).backward()  # both graphs are still there
    assert weight.grad.tolist() == [6.0, 16.0]
