"""The multi-scale VQ-VAE against the official VAR code: one test for each output of the golden case."""

import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from hfgen.conversion import load_original, parts
from hfgen.conversion.rules import revert
from hfgen.models.quantizers.usage import ScaleUsage
from support.golden import assert_matches, case_path, output_names, pixels, read_case

SYSTEM = "var_vqvae"


@cache
def model(part):
    case = read_case(SYSTEM)
    return load_original("var", case.states[part], part="vae", original_config=case.config[part])


def image():
    return pixels(read_case(SYSTEM).inputs["image_u8"])


@cache
@torch.no_grad()
def encoded(part):
    return model(part).encode(image())


@torch.no_grad()
def features():
    return model("vae").encoder(image())


@torch.no_grad()
def sums_per_scale():
    return model("vae").quantizer.f_hat_per_scale(encoded("vae").codes)


@torch.no_grad()
def progressive_image():
    """The first sample from the scales up to the middle one."""
    return model("vae").decode(sums_per_scale()[len(sums_per_scale()) // 2][:1]).sample


@torch.no_grad()
def reconstruction():
    return model("vae").decode_codes(encoded("vae").codes).sample


def conv_of_scale():
    quantizer = model("vae").quantizer
    num_scales = len(quantizer.sizes)
    return torch.tensor([quantizer.residual_conv_index(scale, num_scales) for scale in range(num_scales)])


@cache
def training():
    """One training pass: its outputs, gradients by official name, and code usage after it and a second step."""
    case = read_case(SYSTEM)
    trained = load_original("var", case.states["vae"], part="vae", original_config=case.config["vae"]).train()
    output = trained(image())
    mse = F.mse_loss(output.sample, image())
    (output.loss + mse).backward()
    gradients = {name: parameter.grad for name, parameter in trained.named_parameters()}

    quantizer = trained.quantizer
    usage = ScaleUsage(len(quantizer.sizes), quantizer.codebook_size)
    usage.update(quantizer.split(output.codes))
    first_hits = usage.hits.clone()
    last_height, last_width = quantizer.sizes[-1]
    percent = usage.percent(len(image()) * last_height * last_width)
    with torch.no_grad():
        usage.update(quantizer.split(trained.encode(image().flip(0).flip(3)).codes))
    results = {
        "rec": output.sample[:1].detach(),
        "vq_loss": output.loss.detach(),
        "mse": mse.detach(),
        "usages": percent,
        "ema_vocab_hit_1": first_hits,
        "ema_vocab_hit_2": usage.hits,
    }
    official = revert(gradients, parts("var")["vae"].rules(trained.config))
    return results | {f"grad.{name}": value for name, value in official.items()}


CHECKS = {
    r"encoder": lambda: features(),
    r"f": lambda: model("vae").quant_conv(features()).detach(),
    r"idx": lambda: encoded("vae").codes,
    r"fhat_per_scale": lambda: torch.stack(sums_per_scale()),
    r"recon": lambda: reconstruction(),
    r"recon_scale": lambda: progressive_image(),
    r"fhat_small": lambda: model("vae").quantizer.decode(encoded("vae").codes, all_to_max_scale=False).detach(),
    r"var_input": lambda: model("vae").quantizer.generator_inputs(encoded("vae").codes).detach(),
    r"idx_other_patch_nums": lambda: (
        model("vae").encode(image(), patch_nums=read_case(SYSTEM).config["other_patch_nums"]).codes
    ),
    r"phi_of_scale": lambda: conv_of_scale(),
    r"(vae_\w+)\.idx": lambda part: encoded(part).codes,
    r"(vae_\w+)\.fhat": lambda part: encoded(part).latents,
    r"train\.(.+)": lambda name: training()[name],
}
CLAMPED = ("recon", "recon_scale")


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    clamp = (-1, 1) if name in CLAMPED else None
    assert_matches(check(*found.groups()), read_case(SYSTEM).outputs[name], clamp=clamp)


def test_case_has_outputs():
    assert output_names(SYSTEM), f"there is no golden case at {case_path(SYSTEM)}"


def test_every_part_was_checked():
    names = output_names(SYSTEM)
    unchecked = [part for part in read_case(SYSTEM).states if part != "vae" and f"{part}.idx" not in names]
    assert not unchecked
