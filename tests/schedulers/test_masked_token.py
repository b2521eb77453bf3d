"""The masked-token scheduler: its plan, its step, and the published rules that it stands for."""

import itertools
import json
import math

import pytest
import torch
from diffusers import AmusedScheduler

from hfgen.counters import generator
from hfgen.sampling.masked_tokens import (
    anneal,
    confidence_of,
    gumbel_draws,
    lowest,
    mask_ratio,
    masked_positions,
    random_token_mask,
)
from hfgen.schedulers.masked_token import MaskedTokenScheduler

SCHEDULES = ("cosine", "arccos", "linear", "square", "cubic", "root", "log", "exp", "pow1.5")
MASK, NUM_CODES = 12, 12


def logits(batch, count, seed=0):
    return 3 * torch.randn(batch, count, NUM_CODES, generator=generator(seed))


def sample(scheduler, codes, num_steps=None, seed=0, **arguments):
    """All steps with random logits: the inputs of each step, and the result."""
    plan = scheduler.plan((codes == MASK).sum(1).tolist(), num_steps, **arguments)
    inputs, predicted = [], codes
    for step in plan:
        inputs.append(codes)
        positions = masked_positions(codes, MASK, step.num_positions)
        noise = [
            gumbel_draws(step.num_masked, shape, generator(seed, step.index), "cpu") for shape in ((NUM_CODES,), ())
        ]
        codes, predicted = scheduler.step(
            logits(len(codes), step.num_positions, step.index), codes, positions, step, MASK, *noise, return_dict=False
        )
    return plan, inputs, predicted


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mask_ratio_falls_from_one_to_zero(schedule):
    ratio = mask_ratio(schedule, torch.linspace(0, 1, 65), 64)
    assert ratio[0] >= 1 - 1 / 64 and ratio[-1] <= 1e-5  # exp starts at 1 - 1 / N
    assert (ratio.diff() <= 0).all() and ratio.min() >= 1e-6


def test_cosine_and_arccos_are_different_curves():
    half = torch.tensor(0.5)
    assert mask_ratio("cosine", half, 16).item() == pytest.approx(0.7071, abs=1e-4)
    assert mask_ratio("arccos", half, 16).item() == pytest.approx(0.6667, abs=1e-4)


@pytest.mark.parametrize("name", ["sine", "pow", "pow-1", "pow0", ""])
def test_unknown_mask_schedule(name):
    with pytest.raises(ValueError, match=f"Unknown mask schedule '{name}'.*cosine"):
        MaskedTokenScheduler(mask_schedule=name)


def test_annealings():
    assert anneal("constant", 2.0, 3) == [2.0] * 3
    assert anneal("linear", 2.0, 4) == [1.5, 1.0, 0.5, 0.0]
    assert anneal("ramp", 2.0, 5) == [2.0, 1.5, 1.0, 0.5, 0.0]
    assert anneal("product", 2.0, 4) == pytest.approx([1.5, 0.75, 0.1875, 0.0])
    assert anneal("ramp", 2.0, 1) == [2.0]


def test_masked_positions_ascend_and_come_first():
    codes = torch.tensor([[MASK, 1, MASK, MASK], [0, MASK, 2, 3]])
    assert masked_positions(codes, MASK, 3).tolist() == [[0, 2, 3], [1, 0, 2]]


def test_lowest_takes_the_exact_number_despite_ties():
    confidence = torch.tensor([[0.5, 0.5, 0.5, 0.1], [1.0, 2.0, torch.inf, torch.inf]])
    assert lowest(confidence, torch.tensor([2, 1])).tolist() == [
        [True, False, False, True],
        [True, False, False, False],
    ]


def test_confidences():
    values, codes = logits(2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]])
    drawn = values.gather(-1, codes[..., None])[..., 0]
    assert torch.equal(confidence_of("logit", values, codes), drawn)
    expected = values.softmax(-1).gather(-1, codes[..., None])[..., 0].log()
    torch.testing.assert_close(confidence_of("log-probability", values, codes), expected)
    assert not confidence_of("random", values, codes).any()


def test_noise_of_an_image_does_not_depend_on_its_batch():
    together = gumbel_draws([3, 5], (4,), [generator(0), generator(1)], "cpu")
    assert together.shape == (2, 5, 4)
    assert torch.equal(together[:1, :3], gumbel_draws([3], (4,), [generator(0)], "cpu"))
    assert not together[0, 3:].any()
    with pytest.raises(ValueError, match="1 generators for a batch of 2"):
        gumbel_draws([3, 5], (4,), [generator(0)], "cpu")


def test_noise_is_standard_gumbel():
    noise = gumbel_draws([20000], (), generator(0), "cpu")
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.06)


def test_random_token_mask():
    draws = torch.rand(3, 16, generator=generator(0))
    mask = random_token_mask(torch.tensor([0.0, 0.25, 1.0]), draws)
    assert mask.sum(1).tolist() == [1, 4, 16]
    assert not torch.equal(mask[1], random_token_mask(torch.full((3,), 0.25), draws.flip(1))[1])


