"""TiTok: its forms, the sizes that were published, and what it refuses."""

import pytest
import torch

from hfgen import MaskGITVQGAN, TiTok
from support.instances import MODELS, build_model

TWO_STAGE = {"two_stage": True, "num_proxy_codes": 12, "decoder_patch_size": 4}
PIXELS = {"pixel_channels": (4, 4, 8), "proxy_channels": 6, "pixel_layers_per_block": 1, "pixel_norm_num_groups": 2}
FORMS = {
    "vq": {},
    "l2": {"normalize_codes": True},
    "clustering": {"codebook_update": "clustering"},
    "kl": {"bottleneck": "kl"},
    "text": {"text_length": 3, "text_channels": 5},
    "two-stage": TWO_STAGE | PIXELS,
}

# enc / dec / all in millions, as published.
PARAMETERS = {
    "titok-l-32": (303.4, 306.8, 641.1),
    "titok-b-64": (85.9, 88.1, 204.8),
    "titok-s-128": (25.8, 27.0, 83.7),
    "titok-bl-64-vq": (85.9, 303.5, 390.0),
    "titok-bl-128-vq": (86.0, 303.6, 390.2),
    "titok-sl-256-vq": (25.9, 303.7, 330.3),
    "titok-ll-32-vae": (303.4, 303.4, 606.9),
    "titok-bl-64-vae": (85.9, 303.4, 389.4),
    "titok-bl-128-vae": (86.0, 303.5, 389.6),
}


def pixels(batch=2):
    return MODELS["TiTok"].inputs(batch)["pixels"]


def text(form, batch=2):
    return torch.ones(batch, 3, 5) if form == "text" else None


def number_of_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("preset", PARAMETERS)
def test_published_sizes(preset):
    with torch.device("meta"):
        model = TiTok.from_preset(preset)
    encoder = number_of_parameters(model.encoder) - model.encoder.latent_tokens.numel()
    heads = [model.code_head] if model.config.two_stage else [model.patch_head, model.conv_out]
    decoder = number_of_parameters(model.decoder) + sum(map(number_of_parameters, heads))
    found = tuple(round(size / 1e6, 1) for size in (encoder, decoder, number_of_parameters(model)))
    assert found == pytest.approx(PARAMETERS[preset], abs=0.051)
    assert model.num_tokens == int(preset.split("-")[2]) and model.image_size == 256


@pytest.mark.parametrize("preset", [name for name in TiTok.presets if name.startswith("tatitok")])
def test_text_aware_decoders_differ_by_the_text_only(preset):
    with torch.device("meta"):
        model = TiTok.from_preset(preset)
        plain = TiTok(**TiTok.presets[preset] | {"text_length": 0})
    assert number_of_parameters(model) - number_of_parameters(plain) == (768 + 1) * 1024 + 77 * 1024


@pytest.mark.parametrize("form", FORMS)
def test_forward_is_encode_and_decode(form):
    model = build_model("TiTok", **FORMS[form])
    with torch.no_grad():
        output, encoded = model(pixels(), text(form)), model.encode(pixels())
        assert torch.equal(output.sample, model.decode(encoded.latents, text(form)).sample)
        assert output.sample.shape == pixels().shape and encoded.latents.shape == (2, 4, 6)
        if form == "kl":
            assert encoded.codes is None and model.codebook_size is None and encoded.loss > 0
        else:
            assert encoded.codes.shape == (2, 4) and encoded.codes.max() < model.codebook_size == 16
            decoded = model.decode_codes(encoded.codes, text(form)).sample
            torch.testing.assert_close(decoded, output.sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded(form, tmp_path):
    model = build_model("TiTok", **FORMS[form])
    model.save_pretrained(tmp_path)
    loaded = TiTok.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(pixels(), text(form)).sample, model(pixels(), text(form)).sample)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_is_trained(form):
    model = build_model("TiTok", **FORMS[form]).train()
    noise = torch.ones(2, 4, 6) if form == "kl" else None
    output = model(pixels(), text(form), noise=noise)
    (output.sample.square().mean() + output.loss).backward()
    untrained = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.abs().any()]
    assert not untrained


def test_stage_1_and_the_step_to_stage_2():
    first = build_model("TiTok", **TWO_STAGE)
    vqgan = build_model("MaskGITVQGAN", num_codes=12, latent_channels=6, channel_multipliers=(1, 1, 2), image_size=8)
    with torch.no_grad():
        output = first(pixels())
        assert output.logits.shape == (2, 4, 12) == (*vqgan.encode(pixels()).codes.shape, 12)
        assert output.sample is None
        second = first.with_pixel_decoder(vqgan)
        assert torch.equal(second.encode(pixels()).codes, output.codes)
        assert torch.equal(second.proxy_logits(output.latents), output.logits)
        # With sure logits the mean of the code vectors is one of them, and the image that of the VQGAN.
        second.code_head[2].weight.zero_()
        second.code_head[2].bias.copy_(torch.nn.functional.one_hot(torch.tensor(7), 12) * 1000.0)
        expected = vqgan.decode_codes(torch.full((2, 4), 7)).sample
        torch.testing.assert_close(second(pixels()).sample, expected, rtol=0, atol=1e-5)
    assert not torch.equal(first.code_head[2].bias, second.code_head[2].bias), "the models share memory"


def test_a_pixel_decoder_that_does_not_fit():
    first, vqgan = build_model("TiTok", **TWO_STAGE), build_model("MaskGITVQGAN", channel_multipliers=(1, 1, 2))
    with pytest.raises(ValueError, match="VQGAN has 16 codes, but this TiTok predicts 12"):
        first.with_pixel_decoder(vqgan)
    with pytest.raises(ValueError, match="Only a TiTok of stage 1"):
        build_model("TiTok").with_pixel_decoder(vqgan)
    with pytest.raises(ValueError, match="enlarge 2 times; the grid of 2 patches needs 4"):
        first.with_pixel_decoder(build_model("MaskGITVQGAN", num_codes=12))


