"""Both image modes of Transfusion against the reference written from the paper: one test for each output of the case.

No authors' code exists. The names of the reference's weights are those of the class, but for the layers of images.
"""

import re
from functools import cache

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from hfgen import NoisyLatentQuantizer, TransfusionTransformer
from hfgen.losses.transfusion import text_labels, transfusion_loss
from hfgen.models.layers.patch import patchify
from hfgen.models.layers.sequence_mask import image_runs, sequence_mask
from hfgen.sampling.transfusion import denoise, extend_images, extend_text, image_codes, read_texts, text_tokens
from hfgen.sampling.transfusion_cache import TransfusionCache
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "transfusion_reference"
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "latent_channels": "latent_channels",
    "time_frequency_dim": "time_frequency_dim",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
}
CONTINUOUS = {
    "patch_size": "patch_size",
    "eos_token_id": "eos_token_id",
    "boi_token_id": "boi_token_id",
    "eoi_token_id": "eoi_token_id",
    "image_token_id": "image_token_id",
}
DISCRETE = {
    "boi_token_id": "eot_token_id",
    "codebook_size": "codebook_size",
    "code_offset": "code_offset",
    "fixed_timestep": "fixed_timestep",
}
EVERY = 50  # the reference keeps every fiftieth number of the noise schedule


def config(part):
    return read_case(SYSTEM).config[part]


@cache
def model(part):
    arguments = {
        ours: config(part)[name] for ours, name in (SIZES | (CONTINUOUS if part == "A" else DISCRETE)).items()
    }
    if part == "B":
        arguments |= {"image_mode": "discrete", "eos_token_id": None, "eoi_token_id": None, "image_token_id": None}
    transformer = TransfusionTransformer(**arguments).eval()
    state = read_case(SYSTEM).states[part]
    transformer.load_state_dict(
        {re.sub(r"^(image_in|image_out)\.", r"\1.proj.", name): value for name, value in state.items()}
    )
    return transformer


@cache
def quantizer():
    """Of part B."""
    part = config("B")
    result = NoisyLatentQuantizer(
        num_codes=part["codebook_size"],
        latent_channels=part["latent_channels"],
        sigma=part["noise_sigma"],
        timestep=part["fixed_timestep"],
    ).eval()
    state = read_case(SYSTEM).states["B_quantizer"]
    result.load_state_dict({name.replace("codebook.", "codebook.embedding."): value for name, value in state.items()})
    return result


def noise_scheduler():
    """Of part A."""
    steps = config("A")["num_train_timesteps"]
    return DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2", clip_sample=False)


@cache
@torch.no_grad()
def continuous():
    """The training step of part A."""
    inputs, transformer, scheduler, part = read_case(SYSTEM).inputs, model("A"), noise_scheduler(), config("A")
    ids, x0, noise, t = (inputs[f"A.{name}"] for name in ("ids", "x0", "noise", "t"))
    x_t = scheduler.add_noise(x0, noise, t)
    output = transformer(ids, x_t, t)
    labels = text_labels(
        ids,
        pad_token_id=part["pad_token_id"],
        image_token_id=part["image_token_id"],
        boi_token_id=part["boi_token_id"],
    )
    loss = transfusion_loss(output.logits, labels, output.sample, noise, image_weight=part["loss_lambda"])
    runs = image_runs(ids == part["image_token_id"])
    return {
        "x_t": x_t,
        "patches": patchify(x_t, part["patch_size"]),
        "allowed": sequence_mask(ids == part["pad_token_id"], runs)[:, 0].to(torch.uint8),
        "alphas_cumprod": scheduler.alphas_cumprod[::EVERY],
        "logits": output.logits,
        "eps": output.sample,
        "lm_labels": labels,
        "loss_lm": loss.text,
        "loss_ddpm": loss.image,
        "loss_ddpm_per_image": loss.per_image,
        "loss": loss.loss,
    }


@cache
@torch.no_grad()
def discrete():
    """The training step of part B."""
    inputs, transformer, tokenizer = read_case(SYSTEM).inputs, model("B"), quantizer()
    z_t = tokenizer.add_noise(inputs["B.z"], inputs["B.noise"])
    logits = transformer(inputs["B.ids"]).logits
    labels = text_labels(inputs["B.ids"], pad_token_id=config("B")["pad_token_id"])
    return {
        "z_t": z_t,
        "codes": tokenizer.encode(z_t),
        "logits": logits,
        "labels": labels[:, :-1],
        "loss": transfusion_loss(logits, labels).loss,
    }


def read(part, text):
    """The cache and the last states of texts, each between the beginning and the marker of an image."""
    ids = model(part).config
    rows = [[ids.bos_token_id, *row, ids.boi_token_id] for row in text]
    return read_texts(
        model(part), rows, num_layers=ids.num_layers, pad_token_id=ids.pad_token_id, device=torch.device("cpu")
    )


