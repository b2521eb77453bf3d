"""MultiScaleVQVAE beyond what every model promises."""

import pytest
import torch
import torch.nn.functional as F

from hfgen.models.quantizers.multiscale import draw_num_scales
from hfgen.models.tokenizers.multiscale_vqvae import MultiScaleVQVAE

TINY = {
    "num_codes": 32,
    "latent_channels": 4,
    "base_channels": 8,
    "channel_multipliers": (1, 1, 2),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "patch_nums": (1, 2, 4),
    "num_residual_convs": 2,
}


def build(**changes):
    torch.manual_seed(0)
    model = MultiScaleVQVAE(**{**TINY, **changes})
    torch.nn.init.normal_(model.quantizer.embedding.weight)
    return model


def images(batch=2, height=16, width=16):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_encode_and_decode_agree_with_forward():
    model, pixels = build().eval(), images()
    with torch.no_grad():
        encoded, output = model.encode(pixels), model(pixels)
        assert encoded.latents.shape == (2, 4, 4, 4) and encoded.codes.shape == (2, 21)
        assert encoded.codes.unique().numel() > 1
        assert torch.equal(model.decode_codes(encoded.codes).sample, output.sample)
        assert torch.equal(model.decode(encoded.latents).sample, output.sample)
        assert torch.equal(output.codes, encoded.codes) and torch.equal(output.loss, encoded.loss)
        progressive = model.decode_codes_per_scale(encoded.codes)
        assert len(progressive) == 3 and torch.equal(progressive[-1], output.sample)
        assert not torch.equal(progressive[0], progressive[1])


def test_sizes():
    model = build()
    assert (model.downsample_factor, model.num_tokens, model.codebook_size) == (4, 21, 32)
    assert model.image_size == model.config.patch_nums[-1] * 4
    assert model.last_layer_weight is model.decoder.conv_out.weight


@pytest.mark.parametrize("size, patch_nums", [((24, 24), (1, 3, 6)), ((8, 24), ((1, 2), (2, 6)))])
def test_other_scales_at_other_sizes(size, patch_nums):
    model, pixels = build().eval(), images(2, *size)
    with torch.no_grad():
        encoded = model.encode(pixels, patch_nums)
        sample = model.decode_codes(encoded.codes, patch_nums).sample
    assert sample.shape == pixels.shape
    torch.testing.assert_close(sample, model.decode(encoded.latents).sample)


def test_images_of_a_batch_are_independent():
    model, pixels = build().eval(), images(3)
    with torch.no_grad():
        together, alone = model(pixels), model(pixels[1:2])
    assert torch.equal(together.codes[1:2], alone.codes)
    torch.testing.assert_close(together.sample[1:2], alone.sample)


def test_gradient_checkpointing_gives_equal_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.encoder.gradient_checkpointing and model.decoder.gradient_checkpointing
        output = model(images())
        (output.loss + F.mse_loss(output.sample, images())).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.abs().max() > 0 or name.endswith("to_k.bias"), name


def test_low_precision_weights_and_autocast_quantize_in_float32():
    model, pixels = build().eval(), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(pixels)
        assert output.loss.dtype == torch.float32
        assert model.quantizer.decode(output.codes).dtype == torch.float32
    model.bfloat16()
    with torch.no_grad():
        output = model(pixels)
        assert output.sample.dtype == output.latents.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
        features = model.quant_conv(model.encoder(pixels.bfloat16()))
        exact = build().bfloat16().float().quantizer
        assert torch.equal(output.codes, exact.encode(features.float()))
        assert torch.equal(output.latents, exact.decode(output.codes).bfloat16())
        assert torch.equal(model.decode_codes(output.codes).sample, output.sample)


def test_channels_last():
    model, pixels = build().eval(), images()
    with torch.no_grad():
        expected = model(pixels)
        model.to(memory_format=torch.channels_last)
        output = model(pixels.contiguous(memory_format=torch.channels_last))
    assert torch.equal(output.codes, expected.codes)
    torch.testing.assert_close(output.sample, expected.sample, rtol=0, atol=1e-5)


