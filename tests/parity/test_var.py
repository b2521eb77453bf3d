"""The VAR transformer, sampling and editing against the official code: one test for each output of the golden case."""

import re
from functools import cache
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import hfgen.pipelines.var as var_pipeline
from hfgen.conversion import load_original, parts
from hfgen.conversion.rules import revert
from hfgen.pipelines.var import VARPipeline
from hfgen.sampling.logits import filter_logits
from hfgen.sampling.next_scale import smooth_probabilities
from support.golden import assert_matches, case_path, output_names, pixels, read_case

SYSTEM = "var"
SEED, SEEDED_CFG, EDIT_CFG = 7, 1.5, 3.0  # stated by the notes of the case
FILTERS = {"topk": {"top_k": 8}, "topp": {"top_p": 0.7}, "both": {"top_k": 12, "top_p": 0.8}}


@cache
def model(part):
    case = read_case(SYSTEM)
    return load_original(SYSTEM, case.states[part], original_config=case.config[part])


@cache
def true_codes():
    with torch.no_grad():
        return model("vae").encode(pixels(read_case(SYSTEM).inputs["image_u8"])).codes


@torch.no_grad()
def teacher_inputs():
    return model("vae").quantizer.generator_inputs(true_codes())


@cache
def training(part):
    """The training pass with the labels that the draws of the case drop: values and gradients by official name."""
    case = read_case(SYSTEM)
    transformer = model(part)
    dropped = case.inputs["drop_rand"] < transformer.config.class_dropout
    labels = torch.where(dropped, transformer.config.num_classes, case.inputs[f"{part}.label"])
    logits = transformer(teacher_inputs(), labels).logits
    flat, codes, last = logits.flatten(0, 1), true_codes(), transformer.scale_lengths[-1]
    loss = F.cross_entropy(flat, codes.flatten())
    names, parameters = zip(*transformer.named_parameters())
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters)))
    results = {
        "logits": logits,
        "loss_ls0": loss,
        "loss_ls0.1": F.cross_entropy(flat, codes.flatten(), label_smoothing=0.1),
        "loss_tail": F.cross_entropy(logits[:, -last:].flatten(0, 1), codes[:, -last:].flatten()),
        "acc_mean": (logits.argmax(-1) == codes).float().mean() * 100,
    }
    official = revert(gradients, parts(SYSTEM)["transformer"].rules(transformer.config))
    results |= {f"grad.{name}": value for name, value in official.items()}
    return {name: value.detach() for name, value in results.items()}


def sample(part, cfg, stored_logits=None, **arguments):
    """Run the pipeline and record every scale: codes, guided logits before the filters, relaxed codes.

    With ``stored_logits``, those of each scale replace the recorded ones from there on.
    """
    pipeline = VARPipeline(vq_model=model("vae"), transformer=model(part))
    pipeline.set_progress_bar_config(disable=True)
    record = {"idx": [], "logits": [], "probs": []}

    def record_filter(logits, **filters):
        record["logits"].append(logits)
        if stored_logits is not None:
            logits = stored_logits[len(record["logits"]) - 1]
        return filter_logits(logits, **filters)

    def record_smooth(*inputs):
        record["probs"].append(smooth_probabilities(*inputs))
        return record["probs"][-1]

    def record_step(_, scale, side, tensors):
        record["idx"].append(tensors["codes"])
        return {}

    with (
        mock.patch.object(var_pipeline, "filter_logits", record_filter),
        mock.patch.object(var_pipeline, "smooth_probabilities", record_smooth),
    ):
        output = pipeline(
            guidance_scale=1 + cfg,
            output_type="latent",
            callback_on_step_end=record_step,
            callback_on_step_end_tensor_inputs=["codes"],
            **arguments,
        )
    results = {name: torch.cat(values, dim=1) for name, values in record.items() if values}
    return results | {"fhat": output.images}


@cache
def greedy(part):
    case = read_case(SYSTEM)
    results = sample(part, case.config["cfg_scale"][part], class_labels=sample_labels(part), top_k=1, top_p=1.0)
    with torch.no_grad():
        results["image"] = (model("vae").decode(results["fhat"]).sample + 1) / 2
    return results