@pytest.mark.parametrize(("schedule", "annealing"), list(itertools.product(SCHEDULES, ("constant", "product"))))
def test_every_step_keeps_something_and_kept_tokens_stay(schedule, annealing):
    scheduler = MaskedTokenScheduler(mask_schedule=schedule, choice_annealing=annealing)
    codes = torch.full((2, 16), MASK)
    codes[1, :5] = torch.arange(5)
    plan, inputs, predicted = sample(scheduler, codes, 6)
    assert [step.num_masked for step in plan[1:]] == [step.num_remasked for step in plan[:-1]]
    assert plan[-1].num_remasked == (0, 0)
    for step, before, after in zip(plan, inputs, [*inputs[1:], predicted]):
        assert tuple((before == MASK).sum(1).tolist()) == step.num_masked
        known = before != MASK
        assert torch.equal(after[known], before[known])
        assert ((after == MASK) <= (before == MASK)).all()
        # A steep schedule can be down to the last token early, which is then drawn again, as in the published code.
        assert all(have > rest or have == rest == 1 for have, rest in zip(step.num_masked, step.num_remasked))
    assert predicted.min() >= 0 and predicted.max() < NUM_CODES


def test_the_least_confident_tokens_are_masked_again():
    scheduler = MaskedTokenScheduler(token_temperature=0, choice_temperature=0, mask_schedule="linear")
    values = torch.zeros(1, 4, NUM_CODES)
    values[0, torch.arange(4), torch.tensor([3, 1, 4, 5])] = torch.tensor([9.0, 2.0, 8.0, 1.0])
    codes = torch.full((1, 4), MASK)
    step = scheduler.plan([4], 2)[0]
    output = scheduler.step(values, codes, masked_positions(codes, MASK, 4), step, MASK)
    assert output.pred_original_sample.tolist() == [[3, 1, 4, 5]]
    assert output.prev_sample.tolist() == [[3, MASK, 4, MASK]]


def test_a_step_changes_nothing_but_its_result():
    scheduler = MaskedTokenScheduler()
    codes, state = torch.full((1, 8), MASK), torch.get_rng_state()
    first, second = (sample(scheduler, codes, 4)[2] for _ in range(2))
    assert torch.equal(first, second) and (codes == MASK).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_agrees_with_the_scheduler_of_diffusers(monkeypatch):
    """The rule of aMUSEd, drawn with the same noise."""
    num_steps, num_tokens = 5, 20
    ours, theirs = MaskedTokenScheduler.from_preset("amused"), AmusedScheduler(mask_token_id=MASK)
    theirs.set_timesteps(num_steps, temperature=(2, 0))
    token_noise = gumbel_draws([num_tokens] * 2, (NUM_CODES,), generator(1), "cpu")
    choice_noise = gumbel_draws([num_tokens] * 2, (), generator(2), "cpu")
    module = "diffusers.schedulers.scheduling_amused.gumbel_noise"
    monkeypatch.setattr(module, lambda *_, **__: choice_noise)

    def categorical(probabilities, *_, **__):
        return (probabilities.log() + token_noise.flatten(0, 1)).argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", categorical)
    ours_codes = theirs_codes = torch.full((2, num_tokens), MASK)
    for step, timestep in zip(ours.plan([num_tokens] * 2, num_steps), theirs.timesteps):
        values = logits(2, num_tokens, step.index)
        positions = masked_positions(ours_codes, MASK, step.num_positions)
        rows = torch.arange(2)[:, None]
        inputs = (values[rows, positions], ours_codes, positions, step, MASK)
        ours_codes = ours.step(*inputs, token_noise[rows, positions], choice_noise[rows, positions]).prev_sample
        theirs_codes = theirs.step(values, timestep, theirs_codes).prev_sample
        assert torch.equal(ours_codes, theirs_codes)


@pytest.mark.parametrize("name", list(MaskedTokenScheduler.presets))
def test_presets_save_and_load(name, tmp_path):
    scheduler = MaskedTokenScheduler.from_preset(name)
    scheduler.save_pretrained(tmp_path)
    loaded = MaskedTokenScheduler.from_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").is_file()
    assert loaded.plan([256]) == scheduler.plan([256])
    assert len(loaded.plan([256])) == scheduler.config.num_inference_steps


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_inference_steps", "8", "num_inference_steps = '8'; expected int"),
        ("choice_temperature", [1.0], r"choice_temperature = \[1.0\]; expected a finite float"),
        ("softmax_temperatures", [1.0] * 3, "softmax_temperatures = "),
        ("mask_schedule", "sine", "Unknown mask schedule 'sine'"),
    ],
)
def test_hostile_configurations(name, value, message, tmp_path):
    MaskedTokenScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=message):
        MaskedTokenScheduler.from_pretrained(tmp_path)


