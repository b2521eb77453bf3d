import math

import pytest
import torch

from hfgen.sampling.guidance import GUIDANCE_SCHEDULES, guidance_schedule, guide, resolve_guidance


def test_guide_extrapolates_from_the_unconditional_prediction():
    conditional, unconditional = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    torch.testing.assert_close(guide(conditional, unconditional, 3.0), torch.tensor([3.0, -2.0]))
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0), unconditional)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [4, 4, 4, 4, 4]),
        ("linear", [1, 1.75, 2.5, 3.25, 4]),
        ("cosine", [1, 1 + 1.5 * (1 - math.sqrt(0.5)), 2.5, 1 + 1.5 * (1 + math.sqrt(0.5)), 4]),
        ("power-cosine", [1] + [1 + 1.5 * (1 - math.cos(math.pi * r**2)) for r in (0.25, 0.5, 0.75)] + [4]),
        ("interval", [1, 4, 4, 1, 1]),
    ],
)
def test_schedules(name, expected):
    assert guidance_schedule(name, 4.0, 5, interval=(0.2, 0.6)) == pytest.approx(expected)


@pytest.mark.parametrize("name", GUIDANCE_SCHEDULES)
def test_a_scale_of_one_is_off_at_every_step(name):
    assert guidance_schedule(name, 1.0, 4) == [1.0] * 4


def test_one_step_has_a_schedule():
    assert guidance_schedule("linear", 3.0, 1) == [1.0]


def test_wrong_schedules_are_named():
    with pytest.raises(ValueError, match="'ramp'.*power-cosine"):
        guidance_schedule("ramp", 2.0, 4)
    with pytest.raises(ValueError, match=r"interval.*\(0.7, 0.2\)"):
        guidance_schedule("interval", 2.0, 4, interval=(0.7, 0.2))
    with pytest.raises(ValueError, match="3 values.*4 steps"):
        resolve_guidance([1, 2, 3], 2.0, 4)
    assert resolve_guidance([1, 2, 3, 4], 2.0, 4) == [1.0, 2.0, 3.0, 4.0]