@cache
def unconditional(part):
    return sample(part, read_case(SYSTEM).config["cfg_scale"][part], class_labels=None, top_k=1, top_p=1.0)


@cache
def seeded(part):
    generator = torch.Generator().manual_seed(SEED)
    return sample(part, SEEDED_CFG, class_labels=sample_labels(part), generator=generator, **seeded_filters())


@cache
def smooth(part):
    """Smooth sampling with the exponential draws of the case, each scale continued from the stored logits.

    The last temperatures are near 0.01, so that codes relaxed from our own logits would have their rounding magnified.
    """
    case = read_case(SYSTEM)
    lengths = model(part).scale_lengths
    per_scale = case.inputs["smooth_exp"].split(lengths, dim=1)
    draws = iter([draw for draw in per_scale for _ in range(2)])  # the pipeline draws codes first, as the official one
    with mock.patch.object(var_pipeline, "exponential_draws", lambda *_: next(draws)):
        return sample(
            part,
            case.config["cfg_scale"][part],
            stored_logits=case.outputs[f"{part}.smooth.logits"].split(lengths, dim=1),
            class_labels=sample_labels(part),
            smooth=True,
            **seeded_filters(),
        )


@cache
def edited(kind):
    """Greedy in- and out-painting around the box of the case."""
    case, transformer = read_case(SYSTEM), model("var")
    side = transformer.patch_nums[-1]
    y0, x0, y1, x1 = (round(edge * side) for edge in case.config["edit_box"])
    box = torch.zeros(side, side)
    box[y0:y1, x0:x1] = 1
    repaint = box if kind == "inpaint" else 1 - box
    repaint = repaint.repeat_interleave(model("vae").downsample_factor, 0)
    repaint = repaint.repeat_interleave(model("vae").downsample_factor, 1)
    image = pixels(case.inputs["image_u8"])
    pipeline = VARPipeline(vq_model=model("vae"), transformer=transformer)
    _, keep = pipeline.prepare_edit(image, repaint, len(image), torch.device("cpu"))
    labels = sample_labels("var")
    results = sample("var", EDIT_CFG, class_labels=labels, top_k=1, top_p=1.0, image=image, mask_image=repaint)
    return results | {"mask": keep[0, 0]}


def sample_labels(part):
    return read_case(SYSTEM).inputs[f"{part}.sample_label"]


def seeded_filters():
    config = read_case(SYSTEM).config
    return {"top_k": config["seeded_top_k"], "top_p": config["seeded_top_p"]}


PART = r"(var\w*)"
CHECKS = {
    r"idx": lambda: true_codes(),
    r"var_input": lambda: teacher_inputs(),
    rf"{PART}\.(logits|loss_\w+(?:\.1)?|acc_mean|grad\..+)": lambda part, name: training(part)[name],
    rf"{PART}\.greedy\.(\w+)": lambda part, name: greedy(part)[name],
    rf"{PART}\.uncond\.(\w+)": lambda part, name: unconditional(part)[name],
    rf"{PART}\.smooth\.(\w+)": lambda part, name: smooth(part)[name],
    rf"{PART}\.seeded\.(\w+)": lambda part, name: seeded(part)[name],
    r"edit\.(inpaint|outpaint)\.(\w+)": lambda kind, name: edited(kind)[name],
    r"filter\.(\w+)": lambda name: filter_logits(read_case(SYSTEM).inputs["filter_logits"], **FILTERS[name]),
}


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    matches = [(check, found) for pattern, check in CHECKS.items() if (found := re.fullmatch(pattern, name))]
    assert matches, f"no check reads the output {name}"
    check, found = matches[0]
    clamp = (0, 1) if name.endswith(".image") else None
    assert_matches(check(*found.groups()), read_case(SYSTEM).outputs[name], clamp=clamp)


def test_case_has_outputs():
    assert output_names(SYSTEM), f"there is no golden case at {case_path(SYSTEM)}"


def test_every_part_was_checked():
    names = output_names(SYSTEM)
    unchecked = [part for part in read_case(SYSTEM).states if part != "vae" and f"{part}.logits" not in names]
    assert not unchecked