def guidance_of_the_case(context, noise, scheduler, after):
    """The case does not say how strongly it was guided, but its first step, ``after``, is linear in that scale."""

    def first_step(scale):
        steps = []
        cache = TransfusionCache.join([(context, [0, 1])], room=noise[0, 0].numel())
        denoise(
            model("A"),
            cache,
            noise,
            scheduler,
            guidance_scale=scale,
            on_step=lambda i, t, inputs, prediction, latents: steps.append(latents) or latents,
        )
        return steps[0]

    unguided = first_step(0.0)
    change = (first_step(2.0) - unguided) / 2
    return round(float((change * (after - unguided)).sum() / change.square().sum()), 1)


@cache
@torch.no_grad()
def continuous_sample():
    """Text, an image that is denoised after it, and the likeliest text after the image."""
    inputs, outputs, transformer = read_case(SYSTEM).inputs, read_case(SYSTEM).outputs, model("A")
    scheduler = DDIMScheduler.from_config(noise_scheduler().config, timestep_spacing="leading")
    scheduler.set_timesteps(len(outputs["A.sample.timesteps"]))
    noise, prompt = inputs["A.sample.noise"], inputs["A.sample.prompt"].tolist()
    both, _ = read("A", [prompt, []])
    trajectory = [noise]
    scale = guidance_of_the_case(both, noise, scheduler, outputs["A.sample.trajectory"][1])
    num_patches = noise.shape[-1] * noise.shape[-2] // transformer.config.patch_size**2
    image = denoise(
        transformer,
        TransfusionCache.join([(both, [0, 1])], room=num_patches),
        noise,
        scheduler,
        guidance_scale=scale,
        on_step=lambda i, t, inputs, prediction, latents: trajectory.append(latents) or latents,
    )
    expected = outputs["A.sample.text_after"]
    sequence = TransfusionCache.join([(both, [0])], room=num_patches + 1 + len(expected))
    extend_images(transformer, sequence, image, torch.zeros(1, dtype=torch.long))
    last = extend_text(transformer, sequence, torch.tensor([[transformer.config.eoi_token_id]]))[:, -1]
    blocked = torch.zeros(transformer.config.vocab_size, dtype=torch.bool)
    blocked[[transformer.config[f"{name}_token_id"] for name in ("image", "pad", "bos")]] = True
    text = text_tokens(transformer, sequence, last, blocked, temperature=0)
    return {
        "timesteps": scheduler.timesteps,
        "trajectory": torch.cat(trajectory),
        "image": image[0],
        "text_after": torch.cat([token for token, _ in zip(text, expected)]),
    }


@cache
@torch.no_grad()
def discrete_sample():
    """Text and the codes that are drawn after it."""
    inputs, transformer = read_case(SYSTEM).inputs, model("B")
    draws = inputs["B.sample.exponential"]
    context, last = read("B", [inputs["B.sample.prompt"].tolist()])
    stream = iter(draws)
    codes = image_codes(
        transformer,
        TransfusionCache.join([(context, [0])], room=len(draws)),
        last,
        num_codes=len(draws),
        code_offset=transformer.config.code_offset,
        codebook_size=transformer.config.codebook_size,
        draws=lambda shape: next(stream).expand(shape),
    )
    tokens = torch.stack(list(codes), dim=1)
    grid = read_case(SYSTEM).outputs["B.sample.latent"].shape[1:]
    return {"tokens": tokens[0], "latent": quantizer().decode(tokens.unflatten(1, grid))[0]}


CHECKS = {
    r"A\.sample\.(\w+)": lambda name: continuous_sample()[name],
    r"B\.sample\.(\w+)": lambda name: discrete_sample()[name],
    r"A\.(\w+)": lambda name: continuous()[name],
    r"B\.(\w+)": lambda name: discrete()[name],
}


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    assert_matches(check(*found.groups()), read_case(SYSTEM).outputs[name])


def test_every_part_was_checked():
    names = output_names(SYSTEM)
    assert names, f"there is no golden case at {case_path(SYSTEM)}"
    for part, output in (("A", "A.eps"), ("B", "B.logits"), ("B_quantizer", "B.codes")):
        assert (part in read_case(SYSTEM).states) == (output in names)


def test_the_ids_of_discrete_images_are_their_codes():
    """The sequences of part B are made of the codes that the quantizer gives."""
    codes = discrete()["codes"] + config("B")["code_offset"]
    ids = read_case(SYSTEM).inputs["B.ids"]
    assert torch.equal(ids[model("B").is_code(ids)], codes.flatten())
