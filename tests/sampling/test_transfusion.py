"""Sampling from a transformer over text and images: the cache, and each loop against whole passes without one."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import LlamaConfig, LlamaModel

from hfgen.counters import generator
from hfgen.sampling.logits import exponential_draws
from hfgen.sampling.transfusion import (
    denoise,
    extend_images,
    extend_text,
    image_codes,
    read_texts,
    text_tokens,
)
from hfgen.sampling.transfusion_cache import TransfusionCache
from support.instances import build_model

BOS, EOS, BOI, EOI, PAD, IMAGE = 10, 11, 12, 13, 14, 15
PROMPTS = [[BOS, 1, 2, 3, 4, BOI], [BOS, BOI], [BOS, 7, 8, BOI]]
CODES = {
    "image_mode": "discrete",
    "vocab_size": 31,
    "codebook_size": 16,
    "code_offset": 15,
    "image_token_id": None,
    "eoi_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(scope="module")
def model():
    return build_model("TransfusionTransformer")


@pytest.fixture(scope="module")
def discrete_model():
    return build_model("TransfusionTransformer", **CODES)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def read(model, rows):
    return read_texts(model, rows, num_layers=2, pad_token_id=PAD, device="cpu")


def joined(model, rows, room):
    """Prompts with room for what follows them, and the states of their last tokens."""
    cache, states = read(model, rows)
    return TransfusionCache.join([(cache, range(len(rows)))], room), states


def noise(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed))


def test_a_llama_of_transformers_takes_the_cache():
    """In pieces, with the masks that transformers makes from the cache: as without one."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    llama, ids = LlamaModel(config).eval(), torch.arange(14).view(2, 7)
    expected = llama(ids, use_cache=False).last_hidden_state
    cache = TransfusionCache(2, 7, [0, 0])
    pieces = [llama(piece, past_key_values=cache).last_hidden_state for piece in ids.split([3, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)
    assert cache.length == cache.get_seq_length() == 7


def test_cropped_tokens_leave_no_trace(model):
    cache, _ = joined(model, PROMPTS[:1], 6)
    before = cache.length
    extend_text(model, cache, torch.tensor([[5, 6]]))
    cache.crop(before)
    again, _ = joined(model, PROMPTS[:1], 6)
    ids = torch.tensor([[EOI, 1]])
    torch.testing.assert_close(extend_text(model, cache, ids), extend_text(model, again, ids), rtol=0, atol=0)


def test_a_full_cache_says_how_long_it_should_be(model):
    cache, _ = joined(model, PROMPTS[:1], 1)
    with pytest.raises(ValueError, match="places for 7 tokens, but 8 are needed"):
        extend_text(model, cache, torch.tensor([[1, 2]]))


def test_prompts_of_any_length_in_one_batch(model):
    """The states after each prompt, and after an image that follows, are those of the prompt alone."""
    cache, states = joined(model, PROMPTS, 4)
    latents, times = noise(3, 2, 4, 4), torch.full((3,), 500)
    images, _ = extend_images(model, cache, latents, times)
    for row, prompt in enumerate(PROMPTS):
        one, state = joined(model, [prompt], 4)
        torch.testing.assert_close(states[row], state[0], rtol=0, atol=1e-5)
        image, _ = extend_images(model, one, latents[row : row + 1], times[:1])
        torch.testing.assert_close(images[row], image[0], rtol=0, atol=1e-5)


def test_joined_rows_are_those_of_their_caches(model):
    long, _ = read(model, PROMPTS[:1])
    others, _ = read(model, PROMPTS[1:])
    cache = TransfusionCache.join([(long, [0, 0]), (others, [1, 0])], room=1)
    assert cache.padding == (0, 0, 2, 4) and cache.length == 6 and cache.max_length == 7
    states = extend_text(model, cache, torch.full((4, 1), 5))
    for row, prompt in zip(states, (PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[1])):
        alone = extend_text(model, joined(model, [prompt], 1)[0], torch.tensor([[5]]))[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-5)


def plain_prediction(model, rows, latents, timestep):
    """A whole pass over each prompt and its image."""
    images = []
    for row, one in zip(rows, latents):
        ids = torch.tensor([[*row, *[IMAGE] * 4, EOI]])
        images.append(model(ids, one[None], torch.full((1,), timestep)).sample)
    return torch.cat(images)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("flow", [True, False])
def test_denoising_equals_whole_passes(flow, bidirectional):
    model = build_model("TransfusionTransformer", bidirectional_images=bidirectional)
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler(clip_sample=False)
    rows, null, scale = [PROMPTS[0], PROMPTS[2]], [PROMPTS[1]] * 2, 2.5
    expected = latents = noise(2, 2, 4, 4)
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        conditional = plain_prediction(model, rows, expected, timestep.item())
        unconditional = plain_prediction(model, null, expected, timestep.item())
        guided = unconditional + scale * (conditional - unconditional)
        expected = scheduler.step(guided, timestep, expected, return_dict=False)[0]
    scheduler.set_timesteps(4)
    cache, _ = joined(model, rows + null, 4)
    length = cache.length
    actual = denoise(model, cache, latents, scheduler, guidance_scale=scale, causal=not bidirectional)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert cache.length == length


def test_denoising_runs_the_patches_alone(model, monkeypatch):
    """Four tokens of both halves in every pass, embedded once for both."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    cache, _ = joined(model, [PROMPTS[0], PROMPTS[1]], 4)
    runs, run, embedded, embed = [], model.run, [], model.embed_images
    monkeypatch.setattr(
        model, "run", lambda embeds, *others, **more: runs.append(embeds.shape) or run(embeds, *others, **more)
    )
    monkeypatch.setattr(
        model, "embed_images", lambda latents, times: embedded.append(len(latents)) or embed(latents, times)
    )
    denoise(model, cache, noise(1, 2, 4, 4), scheduler, guidance_scale=2.0)
    assert runs == [(2, 4, 32)] * 3 and embedded == [1] * 3


def test_text_equals_whole_passes(model):
    """The likeliest tokens after an image; one row by itself and two rows of prompts with another length."""
    blocked = torch.zeros(16, dtype=torch.bool)
    blocked[[BOS, PAD, IMAGE, EOI, BOI]] = True
    cache, _ = joined(model, [PROMPTS[0], PROMPTS[2]], 16)
    image = noise(2, 2, 4, 4)
    extend_images(model, cache, image, torch.zeros(2, dtype=torch.long))
    states = extend_text(model, cache, torch.full((2, 1), EOI))[:, -1]
    stream = text_tokens(model, cache, states, blocked, temperature=0)
    actual = torch.stack([next(stream) for _ in range(8)], dim=1)
    for row, prompt in enumerate((PROMPTS[0], PROMPTS[2])):
        ids = [*prompt, *[IMAGE] * 4, EOI]
        for _ in range(8):
            logits = model(torch.tensor([ids]), image[row : row + 1], torch.zeros(1)).logits[0, -1]
            ids.append(int(logits.masked_fill(blocked, -torch.inf).argmax()))
        assert actual[row].tolist() == ids[-8:]


def test_draws_of_text(model):
    """Blocked tokens never come, top-k 1 is the likeliest, a generator per row makes rows independent."""
    blocked = torch.ones(16, dtype=torch.bool)
    blocked[[3, 5, 6]] = False

    def drawn(rows, seeds, **settings):
        cache, states = joined(model, rows, 12)
        draws = [generator(seed) for seed in seeds]
        stream = text_tokens(
            model, cache, states, blocked, draws=lambda shape: exponential_draws(shape, draws, "cpu"), **settings
        )
        return torch.stack([next(stream) for _ in range(12)], dim=1)

    together = drawn(PROMPTS, [0, 1, 2])
    assert set(together.flatten().tolist()) == {3, 5, 6}
    assert torch.equal(drawn(PROMPTS[1:2], [1])[0], together[1])
    assert torch.equal(drawn(PROMPTS, [0, 1, 2], top_k=1), drawn(PROMPTS, [3, 4, 5], temperature=0))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_codes_equal_whole_passes(discrete_model, scale):
    model, num_codes, null = discrete_model, 6, PROMPTS[1]
    rows = [PROMPTS[0], PROMPTS[2]]
    cache, states = joined(model, rows + [null] * 2 if scale != 1 else rows, num_codes)
    stored, first = exponential_draws((num_codes, 2, 16), generator(0), "cpu"), iter(range(num_codes))
    codes = image_codes(
        model, cache, states, num_codes=num_codes, code_offset=15, codebook_size=16, guidance_scale=scale,
        draws=lambda shape: stored[next(first)],
    )  # fmt: skip
    actual = torch.stack(list(codes), dim=1)
    for row, prompt in enumerate(rows):
        drawn = []
        for i in range(num_codes):
            ids = [code + 15 for code in drawn]
            logits = model(torch.tensor([prompt + ids])).logits[0, -1, 15:]
            if scale != 1:
                unconditional = model(torch.tensor([null + ids])).logits[0, -1, 15:]
                logits = unconditional + scale * (logits - unconditional)
            drawn.append(int((logits.softmax(-1) / stored[i, row]).argmax()))
        assert actual[row].tolist() == drawn
    assert cache.length == 6 + num_codes - 1, "the last code need not run"
