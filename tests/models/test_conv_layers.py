"""The residual block and the activation that stand in for those of diffusers and PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.resnet import ResnetBlock2D

from hfgen.models.layers.activations import TanhGELU, tanh_gelu_
from hfgen.models.layers.conv import ConvResnetBlock, vqgan_decoder


@pytest.mark.parametrize("out_channels", [8, 16])
def test_the_residual_block_is_that_of_diffusers(out_channels):
    torch.manual_seed(0)
    reference = ResnetBlock2D(in_channels=8, out_channels=out_channels, temb_channels=None, groups=4, eps=1e-6)
    block = ConvResnetBlock(8, out_channels, 4, dropout=0.0)
    block.load_state_dict(reference.state_dict())
    inputs = [torch.randn(2, 8, 6, 6, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [reference(inputs[0], None), block(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for expected, actual in zip(reference.parameters(), block.parameters()):
        torch.testing.assert_close(actual.grad, expected.grad)


def test_the_residual_block_leaves_its_input_alone():
    block = ConvResnetBlock(8, 8, 4, dropout=0.0).eval()
    hidden = torch.randn(1, 8, 4, 4)
    before = hidden.clone()
    with torch.no_grad():
        block(hidden)
    assert torch.equal(hidden, before)


def test_no_residual_block_of_diffusers_remains():
    blocks = [type(module) for module in vqgan_decoder(4, 3, (8, 16), norm_num_groups=4).modules()]
    assert ResnetBlock2D not in blocks and blocks.count(ConvResnetBlock) == 8


@pytest.mark.parametrize("channels_last", [False, True])
def test_activations_have_the_layout_of_the_weights(channels_last):
    decoder = vqgan_decoder(4, 3, (8, 16), norm_num_groups=4)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    decoder.to(memory_format=layout)
    layouts = []
    decoder.up_blocks[-1].register_forward_hook(
        lambda module, arguments, output: layouts.append(output.is_contiguous(memory_format=layout))
    )
    with torch.no_grad():
        decoder(torch.randn(2, 4, 4, 4))
    assert layouts == [True]


@pytest.mark.parametrize("size", [5, 2**16, 2**17 + 3])
def test_tanh_gelu_in_place(size):
    values = torch.linspace(-12, 12, size)
    expected = F.gelu(values.double(), approximate="tanh")
    assert tanh_gelu_(values) is values
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=1e-6)


def test_tanh_gelu_without_gradients_equals_training():
    torch.manual_seed(0)
    layer, inputs = TanhGELU(6, 24), torch.randn(2, 5, 6)
    reference = GELU(6, 24, approximate="tanh")
    reference.load_state_dict(layer.state_dict())
    trained = layer(inputs)
    assert torch.equal(trained, reference(inputs)) and trained.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), trained, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer.bfloat16()(inputs.bfloat16()), reference.bfloat16()(inputs.bfloat16()))
