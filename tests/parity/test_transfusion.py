"""The open implementation of Transfusion against the golden case: one test for each of its outputs.

The case has time 0 for noise and predicts data minus noise; the class is called with 1000 for noise and predicts noise
minus data. The padding of the case is text with the id 0 that no loss reads.
"""

import re
from contextlib import suppress
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from hfgen.conversion import load_original
from hfgen.losses.transfusion_flow import text_loss, transfusion_flow_loss
from hfgen.models.layers.mixed_sequence import PADDING_ID
from hfgen.sampling.mixed_parts import assemble, stack_sequences
from hfgen.sampling.transfusion_flow import generate, generate_images
from support.golden import assert_matches, case_path, output_names, read_case

SYSTEM = "transfusion"


@cache
def model():
    case = read_case(SYSTEM)
    return load_original("transfusion_pytorch", case.states["model"], original_config=case.config["init"])


def timesteps(times):
    return 1000 * (1 - times)


def noised(latents, noise, times):
    return [time * one + (1 - time) * other for one, other, time in zip(latents, noise, times)]


def part_of(name):
    """A part of a sequence; latents are of the first modality that they fit."""
    value = read_case(SYSTEM).inputs[name]
    if not value.is_floating_point():
        return value
    for modality in range(model().vocabulary.num_modalities):
        with suppress(ValueError):
            model().grid_of(value, modality)
            return modality, value
    raise AssertionError(f"{name} of shape {tuple(value.shape)} fits no modality")


@cache
def samples():
    """Sequence by sequence, the names of its parts as they follow each other."""
    names = sorted(name for name in read_case(SYSTEM).inputs if re.fullmatch(r"mm\.\w\.\w+", name))
    rows = {}
    for name in names:
        rows.setdefault(name.split(".")[1], []).append(name)
    orders = {"image text0 text1": "text0 image text1", "image0 image1 text": "image0 text image1"}
    ordered = []
    for key, members in sorted(rows.items()):
        kinds = " ".join(member.rpartition(".")[2] for member in members)
        ordered.append([f"mm.{key}.{kind}" for kind in orders[kinds].split()])
    return ordered


@cache
@torch.no_grad()
def mixed():
    """The training pass over sequences of texts and images, and what is inside it."""
    inputs, transformer = read_case(SYSTEM).inputs, model()
    rows, data, noise, times, names = [], [], [], [], []
    for row, members in enumerate(samples()):
        ids, images = assemble(transformer, [part_of(name) for name in members], end=True)
        rows.append(ids)
        data += images
        names += [name for name in members if inputs[name].is_floating_point()]
        noise += [inputs[name.replace("mm.", "mm.noise.", 1)] for name in names[len(noise) :]]
        times.append(inputs["mm.times"][row, : len(images)])
    ids, times = stack_sequences(rows), torch.cat(times)
    as_text = torch.where(ids == PADDING_ID, 0, ids)[:, :-1]
    layout = transformer.layout(as_text)
    states = {}
    hooks = [
        transformer.blocks[0].register_forward_pre_hook(lambda _, args: states.update(first=args[0])),
        transformer.norm_out.register_forward_hook(lambda _, args, out: states.update(last=out)),
    ]
    output = transformer(as_text, noised(data, noise, times), timesteps(times))
    for hook in hooks:
        hook.remove()
    targets = [one - image for one, image in zip(noise, data)]
    losses = transfusion_flow_loss(output.logits, ids, transformer.vocabulary.null_id, output.sample, targets)
    flows = {name.removeprefix("mm."): -one for name, one in zip(names, output.sample)}
    return ids, layout, states, losses, flows


def image_positions():
    """(B, M, 3): modality, first place and length of every image; zeros where a sequence has fewer."""
    ids, layout = mixed()[:2]
    rows = []
    for row in layout.runs:
        kinds = [run for run in row.unique().tolist() if run]
        places = [(row == run).nonzero().flatten() for run in kinds]
        rows.append(torch.tensor([[layout.modalities[run - 1], at[0], len(at)] for run, at in zip(kinds, places)]))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@cache
@torch.no_grad()
def text():
    ids = read_case(SYSTEM).inputs["text.ids"]
    return ids, model()(ids).logits


@torch.no_grad()
def continued(ids, number):
    """The most likely of all ids, one after the other; what was read is kept."""
    transformer, drawn = model(), []
    cached = transformer.new_cache(len(ids), ids.shape[1] + number)
    for _ in range(number):
        layout = transformer.layout(ids, cached)
        ids = transformer.extend(layout, cached).logits[:, -1].argmax(-1, keepdim=True)
        cached.keep(layout)
        drawn.append(ids)
    return torch.cat(drawn, dim=1)


