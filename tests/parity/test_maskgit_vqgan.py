"""MaskGIT's VQGAN against its PyTorch port and the original flax code: one test for each output of the golden case."""

from functools import cache

import pytest
import torch

from hfgen.conversion import load_original
from hfgen.models.quantizers.entropy import EntropyVectorQuantizer
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "maskgit_vqgan"
# The variance of flax's group norm is E[x^2] - E[x]^2 in float32, which alone moves its images by up to 6e-5.
FLAX_TOLERANCE = 2e-4


@cache
def model(part):
    case = read_case(SYSTEM)
    config = {name: value for name, value in case.config.items() if name != "jax"} | case.config["jax"]
    return load_original(SYSTEM, case.states[part], original_config=config)


def given(name):
    return read_case(SYSTEM).inputs[name]


def image():
    return given("image") * 2 - 1


def unit_range(pixels):
    return pixels * 0.5 + 0.5


@cache
@torch.no_grad()
def features(part):
    return model(part).features(image())


@cache
@torch.no_grad()
def encoded(part):
    return model(part).encode(image())


@torch.no_grad()
def decoded(part, codes=None):
    return unit_range(model(part).decode_codes(given("codes") if codes is None else codes).sample)


@torch.no_grad()
def reconstruction():
    return unit_range(model("tokenizer")(image()).sample)


def entering(module):
    """What ``module`` of the encoder receives."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model("tokenizer").features(image())
    handle.remove()
    return seen[0]


@cache
def port_training():
    """Loss and gradients with the port's weights of the two terms, which are swapped."""
    ours = model("tokenizer").quantizer
    quantizer = EntropyVectorQuantizer(
        ours.codebook_size, ours.embedding.embedding_dim, ours.commitment_weight, legacy_beta=True, entropy_weight=0
    ).train()
    quantizer.load_state_dict(ours.state_dict())
    z = features("tokenizer").clone().requires_grad_()
    output = quantizer(z)
    (output.latents.square().mean() + output.loss).backward()
    return {"loss_quant": output.loss.detach(), "grad_z": z.grad, "grad_codebook": quantizer.embedding.weight.grad}


def grid(codes):
    return codes.unflatten(1, features("jax_tokenizer").shape[2:])


def channels_last(tensor):
    return tensor.permute(0, 2, 3, 1)


def jax_losses(name):
    output = encoded("jax_tokenizer")
    return output.loss if name == "quantizer_loss" else output.losses[name]


CHECKS = {
    "conv_in": lambda: entering(model("tokenizer").encoder.down_blocks[0][0])[:, :, :8, :8],
    "down_last": lambda: entering(model("tokenizer").encoder.mid_block[0]),
    "z": lambda: features("tokenizer"),
    "distances": lambda: model("tokenizer").quantizer.distances(features("tokenizer")).detach().flatten(0, 1),
    "soft_code": lambda: model("tokenizer").quantizer.soft_codes(features("tokenizer"), temperature=0.5),
    "z_q": lambda: encoded("tokenizer").latents,
    "indices": lambda: encoded("tokenizer").codes,
    "encode": lambda: encoded("tokenizer").codes,
    "rec": lambda: reconstruction(),
    "decode_raw": lambda: decoded("tokenizer"),
    "decode": lambda: decoded("tokenizer"),
    "loss_quant": lambda: port_training()["loss_quant"],
    "grad_z": lambda: port_training()["grad_z"],
    "grad_codebook": lambda: port_training()["grad_codebook"],
    "jax.raw": lambda: channels_last(features("jax_tokenizer")),
    "jax.indices": lambda: grid(encoded("jax_tokenizer").codes),
    "jax.quantized": lambda: channels_last(encoded("jax_tokenizer").latents),
    "jax.quantizer_loss": lambda: jax_losses("quantizer_loss"),
    "jax.e_latent_loss": lambda: jax_losses("commitment"),
    "jax.q_latent_loss": lambda: jax_losses("codebook"),
    "jax.entropy_loss": lambda: jax_losses("entropy"),
    "jax.decode": lambda: channels_last(decoded("jax_tokenizer")),
}


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    assert name in CHECKS, f"no check reads the output {name}"
    tolerance = FLAX_TOLERANCE if name == "jax.decode" else 1e-5
    clamp = (0, 1) if name == "decode" else None
    assert_matches(CHECKS[name](), read_case(SYSTEM).outputs[name], tolerance=tolerance, clamp=clamp)


def test_case_has_outputs():
    assert output_names(SYSTEM), f"there is no golden case at {case_path(SYSTEM)}"


def test_square_grids_also_decode_from_sequences():
    codes = given("codes")
    side = min(codes.shape[1:])
    square = codes[:, :side, :side]
    assert torch.equal(decoded("tokenizer", square.flatten(1)), decoded("tokenizer", square))
