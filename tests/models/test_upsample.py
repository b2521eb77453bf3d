import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hfgen.counters import generator
from hfgen.models.layers.upsample import NearestUpsampleConv


@pytest.mark.parametrize("size", [(4, 6), (1, 1), (3, 2)])
def test_inference_equals_training_and_the_definition(size):
    torch.manual_seed(0)
    layer = NearestUpsampleConv(nn.Conv2d(5, 7, 3, padding=1))
    inputs = torch.randn(2, 5, *size, generator=generator(0))
    expected = layer.conv(F.interpolate(inputs, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(layer(inputs), expected)
    with torch.no_grad():
        output = layer(inputs)
    assert output.shape == (2, 7, 2 * size[0], 2 * size[1])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_inference_multiplies_less():
    from torch.utils.flop_counter import FlopCounterMode

    layer = NearestUpsampleConv(nn.Conv2d(8, 8, 3, padding=1))
    counts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            layer(torch.zeros(1, 8, 16, 16))
        counts.append(counter.get_total_flops())
    assert counts[1] * 9 == counts[0] * 4