def greedy(expected):
    """What follows the first ids of the texts; the case does not say of how many, so all numbers are tried."""
    ids = read_case(SYSTEM).inputs["text.ids"]
    tried = [continued(ids[:, :length], expected.shape[1]) for length in range(1, ids.shape[1] + 1)]
    return next((drawn for drawn in tried if torch.equal(drawn, expected)), tried[0])


@cache
@torch.no_grad()
def only_images():
    """Images without any text."""
    inputs, transformer = read_case(SYSTEM).inputs, model()
    latents, noise, times = (inputs[f"image.{name}"] for name in ("latents", "noise", "times"))
    slots = torch.tensor(transformer.slots(0, transformer.grid_of(latents[0], 0))).expand(len(latents), -1)
    noisy = torch.stack(noised(latents, noise, times))
    return -transformer(slots, noisy, timesteps(times)).sample, latents - noise


def forced_grid():
    return model().grid_of(read_case(SYSTEM).outputs["sample.image"], 0)


@cache
def sampled():
    """An image after a prompt and the text behind it, as the implementation samples with its cache."""
    case, steps = read_case(SYSTEM), []
    config, noise = case.config["sampling"], case.inputs["sample.noise"]
    length = len(case.outputs["sample.text1"]) + len(case.outputs["sample.text0"]) - len(case.inputs["sample.prompt"])
    result = generate(
        model(),
        [case.inputs["sample.prompt"]],
        image=(0, forced_grid()),
        max_length=length - 1 + torch.Size(forced_grid()).numel(),
        num_inference_steps=config["steps"] - 1,
        guidance_scale=config["cfg"],
        temperature=0.0,
        noise=noise,
        on_step=lambda step, latents: steps.append(latents[0]),
        any_id=True,
        keep_midpoint=True,
    )
    text0, (_, image), text1, *rest = result.parts
    assert not rest
    first = noise[: torch.Size(forced_grid()).numel()].unflatten(0, forced_grid())
    first = first.movedim(-1, 0) if model().config.channel_first[0] else first
    return {"text0": text0, "image": image, "text1": text1, "trajectory": torch.stack([first, *steps])}


def without_guidance():
    case = read_case(SYSTEM)
    images, _ = generate_images(
        model(),
        [[case.inputs["sample.prompt"]]],
        forced_grid(),
        num_inference_steps=case.config["sampling"]["steps"] - 1,
        guidance_scale=1.0,
        noise=case.inputs["sample.noise"][None],
    )
    return images[0]


def free_text(expected):
    prompt = read_case(SYSTEM).inputs["sample.prompt"]
    length = len(expected) - len(prompt) - 1
    result = generate(model(), [prompt], max_length=length, temperature=0.0, any_id=True)
    (ids,) = result.parts
    return ids


CHECKS = {
    r"text\.logits": lambda expected: text()[1],
    r"text\.loss": lambda expected: text_loss(text()[1][:, :-1], text()[0][:, 1:], model().config.num_text_tokens),
    r"text\.greedy": greedy,
    r"mm\.loss": lambda expected: mixed()[3].total,
    r"mm\.loss_text": lambda expected: mixed()[3].text,
    r"mm\.loss_flow": lambda expected: torch.stack(mixed()[3].flow).reshape(expected.shape),
    r"mm\.flow\.(.+)": lambda expected, name: mixed()[4][name],
    r"mm\.hidden_(first|last)": lambda expected, name: mixed()[2][name],
    r"mm\.text_row": lambda expected: mixed()[0].clamp(min=-1),
    r"mm\.positions": lambda expected: image_positions(),
    r"mm\.allowed": lambda expected: mixed()[1].mask[:, 0].to(expected.dtype),
    r"mm\.rotary_positions": lambda expected: mixed()[1].positions,
    r"image\.pred": lambda expected: only_images()[0],
    r"image\.loss": lambda expected: F.mse_loss(*only_images()),
    r"sample\.(text0|image|text1|trajectory)": lambda expected, name: sampled()[name],
    r"sample\.image_nocfg": lambda expected: without_guidance(),
    r"sample\.free_text": free_text,
}


@pytest.mark.parametrize("name", output_names(SYSTEM))
def test_output(name):
    found = [(check, match) for pattern, check in CHECKS.items() if (match := re.fullmatch(pattern, name))]
    assert found, f"nothing computes {name}"
    ((check, match),) = found
    expected = read_case(SYSTEM).outputs[name]
    assert_matches(check(expected, *match.groups()), expected)


def test_there_is_a_case():
    assert output_names(SYSTEM), f"there are no outputs in a golden case at {case_path(SYSTEM)}"
    assert {"text.logits", "mm.loss", "sample.image"} <= set(output_names(SYSTEM))
