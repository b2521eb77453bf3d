"""TiTok in all its forms against the official code: one test for each output of the golden case."""

import re
from functools import cache

import pytest
import torch

from hfgen.conversion import load_original, parts
from hfgen.conversion.rules import revert
from hfgen.losses.adversarial import hinge_discriminator_loss
from hfgen.losses.convnext import ConvNeXtDistance, MeanDistance
from hfgen.losses.lecam import LeCam
from hfgen.losses.perceptual import LPIPS
from hfgen.losses.titok import proxy_code_loss, reconstruction_loss
from hfgen.models.layers.blur_discriminator import BlurPatchDiscriminator
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "titok"
STATES = {"legacy": "titok", "vq": "titok_vq", "vae": "titok_vae", "ta": "tatitok"}


def official_config(form):
    case = read_case(SYSTEM)
    return case.config[form] | {"vit_sizes": case.config["vit_sizes"]}


@cache
def model(form):
    return load_original(SYSTEM, read_case(SYSTEM).states[STATES[form]], original_config=official_config(form))


@cache
def given(name):
    return read_case(SYSTEM).inputs[name]


def expected(name):
    return read_case(SYSTEM).outputs[name]


def image():
    return given("image") * 2 - 1


def unit_range(pixels):
    return pixels.detach() * 0.5 + 0.5


def sequence(tensor):
    """Official (B, C, 1, K) to (B, K, C)."""
    return tensor.squeeze(2).transpose(1, 2)


def official(tensor):
    """(B, K, C) to official (B, C, 1, K), and codes (B, K) to (B, 1, K)."""
    return (tensor.transpose(1, 2).unsqueeze(2) if tensor.ndim == 3 else tensor.unsqueeze(1)).detach()


def text(form):
    return given("text_guidance") if form == "ta" else None


@cache
@torch.no_grad()
def encoded(form):
    noise = sequence(given("noise")) if form == "vae" else None
    return model(form).encode(image(), noise=noise)


@torch.no_grad()
def decoded(form, tokens):
    """The image of the whole batch, or of as many as the output holds."""
    rows = len(expected(f"{form}.decode_tokens"))
    guidance = text(form)
    guidance = None if guidance is None else guidance[:rows]
    return unit_range(model(form).decode_codes(given(tokens).squeeze(1)[:rows], guidance).sample)


@torch.no_grad()
def reconstruction(form):
    return unit_range(model(form).decode(encoded(form).latents, text(form)).sample)


@torch.no_grad()
def proxy_logits():
    logits = model("legacy").proxy_logits(encoded("legacy").latents).transpose(1, 2)
    return logits.unflatten(2, expected("legacy.proxy_logits").shape[2:])


@cache
@torch.no_grad()
def clustered():
    """One training-mode encode of TA-TiTok."""
    form = "ta"
    trained = load_original(SYSTEM, read_case(SYSTEM).states[STATES[form]], original_config=official_config(form))
    output = trained.train().encode(image())
    return {
        "z_q": official(output.latents),
        "quantizer_loss": output.loss,
        "embedding": trained.quantizer.embedding.weight,
        "embed_prob": trained.quantizer.usage,
    }


@cache
def posterior():
    return model("vae").posterior(image())


def token_kl():
    """The divergence of each token, whose sum over an image the library uses."""
    gaussian = posterior()
    return 0.5 * (gaussian.mean**2 + gaussian.var - 1 - gaussian.logvar).sum(dim=(1, 2)).detach()


# ------------------------------------------------------------------------------------------------------------ losses

STAGE2 = "stage2"  # the losses of the legacy form; the others have the name of their form


def loss_settings(stage):
    return read_case(SYSTEM).config["legacy" if stage == STAGE2 else stage]["losses"]


@cache
def loss_state(stage, prefix):
    state = read_case(SYSTEM).states[f"loss_{stage}"]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@cache
def discriminator(stage):
    state = loss_state(stage, "discriminator.")
    network = BlurPatchDiscriminator(
        base_channels=len(state["block_in.0.bias"]), num_layers=sum(name.endswith(".1.kernel") for name in state)
    )
    for block in network.blocks:
        assert torch.allclose(block[1].kernel, state["blocks.0.1.kernel"])
    network.load_state_dict({name: value for name, value in state.items() if not name.endswith(".kernel")})
    return network


@cache
def lpips(stage):
    network, weights = LPIPS(), {}
    for name, value in loss_state(stage, "perceptual_loss.lpips.").items():
        if found := re.fullmatch(r"net\.slice\d\.(.+)", name):
            weights[f"features.{found[1]}"] = value
        elif found := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
            weights[f"lins.{found[1]}"] = value
    network.load_state_dict(weights)
    return network


@cache
def perceptual(stage):
    """From the official name: "convnext_s", or "lpips-convnext_s-a-b" with two weights."""
    convnext = ConvNeXtDistance.from_state_dict(loss_state(stage, "perceptual_loss.convnext."))
    name = loss_settings(stage)["perceptual_loss"]
    if name == "convnext_s":
        return convnext
    weights = re.fullmatch(r"lpips-convnext_s-([\d.]+)-([\d.]+)", name)
    return MeanDistance([lpips(stage), convnext], [float(weight) for weight in weights.groups()])