def test_noise_samples_the_posterior():
    model = build_model("TiTok", bottleneck="kl")
    noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, sample = model.encode(pixels()), model.encode(pixels(), noise=noise)
        std = model.posterior(pixels()).std.squeeze(2).transpose(1, 2)
    torch.testing.assert_close(sample.latents - mean.latents, std * noise, rtol=0, atol=1e-5)
    assert torch.equal(sample.loss, mean.loss)


def test_text_reaches_every_patch():
    model = build_model("TiTok", **FORMS["text"])
    latents, guidance = torch.zeros(1, 4, 6), text("text", 1).requires_grad_()
    image = model.decode(latents, guidance).sample
    for row in (0, 7):
        (gradient,) = torch.autograd.grad(image[0, :, row, 0].sum(), guidance, retain_graph=True)
        assert (gradient.abs().sum(-1) > 0).all()


def test_training_moves_unused_codes_to_features():
    model = build_model("TiTok", **FORMS["clustering"]).train()
    before = model.quantizer.embedding.weight.clone()
    unused = torch.ones(16, dtype=torch.bool)  # in all steps: a code that was in use once waits before it moves
    for _ in range(100):
        with torch.no_grad():
            codes = model.encode(pixels()).codes
        unused.index_fill_(0, codes.flatten().unique(), False)
    features = model.features(pixels()).detach().flatten(0, 1)
    distance = torch.cdist(model.quantizer.embedding.weight.detach(), features).amin(1)
    assert unused.any() and distance[unused].max() < 0.01 < torch.cdist(before, features).amin(1).max()


@pytest.mark.parametrize(
    ("form", "call", "message"),
    [
        ("vq", lambda m: m.encode(torch.zeros(1, 3, 16, 16)), r"\(1, 3, 16, 16\), expected \(batch, 3, 8, 8\)"),
        ("vq", lambda m: m.encode(torch.zeros(3, 8, 8)), r"expected \(batch, 3, 8, 8\)"),
        ("vq", lambda m: m.decode_codes(torch.zeros(1, 5, dtype=torch.long)), r"\(1, 5\), expected \(batch, 4\)"),
        ("vq", lambda m: m.decode_codes(torch.zeros(1, 2, 2, dtype=torch.long)), r"expected \(batch, 4\)"),
        ("vq", lambda m: m.decode_codes(torch.tensor([[0, 1, 2, 16]])), r"lie in \[0, 16\], expected ids in \[0, 15"),
        ("vq", lambda m: m.decode_codes(torch.tensor([[0, -1, 2, 3]])), r"lie in \[-1, 3\]"),
        ("vq", lambda m: m.decode(torch.zeros(1, 6, 4)), r"latents have shape \(1, 6, 4\), expected \(1, 4, 6\)"),
        ("vq", lambda m: m.decode(torch.zeros(1, 4, 6), torch.zeros(1, 3, 5)), "reads no text"),
        ("vq", lambda m: m.encode(torch.zeros(1, 3, 8, 8), noise=torch.zeros(1)), "noise samples a posterior"),
        ("vq", lambda m: m.posterior(torch.zeros(1, 3, 8, 8)), "no posterior"),
        ("vq", lambda m: m.proxy_logits(torch.zeros(1, 4, 6)), "no proxy codes; use decode"),
        ("kl", lambda m: m.decode_codes(torch.zeros(1, 4, dtype=torch.long)), "continuous latents and no codes"),
        ("kl", lambda m: m.encode(torch.zeros(1, 3, 8, 8), noise=torch.zeros(4, 6)), r"noise have shape \(4, 6\)"),
        ("text", lambda m: m.decode(torch.zeros(1, 4, 6)), "decodes with text: pass text_embeds"),
        ("text", lambda m: m.decode(torch.zeros(1, 4, 6), torch.zeros(1, 2, 5)), r"expected \(1, 3, 5\)"),
    ],
)
def test_bad_input(form, call, message):
    with pytest.raises(ValueError, match=message):
        call(build_model("TiTok", **FORMS[form]))


def test_stage_1_has_no_image():
    with pytest.raises(ValueError, match="no pixel decoder: use proxy_logits, or add"):
        build_model("TiTok", **TWO_STAGE).decode(torch.zeros(1, 4, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_patch_size": 3}, "image_size=8 is no multiple of encoder_patch_size=3"),
        ({"encoder_heads": 3}, "width 16 is no multiple of the 3 attention heads"),
        ({"bottleneck": "fsq"}, "bottleneck='fsq' must be 'vq' or 'kl'"),
        ({"codebook_update": "ema"}, "codebook_update='ema'"),
        (PIXELS, "pixel_channels belong to two_stage=True"),
        (TWO_STAGE | PIXELS | {"bottleneck": "kl"}, "pixel_channels belong to two_stage=True with bottleneck='vq'"),
    ],
)
def test_arguments_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model("TiTok", **changes)


def test_the_vqgan_of_the_presets_fits():
    assert TiTok.presets["titok-l-32"]["pixel_channels"] == tuple(128 * n for n in (1, 1, 2, 2, 4))
    with torch.device("meta"):
        vqgan, model = MaskGITVQGAN(), TiTok.from_preset("titok-s-128")
    shapes = {name: value.shape for name, value in vqgan.decoder.state_dict().items()}
    assert shapes == {name: value.shape for name, value in model.pixel_decoder.state_dict().items()}
    assert model.pixel_codebook.shape == vqgan.quantizer.embedding.weight.shape
