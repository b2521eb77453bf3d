"""Convs of large images on CPUs: equal to the plain operations, and plain where more than the result counts."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.upsampling import Upsample2D
from torch import nn

from hfgen.models.layers import large_conv, winograd
from hfgen.models.layers.conv import vqgan_decoder
from hfgen.models.layers.large_conv import NearestUpsampleConv, conv_over


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(large_conv, "_MAPPED_BYTES", 0)
    monkeypatch.setattr(large_conv, "_SUBPIXEL_BYTES", 0)
    monkeypatch.setattr(large_conv, "_BAND_ROWS", 3)


@pytest.fixture
def everything_is_filtered(everything_is_large, monkeypatch):
    """By Winograd's algorithm, in bands of four rows."""
    monkeypatch.setattr(large_conv, "_WINOGRAD_BYTES", 0)
    monkeypatch.setattr(winograd, "_BAND_BYTES", 0)


class Doubled(nn.Module):
    """What an adapter does: wraps a conv, shows its weight and changes its result."""

    def __init__(self, conv):
        super().__init__()
        self.base_layer = conv

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, images):
        return 2 * self.base_layer(images)


class DoublingHook(ModelHook):
    """What offloading does: replaces the module's ``forward``."""

    def post_forward(self, module, output):
        return 2 * output


def doubled(conv, how):
    if how == "adapter":
        return Doubled(conv)
    if how == "accelerate hook":
        return add_hook_to_module(conv, DoublingHook())
    conv.register_forward_hook(lambda module, arguments, output: 2 * output)
    return conv


CHANGES = ["adapter", "accelerate hook", "forward hook"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 6, 7])
@torch.no_grad()
def test_a_conv_over_its_input_equals_the_conv(everything_is_large, height, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, padding=1)
    images = torch.randn(2, 4, height, 5).contiguous(memory_format=layout)
    expected = conv(images)
    result = conv_over(conv, images)
    assert result.data_ptr() == images.data_ptr()
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 7, 8, 9, 13])
@torch.no_grad()
def test_filtering_by_winograd_equals_the_conv(everything_is_filtered, monkeypatch, height, tiles, bias):
    torch.manual_seed(0)
    conv, images = nn.Conv2d(6, 6, 3, padding=1, bias=bias), torch.randn(2, 6, height, 5)
    monkeypatch.setattr(winograd, "_BAND_BYTES", 4 * tiles * images[0, :, 0].nbytes)
    expected = conv(images)
    result = conv_over(conv, images)
    assert result.data_ptr() == images.data_ptr()
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@torch.no_grad()
def test_filtering_by_winograd_rounds_little(monkeypatch):
    torch.manual_seed(0)
    conv, images = nn.Conv2d(160, 160, 3, padding=1), torch.randn(1, 160, 96, 96)
    assert images.nbytes >= large_conv._WINOGRAD_BYTES
    exact = F.conv2d(images.double(), conv.weight.double(), conv.bias.double(), padding=1)
    plain, filtered = conv(images), conv_over(conv, images)
    assert not torch.equal(filtered, plain)  # the algorithm did run
    assert (filtered - exact).abs().max() <= 3e-6 * exact.abs().max()


@pytest.mark.parametrize("change", ["layout", "dtype"])
@torch.no_grad()
def test_what_is_not_plain_is_not_filtered(everything_is_filtered, change):
    torch.manual_seed(0)
    dtype, layout = torch.float32, torch.contiguous_format
    if change == "dtype":
        dtype = torch.bfloat16
    else:
        layout = torch.channels_last
    conv = nn.Conv2d(4, 4, 3, padding=1).to(dtype=dtype, memory_format=layout)
    images = torch.randn(1, 4, 6, 5).to(dtype=dtype, memory_format=layout)
    expected = torch.cat([conv(images[:, :, :4])[:, :, :3], conv(images[:, :, 2:])[:, :, 1:]], dim=2)  # its two bands
    torch.testing.assert_close(conv_over(conv, images), expected)


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_a_conv_over_its_input_calls_the_module(everything_is_filtered, how):
    conv, images = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 7, 5)
    expected = 2 * conv(images)
    torch.testing.assert_close(conv_over(doubled(conv, how), images), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_input_stays_where_it_may_be_needed(everything_is_filtered, autocast):
    conv, images = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 7, 5)
    before = images.clone()
    with torch.set_grad_enabled(not autocast), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = conv_over(conv, images)
        assert torch.equal(result, conv(before)) and result.requires_grad is not autocast
    assert torch.equal(images, before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4)])
def test_upsampling_is_that_of_diffusers(everything_is_large, size, bias):
    torch.manual_seed(0)
    reference = Upsample2D(4, use_conv=True, out_channels=6, bias=bias)
    upsample = NearestUpsampleConv(nn.Conv2d(4, 6, 3, padding=1, bias=bias))
    upsample.load_state_dict(reference.state_dict())
    images = torch.randn(2, 4, *size)
    expected = reference(images)
    trained = upsample(images)
    assert torch.equal(trained, expected) and trained.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(upsample(images), expected)


@torch.no_grad()
def test_large_images_are_upsampled_with_four_small_kernels(everything_is_large, monkeypatch):
    upsample, kernels, conv2d = NearestUpsampleConv(nn.Conv2d(4, 4, 3, padding=1)), [], F.conv2d

    def record(images, weight, *arguments, **options):
        kernels.append(tuple(weight.shape[2:]))
        return conv2d(images, weight, *arguments, **options)

    monkeypatch.setattr(large_conv.F, "conv2d", record)
    upsample(torch.randn(1, 4, 3, 3))
    assert kernels == [(2, 2)] * 4


@pytest.mark.parametrize("how", CHANGES)
@torch.no_grad()
def test_upsampling_keeps_adapters_and_hooks(everything_is_large, how):
    upsample, images = NearestUpsampleConv(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 3, 3)
    expected = 2 * upsample(images)
    upsample.conv = doubled(upsample.conv, how)
    torch.testing.assert_close(upsample(images), expected)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_the_decoder_is_the_same_for_large_images(monkeypatch, layout, filtered):
    torch.manual_seed(0)
    decoder, latents = vqgan_decoder(4, 3, (8, 16, 16), norm_num_groups=4).eval(), torch.randn(2, 4, 3, 5)
    decoder.to(memory_format=layout)
    assert not any(isinstance(module, Upsample2D) for module in decoder.modules())
    expected = decoder(latents)
    for name, value in (("_MAPPED_BYTES", 0), ("_SUBPIXEL_BYTES", 0), ("_BAND_ROWS", 5)):
        monkeypatch.setattr(large_conv, name, value)
    if filtered:
        monkeypatch.setattr(large_conv, "_WINOGRAD_BYTES", 0)
        monkeypatch.setattr(winograd, "_BAND_BYTES", 0)
    torch.testing.assert_close(decoder(latents), expected, rtol=1e-4, atol=1e-5)