def test_published_guidance():
    """The scale at step t of T, from the formulas of TiTok with s = w - 1 for the linear one."""
    linear = MaskedTokenScheduler.from_preset("titok-l32").plan([32])
    assert [step.guidance_scale for step in linear] == pytest.approx([1 + 4.5 * t / 8 for t in range(8)])
    cosine = MaskedTokenScheduler.from_preset("titok-s128").plan([128])
    expected = [5.9 * (1 - math.cos(math.pi * (t / 64) ** 3)) / 2 + 1 for t in range(64)]
    assert [step.guidance_scale for step in cosine] == pytest.approx(expected)
    after = MaskedTokenScheduler(guidance_schedule="linear", guidance_progress="after", guidance_scale=3.0).plan(
        [8], 4
    )
    assert [step.guidance_scale for step in after] == pytest.approx([1.5, 2.0, 2.5, 3.0])
    within = MaskedTokenScheduler(guidance_schedule="linear", guidance_scale=3.0).plan([8], 3)
    assert [step.guidance_scale for step in within] == pytest.approx([1.0, 2.0, 3.0])
    given = MaskedTokenScheduler().plan([8], 2, guidance_schedule=[1.0, 4.0])
    assert [step.guidance_scale for step in given] == [1.0, 4.0]


def test_softmax_temperature_of_titok():
    plan = MaskedTokenScheduler.from_preset("titok-b64").plan([64])
    expected = [0.5 + 0.8 * (1 - (t + 1) / 8) for t in range(8)]
    assert [step.softmax_temperature for step in plan] == pytest.approx(expected)


def test_first_step_leaves_the_earlier_ones_out():
    scheduler = MaskedTokenScheduler()
    plan = scheduler.plan([10, 6], 6, first_step=2)
    assert [step.index for step in plan] == [2, 3, 4, 5]
    assert plan[0].num_masked == (10, 6)
    assert plan[1].num_masked == plan[0].num_remasked == (7, 4)


def test_ratio_of_the_masked_or_of_all_tokens():
    """MaskGIT shares out what was masked; Show-o keeps more of it masked at first."""
    arguments = {"num_masked": [6], "num_inference_steps": 4, "num_tokens": 16}
    plans = [MaskedTokenScheduler("linear", ratio_of=which).plan(**arguments) for which in ("masked", "all")]
    assert [[step.num_masked[0] for step in plan] for plan in plans] == [[6, 4, 3, 1], [6, 5, 4, 3]]


BAD_ARGUMENTS = {
    "ratio": ({"ratio_of": "some"}, "ratio_of is 'some'; choose one of masked, all"),
    "confidence": ({"confidence": "margin"}, "confidence is 'margin'; choose one of log-probability"),
    "annealing": ({"choice_annealing": "up"}, "choice_annealing is 'up'"),
    "guidance": ({"guidance_schedule": "up"}, "guidance_schedule is 'up'"),
    "progress": ({"guidance_progress": "up"}, "guidance_progress is 'up'"),
    "temperature": ({"token_temperature": -1.0}, "token_temperature.*-1"),
    "infinite": ({"choice_temperature": math.inf}, "choice_temperature.*inf"),
    "softmax": ({"softmax_temperatures": (1.0, 0.0)}, "softmax_temperatures"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps.*0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedTokenScheduler(**arguments)


BAD_PLANS = {
    "more steps than tokens": ({"num_masked": [8, 3], "num_inference_steps": 4}, "4 steps are more than the 3 masked"),
    "no steps": ({"num_masked": [8], "num_inference_steps": 0}, "no step 0 of 0"),
    "first step": ({"num_masked": [8], "num_inference_steps": 4, "first_step": 4}, "no step 4 of 4"),
    "temperature": ({"num_masked": [8], "token_temperature": -0.5}, "token_temperature.*-0.5"),
    "guidance list": ({"num_masked": [8], "num_inference_steps": 2, "guidance_schedule": [1.0]}, "1 values.*2 steps"),
    "guidance name": ({"num_masked": [8], "guidance_schedule": "up"}, "'up'"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaskedTokenScheduler().plan(**arguments)


def test_bad_steps():
    scheduler, codes = MaskedTokenScheduler(), torch.full((1, 8), MASK)
    step = scheduler.plan([8], 2)[0]
    positions, noise = masked_positions(codes, MASK, 8), torch.zeros(1, 8, NUM_CODES)
    with pytest.raises(ValueError, match=r"draws 8 tokens of 1 images, but logits have shape \(1, 4, 12\)"):
        scheduler.step(logits(1, 4), codes, positions, step, MASK, noise)
    with pytest.raises(ValueError, match=r"token_noise of shape \(1, 8, 12\), got None"):
        scheduler.step(logits(1, 8), codes, positions, step, MASK)
    with pytest.raises(ValueError, match=r"choice_noise of shape \(1, 8\), got \(1, 7\)"):
        scheduler.step(logits(1, 8), codes, positions, step, MASK, noise, torch.zeros(1, 7))


def test_unknown_preset():
    with pytest.raises(ValueError, match="no preset 'titok-xl'; known are: maskgit"):
        MaskedTokenScheduler.from_preset("titok-xl")