@cache
def reconstruction_terms(stage, adversarial=True):
    """Official names of the terms, and the gradient at the reconstruction on its scale [0, 1]."""
    form, settings = "legacy" if stage == STAGE2 else stage, loss_settings(stage)
    output = encoded(form)
    rec = expected(f"{form}.rec").clone().requires_grad_()
    sample = rec * 2 - 1
    gan_loss = -discriminator(stage)(sample).mean()
    continuous = form == "vae"
    loss, terms = reconstruction_loss(
        sample,
        image(),
        output.loss,
        perceptual=perceptual(stage),
        fake_logits=discriminator(stage)(sample) if adversarial else None,
        reconstruction_weight=settings["reconstruction_weight"],
        perceptual_weight=settings["perceptual_weight"],
        quantizer_weight=settings["kl_weight" if continuous else "quantizer_weight"],
        adversarial_weight=settings["discriminator_weight"] * settings["discriminator_factor"],
        log_variance=settings["logvar_init"] if continuous else 0.0,
    )
    (gradient,) = torch.autograd.grad(loss, rec)
    zero = torch.zeros(())
    return {
        "total_loss": loss.detach(),
        "reconstruction_loss": terms["reconstruction"],
        "perceptual_loss": terms["perceptual"],
        "kl_loss" if continuous else "quantizer_loss": terms["quantizer"],
        "weighted_gan_loss": terms.get("adversarial", zero),
        "gan_loss": gan_loss.detach() if adversarial else zero,
        "grad_rec": gradient,
    } | {f"{name}_loss": value for name, value in output.losses.items() if not continuous}


@cache
@torch.no_grad()
def discriminator_step():
    settings, network, lecam = loss_settings(STAGE2), discriminator(STAGE2), LeCam()
    averages = {name: loss_state(STAGE2, f"ema_{name}_logits_mean")[""] for name in ("real", "fake")}
    lecam.load_state_dict({name: value.squeeze() for name, value in averages.items()})
    real, fake = network(image()), network(expected("legacy.rec") * 2 - 1)
    lecam_loss = settings["lecam_regularization_weight"] * lecam(real, fake)
    hinge = settings["discriminator_factor"] * hinge_discriminator_loss(real, fake)
    return {
        "logits": real,
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
        "lecam_loss": lecam_loss,
        "discriminator_loss": hinge + lecam_loss,
        "ema_real_logits_mean": lecam.real[None],
        "ema_fake_logits_mean": lecam.fake[None],
    }


@cache
def proxy_training():
    """Stage 1: the same weights without the pixel decoder."""
    state = {n: v for n, v in read_case(SYSTEM).states[STATES["legacy"]].items() if not n.startswith("pixel_")}
    config = official_config("legacy")
    vq_model = config["model"]["vq_model"] | {"finetune_decoder": False}
    config = config | {"model": config["model"] | {"vq_model": vq_model}}
    trained = load_original(SYSTEM, state, original_config=config).train()
    output = trained(image())
    cross_entropy = proxy_code_loss(output.logits, given("proxy_codes"))
    loss = cross_entropy + output.loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained.named_parameters()}
    gradients = revert(gradients, parts(SYSTEM)["vq_model"].rules(trained.config))
    return {
        "total_loss": loss.detach(),
        "reconstruction_loss": cross_entropy.detach(),
        "quantizer_loss": output.loss.detach(),
        **{f"{name}_loss": value for name, value in output.losses.items()},
        **{f"grad.{name}": value for name, value in gradients.items()},
    }


CHECKS = {
    r"(legacy|vq)\.z": lambda form: official(model(form).features(image())),
    r"(legacy|vq)\.z_q": lambda form: official(encoded(form).latents),
    r"(legacy|vq|ta)\.indices": lambda form: official(encoded(form).codes),
    r"(legacy|vq|vae|ta)\.rec": reconstruction,
    r"legacy\.proxy_logits": proxy_logits,
    r"legacy\.decode_tokens": lambda: decoded("legacy", "tokens"),
    r"ta\.decode_tokens": lambda: decoded("ta", "tokens_vq"),
    r"legacy\.entry": lambda: model("legacy").quantizer.decode(given("tokens").flatten(1)).detach().flatten(0, 1),
    r"vae\.parameters": lambda: official(model("vae").features(image())),
    r"vae\.(mean|logvar)": lambda name: getattr(posterior(), name).detach(),
    r"vae\.mode": lambda: official(model("vae").encode(image()).latents),
    r"vae\.sample": lambda: official(encoded("vae").latents),
    r"vae\.kl": token_kl,
    r"ta\.train\.(\w+)": lambda name: clustered()[name],
    r"stage1\.(.+)": lambda name: proxy_training()[name],
    r"stage2\.disc\.(\w+)": lambda name: discriminator_step()[name],
    r"stage2\.early\.(\w+)": lambda name: reconstruction_terms(STAGE2, adversarial=False)[name],
    r"stage2\.late\.(\w+)": lambda name: reconstruction_terms(STAGE2)[name],
    r"(vq|vae)\.(\w+_loss)": lambda form, name: reconstruction_terms(form)[name],
}


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    assert_matches(check(*found.groups()), expected(name))


def test_case_has_outputs():
    assert output_names(SYSTEM), f"there is no golden case at {case_path(SYSTEM)}"
