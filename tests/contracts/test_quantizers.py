"""What every public quantizer promises."""

import pytest
import torch

from hfgen.models.modeling import QuantizerOutput
from support.instances import QUANTIZERS, build_quantizer

pytestmark = pytest.mark.parametrize("name", QUANTIZERS)


def test_forward_encode_and_decode_agree(name):
    quantizer, latents = build_quantizer(name), QUANTIZERS[name].latents(3)
    with torch.no_grad():
        output = quantizer(latents)
        codes = quantizer.encode(latents)
        decoded = quantizer.decode(codes)
    assert isinstance(output, QuantizerOutput)
    assert output.latents.shape == latents.shape
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.latents, decoded, rtol=0, atol=1e-6)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < quantizer.codebook_size
    assert codes.unique().numel() > 1


def test_loss_is_the_sum_of_its_terms(name):
    quantizer, latents = build_quantizer(name).train(), QUANTIZERS[name].latents(2)
    output = quantizer(latents.requires_grad_())
    assert output.loss.shape == () and output.loss.dtype == torch.float32 and output.loss.requires_grad
    assert not any(term.requires_grad for term in output.losses.values())
    torch.testing.assert_close(sum(output.losses.values()), output.loss.detach())


def test_gradient_of_the_decoder_passes(name):
    quantizer, latents = build_quantizer(name).train(), QUANTIZERS[name].latents(2).requires_grad_()
    quantizer(latents).latents.square().sum().backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().max() > 0


def test_computes_in_float32(name):
    quantizer, latents = build_quantizer(name), QUANTIZERS[name].latents(2).bfloat16()
    with torch.no_grad():
        exact = quantizer(latents.float())
        rounded = quantizer(latents)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = quantizer(latents.float())
    assert rounded.latents.dtype == torch.bfloat16 and rounded.loss.dtype == torch.float32
    assert torch.equal(rounded.codes, exact.codes) and torch.equal(autocast.codes, exact.codes)
    torch.testing.assert_close(rounded.loss, exact.loss)
    assert torch.equal(rounded.latents, exact.latents.bfloat16())
    torch.testing.assert_close(autocast.latents, exact.latents, rtol=0, atol=1e-6)


def test_images_of_a_batch_are_independent(name):
    quantizer = build_quantizer(name)
    with torch.no_grad():
        together, alone = quantizer(QUANTIZERS[name].latents(3)), quantizer(QUANTIZERS[name].latents(1))
    assert torch.equal(together.codes[:1], alone.codes)
    torch.testing.assert_close(together.latents[:1], alone.latents, rtol=0, atol=1e-6)


def test_evaluation_changes_nothing(name):
    quantizer, latents = build_quantizer(name), QUANTIZERS[name].latents(2)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    rng = torch.get_rng_state()
    quantizer(latents)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
