"""MaskGIT and the generators of TiTok against the official code: one test for each output of the golden case."""

import math
import re
from functools import cache
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import hfgen.pipelines.maskgit as maskgit_pipeline
from hfgen.conversion import load_original, parts
from hfgen.conversion.rules import revert
from hfgen.losses.masked import masked_token_accuracy, masked_token_loss
from hfgen.pipelines.maskgit import MaskGITPipeline
from hfgen.sampling.masked_tokens import mask_ratio, masked_positions, random_token_mask
from hfgen.schedulers.masked_token import MaskedTokenScheduler
from support.golden import assert_matches, case_path, output_names, read_case
from support.grey_tokenizer import GreyTokenizer

SYSTEM = "maskgit"
CONVERTERS = {"bert": ("titok", "image_bert"), "uvit": ("titok", "uvit")}
SCHEDULES = {"uniform": "linear"}  # official names that differ
SCHEDULE_TOKENS = 256  # stated by the notes of the case
# Flax computes the variance of a group as E[x^2] - E[x]^2 in float32; the sheet of the VQGAN states the difference.
FLAX_IMAGE_TOLERANCE = 2e-4


@cache
def model(part):
    case = read_case(SYSTEM)
    if part == "jax":
        config = case.config["jax"]
        original = config["transformer"] | {"num_class": config["num_class"]}
        return load_original("maskgit", case.states["jax_transformer"], original_config=original)
    system, name = CONVERTERS[part]
    return load_original(system, case.states[part], part=name, original_config=case.config[part])


@cache
def tokenizer(part):
    case = read_case(SYSTEM)
    if part == "jax":
        return load_original("maskgit_vqgan", case.states["jax_tokenizer"])
    config = case.config["bert_tokenizer"] | {"vit_sizes": case.config["vit_sizes"]}
    return load_original("titok", case.states["tokenizer"], original_config=config)


def as_codes(ids, part):
    """(B, 1 + N) ids of the original to codes and labels of the transformer."""
    config = model(part).config
    return torch.where(ids[:, 1:] == -1, config.num_codes, ids[:, 1:]), ids[:, 0] - config.num_codes