def test_tuples_hold_the_same_tensors():
    model, pixels = build().eval(), images()
    with torch.no_grad():
        encoded = model.encode(pixels, return_dict=False)
        output = model(pixels, return_dict=False)
        decoded = model.decode(encoded[0], return_dict=False)
        from_codes = model.decode_codes(encoded[1], return_dict=False)
    assert torch.equal(output[0], decoded[0]) and torch.equal(output[0], from_codes[0])
    assert torch.equal(output[1], encoded[0]) and torch.equal(output[2], encoded[1])
    assert output[4].keys() == encoded[3].keys() == {"commitment", "codebook"}


def test_save_and_load(tmp_path):
    model = build(restart_after=3, dropout=0.1, num_residual_convs=0).train()
    model(images())
    model.eval().save_pretrained(tmp_path)
    loaded = MultiScaleVQVAE.from_pretrained(tmp_path)
    assert loaded.quantizer.restart.step == 1
    with torch.no_grad():
        assert torch.equal(loaded(images()).sample, model(images()).sample)


def test_dropout_acts_in_training_only():
    model, pixels = build(dropout=0.5), images()
    with torch.no_grad():
        assert not torch.equal(model.encoder(pixels), model.encoder(pixels))
        model.eval()
        assert torch.equal(model.encoder(pixels), model.encoder(pixels))


@pytest.mark.parametrize("name, tokens", [("var-vqvae", 680), ("var-vqvae-512", 2240)])
def test_presets_have_the_published_size(name, tokens):
    with torch.device("meta"):
        model = MultiScaleVQVAE.from_preset(name)
    count = {
        part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("encoder", "decoder", "quantizer")
    }
    assert {part: round(number / 1e6, 2) for part, number in count.items()} == {
        "encoder": 44.11,
        "decoder": 64.65,
        "quantizer": 0.17,
    }
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(108.95e6, rel=1e-4)
    assert model.num_tokens == tokens and model.downsample_factor == 16


def test_bad_input_is_named():
    model = build().eval()
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\).*\(batch, 3, 16, 16\)"):
        model.encode(images()[:, :1])
    with pytest.raises(ValueError, match=r"\(2, 3, 20, 16\).*patch_nums times 4"):
        model(images(2, 20, 16))
    with pytest.raises(ValueError, match=r"\(2, 5, 4, 4\).*\(batch, 4, height, width\)"):
        model.decode(torch.zeros(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"\(2, 20\).*\(batch, 21\)"):
        model.decode_codes(torch.zeros(2, 20, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[0, 32\].*\[0, 31\]"):
        model.decode_codes(torch.arange(21).clamp(max=0)[None] + torch.arange(2)[:, None] * 32)
    with pytest.raises(ValueError, match="norm_num_groups=3"):
        build(norm_num_groups=3)
    with pytest.raises(ValueError, match="quant_conv_kernel_size=2"):
        build(quant_conv_kernel_size=2)


def test_images_of_fewer_scales():
    """Quantizer dropout: every image is decoded from as many scales as asked, codes and loss stay those of all."""
    model, pixels = build().eval(), images(3)
    with torch.no_grad():
        everything = model(pixels)
        output = model(pixels, num_scales=torch.tensor([1, 3, 2]))
        progressive = model.decode_codes_per_scale(everything.codes)
    assert torch.equal(output.codes, everything.codes) and torch.equal(output.loss, everything.loss)
    for image, scales in enumerate((1, 3, 2)):
        torch.testing.assert_close(output.sample[image], progressive[scales - 1][image])
    model.train()
    model(pixels, num_scales=torch.tensor([1, 1, 1])).sample.sum().backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_quantizer_dropout_draws():
    draws = [draw_num_scales(1000, 4, dropout, torch.Generator().manual_seed(0)) for dropout in (0.0, 0.5, 1.0)]
    assert draws[0].unique().tolist() == [4]
    assert draws[1].unique().tolist() == [1, 2, 3, 4] and 450 < (draws[1] < 4).sum() < 550
    assert draws[2].unique().tolist() == [1, 2, 3]
