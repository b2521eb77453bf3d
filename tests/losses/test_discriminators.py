from __future__ import annotations

import pytest
import torch
from torch import nn

from hfgen.models.layers.discriminators import PatchDiscriminator


@pytest.mark.parametrize(
    ("num_layers", "convolutions", "norms"), [(3, [0, 2, 5, 8, 11], [3, 6, 9]), (2, [0, 2, 5, 8], [3, 6])]
)
def test_layout_is_that_of_the_published_checkpoints(num_layers, convolutions, norms):
    names = PatchDiscriminator(base_channels=4, num_layers=num_layers).state_dict()
    expected = {f"main.{k}.weight" for k in convolutions} | {
        f"main.{k}.bias" for k in (convolutions[0], convolutions[-1])
    }
    for k in norms:
        expected |= {f"main.{k}.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
        expected.add(f"main.{k}.num_batches_tracked")
    assert set(names) == expected


def test_widths_and_output_size():
    model = PatchDiscriminator(in_channels=1, base_channels=4, num_layers=5)
    widths = [layer.out_channels for layer in model.main if isinstance(layer, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]
    assert PatchDiscriminator(base_channels=4)(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_receptive_field_of_three_layers_is_70_pixels():
    model = PatchDiscriminator(base_channels=2).eval()
    pixels = torch.randn(1, 3, 256, 256, requires_grad=True)
    model(pixels)[0, 0, 15, 15].backward()
    rows = pixels.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_save_and_load(tmp_path):
    model = PatchDiscriminator(base_channels=4, num_layers=2).eval()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(PatchDiscriminator.from_pretrained(tmp_path)(pixels), model(pixels))


def test_small_images_and_bad_depth_are_errors():
    with pytest.raises(ValueError, match="16x16; 3 layers need at least 24x24"):
        PatchDiscriminator(base_channels=4)(torch.zeros(1, 3, 16, 16))
    assert PatchDiscriminator(base_channels=4)(torch.zeros(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match="num_layers is 0"):
        PatchDiscriminator(num_layers=0)