def sample(part, scheduler, labels, token_noise, choice_noise, codes=None, **arguments):
    """Run the pipeline with the noise of the case (T, B, N, K) and (T, B, N): codes and predicted codes by step."""
    transformer = model(part)
    stand_in = GreyTokenizer(transformer.config.num_codes, math.isqrt(transformer.config.num_tokens))
    stand_in.num_tokens = transformer.config.num_tokens  # only codes are compared here
    pipeline = MaskGITPipeline(stand_in, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    positions, steps = [], SimpleNamespace(codes=[], predicted=[])

    def record_positions(*inputs):
        positions.append(masked_positions(*inputs))
        return positions[-1]

    def stored_noise(counts, shape, generator, device):
        noise = (token_noise if shape else choice_noise)[len(positions) - 1]
        return noise[torch.arange(len(noise))[:, None], positions[-1]]

    def record_step(pipe, index, masked, tensors):
        steps.codes.append(tensors["codes"])
        steps.predicted.append(tensors["predicted_codes"])
        return {}

    edit = {} if codes is None else {"image": "given", "mask_image": "given"}
    with (
        mock.patch.object(maskgit_pipeline, "masked_positions", record_positions),
        mock.patch.object(maskgit_pipeline, "gumbel_draws", stored_noise),
        mock.patch.object(MaskGITPipeline, "prepare_edit", lambda *_: codes),
    ):
        output = pipeline(
            labels,
            output_type="latent",
            callback_on_step_end=record_step,
            callback_on_step_end_tensor_inputs=["codes", "predicted_codes"],
            **edit,
            **arguments,
        )
    assert torch.equal(output.images, steps.predicted[-1]) and output.nfe == len(steps.codes)
    return steps


def gumbel(uniforms):
    """The official noise: both logarithms are clamped."""
    return -(-uniforms.clamp(min=1e-20).log()).clamp(min=1e-20).log()


@cache
def run(part, name):
    """One of the sampling runs of TiTok's generators."""
    case = read_case(SYSTEM)
    (settings,) = [each for each in case.config["sampling"][part] if each["name"] == name]
    decay, scale = settings.get("guidance_decay", "constant"), settings.get("guidance_scale", 3.0)
    temperature = settings.get("randomize_temperature", 4.5)
    scheduler = MaskedTokenScheduler(
        mask_schedule="arccos",
        confidence="logit",
        token_temperature=temperature,
        token_annealing="linear",
        choice_temperature=temperature,
        softmax_temperatures=(1.3, 0.5) if settings.get("softmax_temperature_annealing") else (1.0, 1.0),
        guidance_scale=scale if decay == "power-cosine" else 1 + scale,
        guidance_schedule=decay,
        guidance_power=settings.get("guidance_scale_pow", 3.0),
        guidance_progress="before",
        num_inference_steps=settings["steps"],
    )
    noise = [gumbel(case.inputs[f"{part}.{name}.{draws}"]) for draws in ("u_tokens", "u_conf")]
    steps = sample(part, scheduler, case.inputs["classes"], *noise)
    start = torch.full_like(steps.codes[0], model(part).mask_token_id)
    return {"ids": steps.predicted[-1], "steps": torch.stack([start, *steps.codes[:-1]])}


@torch.no_grad()
def run_image(part, ids):
    return (tokenizer(part).decode_codes(ids).sample + 1) / 2


@cache
def jax_run(name):
    """Sampling from masks, or from partly known tokens as the editor does."""
    case = read_case(SYSTEM)
    config, inputs = case.config["jax"][name], case.inputs[f"jax.{name}.inputs"]
    scheduler = MaskedTokenScheduler.from_preset("maskgit")
    codes, labels = as_codes(inputs, "jax")
    noise = [case.inputs[f"jax.{name}.{draws}"][:, :, 1:] for draws in ("g_tokens", "g_choice")]
    steps = sample(
        "jax",
        scheduler,
        labels,
        *noise,
        codes=codes,
        num_inference_steps=config["num_iter"],
        first_step=config["start_iter"],
        choice_temperature=case.config["jax"]["sample_choice_temperature"],
    )
    done = [torch.cat([inputs[:, :1], predicted], dim=1) for predicted in steps.predicted]
    return torch.stack([inputs] * config["start_iter"] + done, dim=1)


@cache
@torch.no_grad()
def jax_logits():
    return model("jax").forward_vocabulary(*as_codes(read_case(SYSTEM).inputs["jax.ids"], "jax"))


def jax_image(name):
    codes = jax_run(name)[:, -1, 1:]
    with torch.no_grad():
        return (tokenizer("jax").decode_codes(codes).sample.permute(0, 2, 3, 1) + 1) / 2


def jax_loss():
    case = read_case(SYSTEM)
    return masked_token_loss(
        case.outputs["jax.logits"],
        case.inputs["jax.loss.labels"].long(),
        case.inputs["jax.loss.weights"],
        label_smoothing=case.config["jax_label_smoothing"],
        reduction="images",
    )


@torch.no_grad()
def logits(part, condition):
    case, transformer = read_case(SYSTEM), model(part)
    labels = case.inputs["classes"]
    if condition == "uncond":
        labels = torch.full_like(labels, transformer.unconditional_label)
    return transformer(case.inputs["ids"], labels).logits


@cache
def training(part):
    """A training step with the draws of the case: masks, loss, accuracy and gradients by official name."""
    case, transformer = read_case(SYSTEM), model(part)
    codes, settings = case.inputs["train.tokens"], case.config["losses"]
    ratio = mask_ratio("arccos", case.inputs["train.t"], codes.shape[1])
    mask = random_token_mask(ratio, case.inputs["train.r"])
    masked = codes.masked_fill(mask, transformer.mask_token_id)
    dropped = case.inputs["train.drop"] < case.config["train_cond_drop_prob"]
    labels = torch.where(dropped, transformer.unconditional_label, case.inputs["classes"])
    predicted = transformer(masked, labels).logits
    loss = masked_token_loss(
        predicted,
        codes,
        mask,
        unmasked_weight=settings["loss_weight_unmasked_token"],
        label_smoothing=settings["label_smoothing"],
    )
    names, parameters = zip(*transformer.named_parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    system, name = CONVERTERS[part]
    official = revert(dict(zip(names, gradients)), parts(system)[name].rules(transformer.config))
    official = {name.removeprefix("model."): value for name, value in official.items()}
    (table,) = official.keys() & {"embeddings.weight", "embeddings.word_embeddings.weight"}
    results = {
        "masked": masked,
        "masks": mask,
        "loss": loss.detach(),
        "correct_tokens": masked_token_accuracy(predicted, codes, mask).detach(),
        "grad.embeddings": official[table],
    }
    return results | {f"grad.{name}": value for name, value in official.items()}


def schedule(name):
    return mask_ratio(SCHEDULES.get(name, name), read_case(SYSTEM).inputs["jax.schedule.ratio"], SCHEDULE_TOKENS)


PART = r"(bert|uvit)"
CHECKS = {
    r"jax\.logits": lambda: jax_logits(),
    r"jax\.loss": lambda: jax_loss(),
    r"jax\.(sample|edit)\.seqs": lambda name: jax_run(name),
    r"jax\.(sample|edit)\.image": lambda name: jax_image(name),
    r"jax\.schedule\.(.+)": lambda name: schedule(name),
    rf"{PART}\.logits_(cond|uncond)": lambda part, condition: logits(part, condition),
    rf"{PART}\.train\.(.+)": lambda part, name: training(part)[name],
    rf"{PART}\.(\w+)\.image": lambda part, name: run_image(part, run(part, name)["ids"]),
    rf"{PART}\.(\w+)\.(ids|steps)": lambda part, name, what: run(part, name)[what],
}


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    expected = read_case(SYSTEM).outputs[name]
    tolerance = FLAX_IMAGE_TOLERANCE if name.startswith("jax.") and name.endswith(".image") else 1e-5
    assert_matches(check(*found.groups()), expected, tolerance=tolerance)


def test_case_has_outputs():
    assert output_names(SYSTEM), f"there is no golden case at {case_path(SYSTEM)}"


def test_every_part_was_checked():
    names = output_names(SYSTEM)
    generators = [part.removesuffix("_transformer") for part in read_case(SYSTEM).states if "tokenizer" not in part]
    assert generators
    assert not [part for part in generators if not any(re.match(rf"{part}\.logits", name) for name in names)]
