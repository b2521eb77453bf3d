"""The open implementation of Transfusion: masks, cache and sampling; its numbers are in the parity test."""

import pytest
import torch

from hfgen import TransfusionFlowTransformer
from hfgen.counters import generator
from hfgen.models.layers.mixed_sequence import PADDING_ID, MixedVocabulary, mixed_layout
from hfgen.sampling.mixed_parts import assemble, stack_sequences
from hfgen.sampling.ode import solve_ode
from hfgen.sampling.transfusion_flow import generate, generate_images
from support.instances import build_model

NAME = "TransfusionFlowTransformer"
GRID = (2, 2)
PROMPT = torch.tensor([3, 1, 4])
STEPS = 2
# Images with learned positions and sounds without.
TWO = {
    "latent_channels": (3, 5),
    "num_axes": (2, 1),
    "channel_first": (True, False),
    "has_positions": (True, False),
    "num_layers": 3,
}


@pytest.fixture(scope="module")
def model():
    return build_model(NAME)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def test_text_sees_the_past_and_images_all_of_themselves(model):
    ids, images = assemble(model, [PROMPT, noise(3, *GRID), PROMPT], end=True)
    layout = model.layout(ids[None])
    embedded = []
    hook = model.blocks[0].register_forward_pre_hook(
        lambda _, args: (
            embedded.append(args[0].detach().requires_grad_()) or (embedded[0], *args[1:2], (embedded[0],), *args[3:])
        )
    )
    states = []
    final = model.norm_out.register_forward_hook(lambda _, args, out: states.append(out))
    model(ids[None], images, torch.tensor([500.0]))
    hook.remove(), final.remove()
    sees = torch.stack(
        [
            torch.autograd.grad(state.sum(), embedded[0], retain_graph=True)[0][0].abs().sum(-1) > 0
            for state in states[0][0]
        ]
    )
    index = torch.arange(len(ids))
    image = layout.runs[0] > 0
    expected = (index[:, None] >= index) | (image[:, None] & image)
    assert torch.equal(sees, expected)
    assert image.sum() == 4


def test_places_of_an_image_share_a_position(model):
    ids, _ = assemble(model, [PROMPT, noise(3, *GRID), PROMPT])
    first, last = (ids < 0).nonzero().flatten()[[0, -1]].tolist()
    positions = model.layout(ids[None]).positions[0].tolist()
    assert positions[: first + 1] == list(range(first + 1))
    assert positions[first : last + 1] == [first] * 4
    assert positions[last + 1 :] == list(range(first + 1, first + 1 + len(ids) - last - 1))


def test_padding_on_either_side_changes_nothing(model):
    short, images = assemble(model, [PROMPT, noise(3, *GRID)])
    long, others = assemble(model, [PROMPT, PROMPT, PROMPT, noise(3, *GRID, seed=1), PROMPT])
    times = torch.tensor([800.0, 100.0])
    with torch.no_grad():
        alone = model(short[None], images, times[:1])
        for left in (False, True):
            together = model(stack_sequences([short, long], left=left), images + others, times)
            logits = together.logits[0, -len(short) :] if left else together.logits[0, : len(short)]
            torch.testing.assert_close(logits, alone.logits[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(together.sample[0], alone.sample[0], rtol=0, atol=1e-5)


def test_images_of_several_modalities_and_sizes():
    model = build_model(NAME, **TWO)
    sound = noise(3, 5)
    ids, images = assemble(model, [PROMPT, noise(3, 1, 4), (1, sound), noise(3, 2, 3), PROMPT])
    with torch.no_grad():
        sample = model(ids[None], images, torch.tensor([100.0, 900.0, 500.0])).sample
    assert [tuple(one.shape) for one in sample] == [(3, 1, 4), (3, 5), (3, 2, 3)]
    layout = model.layout(ids[None])
    assert layout.modalities == [0, 1, 0] and layout.lengths == [4, 3, 6]


def test_cached_equals_uncached(model):
    """Pieces of any length, images as wholes."""
    ids, images = assemble(model, [PROMPT, noise(3, *GRID), PROMPT, noise(3, 1, 3, seed=1), PROMPT])
    times = torch.tensor([0.0, 700.0])
    at = [0, 2, *(index for index in range(1, len(ids)) if (ids[index] < 0) != (ids[index - 1] < 0)), len(ids)]
    cache, logits, sample = model.new_cache(1, len(ids)), [], []
    with torch.no_grad():
        expected = model(ids[None], images, times)
        for begin, end in zip(at, at[1:]):
            layout = model.layout(ids[None, begin:end], cache)
            given = (None, None)
            if layout.lengths:
                given = ([images[len(sample)]], times[len(sample)][None])
                model.extend(layout, cache, [noise(*given[0][0].shape, seed=9)], torch.tensor([1.0]))  # not kept
            output = model.extend(layout, cache, *given)
            cache.keep(layout)
            logits.append(output.logits)
            sample += output.sample or []
    torch.testing.assert_close(torch.cat(logits, 1), expected.logits, rtol=0, atol=1e-5)
    for one, other in zip(sample, expected.sample, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def plain_image(model, parts, start, scale):
    """The whole sequence at every evaluation, with guidance as two passes."""
    ids, images = assemble(model, parts)
    vocabulary = model.vocabulary
    ids = torch.cat([ids, torch.tensor(vocabulary.opening(0, GRID) + model.slots(0, GRID))])
    without = torch.where(ids >= 0, vocabulary.null_id, ids)

    def velocity(latents, sigma):
        times = torch.tensor([0.0] * len(images) + [1000 * sigma])
        with torch.no_grad():
            one, other = (model(row[None], [*images, latents], times).sample[-1] for row in (ids, without))
        return other + scale * (one - other)

    return solve_ode(velocity, start.T.unflatten(1, GRID), [1 - step / STEPS for step in range(STEPS + 1)], "midpoint")


def test_images_equal_the_plain_way_one_by_one(model):
    """Prompts of different lengths, one with an image, in one batch that runs its context once."""
    prompts = [[], [PROMPT], [PROMPT, noise(3, 1, 2, seed=5), PROMPT]]
    start, seen = noise(3, 4, 3, seed=3), []
    images, nfe = generate_images(
        model,
        prompts,
        GRID,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        noise=start,
        callback=lambda step, latents: seen.append(step),
    )
    assert nfe == 1 + 2 * STEPS and seen == [1, 2]
    for parts, one, image in zip(prompts, start, images, strict=True):
        torch.testing.assert_close(image, plain_image(model, parts, one, 3.0), rtol=0, atol=1e-5)


def test_each_generator_makes_its_own_image(model):
    prompts = [[PROMPT], []]
    together, _ = generate_images(
        model, prompts, GRID, num_inference_steps=STEPS, generator=[generator(1), generator(2)]
    )
    alone, _ = generate_images(model, prompts[1:], GRID, num_inference_steps=STEPS, generator=[generator(2)])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-5)


def test_text_after_an_image_is_conditioned_on_the_finished_image(model):
    result = generate(model, [PROMPT], image=(0, GRID), max_length=20, num_inference_steps=STEPS, temperature=0.0)
    text, (modality, image), after, *_ = result.parts
    assert text.tolist() == [10, 3, 1, 4, *model.vocabulary.opening(0, GRID)] and modality == 0
    ids, _ = assemble(model, [text[1:4], image, after[1:]])
    with torch.no_grad():
        logits = model(ids[None], [image], torch.zeros(1)).logits[0]
    drawn = after[1:]
    vocabulary = model.vocabulary
    logits[:, [vocabulary.bos_id, vocabulary.null_id, vocabulary.eom_id(0)]] = -torch.inf
    assert len(drawn) > 0 and torch.equal(logits[-len(drawn) - 1 : -1].argmax(-1), drawn)
    assert result.nfe == 1 + 1 + 2 * STEPS + 1 + len(drawn)


def test_rules_of_the_text(model):
    """No id that only rules append; the same draws give the same text; the length is kept."""
    vocabulary, seen = model.vocabulary, []
    arguments = {"max_length": 12, "num_inference_steps": 1, "top_k": 0, "min_p": 0.0, "temperature": 5.0}
    for seed in range(4):
        result = generate(model, [], generator=generator(seed), on_token=seen.append, **arguments)
        again = generate(model, [], generator=generator(seed), **arguments)
        assert [str(part) for part in result.parts] == [str(part) for part in again.parts]
        lengths = [len(part) if isinstance(part, torch.Tensor) else part[1][0].numel() for part in result.parts]
        assert sum(lengths) <= 1 + 12
    assert len(set(seen)) > 5
    assert not {vocabulary.bos_id, vocabulary.null_id, vocabulary.eom_id(0)} & set(seen)


@pytest.mark.parametrize(
    ("text", "grid"), [("2,3", (2, 3)), ("16", (16,)), ("", None), ("2,", None), ("0,3", None), ("x", None)]
)
def test_grids_are_read_from_the_text(text, grid):
    vocabulary = MixedVocabulary(num_text_tokens=10, num_modalities=2)
    characters = [vocabulary.meta_id + 1 + ord(character) for character in text]
    assert vocabulary.read_grid([10, 3, vocabulary.meta_id, *characters, vocabulary.som_id(1)]) == grid
    assert vocabulary.read_grid([10, 3, vocabulary.som_id(1)]) is None


def test_ids_of_the_vocabulary_are_distinct():
    vocabulary = MixedVocabulary(num_text_tokens=10, num_modalities=2)
    ids = [vocabulary.bos_id, vocabulary.eos_id, vocabulary.null_id]
    ids += [vocabulary.som_id(0), vocabulary.som_id(1), vocabulary.eom_id(0), vocabulary.eom_id(1), vocabulary.meta_id]
    assert ids == list(range(10, 18)) and vocabulary.size == 18 + 128


IDS = [10, 3, 15, 66, 60, 66, 13, -2, -2, -2, -2, 14]


@pytest.mark.parametrize(
    ("ids", "latents", "times", "message"),
    [
        (IDS, None, None, "slots for 1 images, but 0 are given"),
        (IDS[:4], noise(1, 3, 2, 2), [5.0], "slots for 0 images, but 1 are given"),
        (IDS, noise(1, 3, 2, 3), [5.0], "grid of 2x3 = 6 places, but 4 slots"),
        (IDS, noise(1, 4, 2, 2), [5.0], r"shape \(4, 2, 2\), expected 2 axes and 3 channels, channels first"),
        (IDS, noise(1, 3, 2, 2), None, "timesteps are missing"),
        (IDS, noise(1, 3, 2, 2), [5.0, 6.0], r"timesteps are of shape \(2,\)"),
        ([10, 500], None, None, r"lie in \[10, 500\]; expected ids below 144"),
        ([-3, 10], None, None, r"lie in \[-3, 10\].*down to -2"),
    ],
)
def test_refused_inputs(model, ids, latents, times, message):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([ids]), latents, None if times is None else torch.tensor(times))


def test_refused_prompts_and_samples(model):
    with pytest.raises(ValueError, match=r"A part of the sequence is torch.int64 of shape \(1, 3\)"):
        assemble(model, [PROMPT[None]])
    with pytest.raises(ValueError, match="There is no modality 1; there are 1"):
        assemble(model, [(1, noise(3, 2, 2))])
    with pytest.raises(ValueError, match="prompts is empty"):
        generate_images(model, [], GRID)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 3\), expected at least \(1, 4, 3\)"):
        generate_images(model, [[]], GRID, noise=noise(1, 3, 3))
    with pytest.raises(ValueError, match="needs 5 places after its opening; max_length=7 leaves 2"):
        generate(model, [], image=(0, GRID), max_length=7)
    with pytest.raises(ValueError, match=r"shape \(1, 0\)"):
        mixed_layout(torch.zeros(1, 0, dtype=torch.long), model.vocabulary)


def test_refused_configurations():
    with pytest.raises(ValueError, match="one value for each modality"):
        TransfusionFlowTransformer(latent_channels=(4, 4))
    with pytest.raises(ValueError, match="head_dim=7 and width=16 must be even"):
        TransfusionFlowTransformer(head_dim=7, width=16)


def test_padding_is_no_slot():
    assert stack_sequences([PROMPT, PROMPT[:1]]).tolist() == [[3, 1, 4], [3, PADDING_ID, PADDING_ID]]
    assert stack_sequences([PROMPT, PROMPT[:1]], left=True)[1].tolist() == [PADDING_ID, PADDING_ID, 3]
