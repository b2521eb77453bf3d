"""The network of Transfusion: who attends whom, packing, padding, caches, both kinds of images, bad input."""

import pytest
import torch
from transformers import DynamicCache

from hfgen import TransfusionTransformer
from hfgen.counters import generator
from hfgen.models.layers.sequence_mask import image_runs, segment_positions

# Billions of parameters as published, and those that a U-Net adds at every size.
PUBLISHED_SIZES = {"0.16B": 0.16, "0.37B": 0.37, "0.76B": 0.76, "1.4B": 1.4, "7B": 7.0}
UNET_SIZE = 0.27

BOS, EOS, BOI, EOI, PAD, IMAGE = range(10, 16)  # 0..9 are text
CODES = 16  # first code of discrete images
SLOTS = [IMAGE] * 4
TWO_IMAGES = [BOS, 1, 2, BOI, *SLOTS, EOI, 3, BOI, *SLOTS, EOI, 4, EOS]
UNET = {"image_adapter": "unet", "adapter_channels": (8, 12)}
DISCRETE = {"image_mode": "discrete", "vocab_size": 24, "codebook_size": 8, "code_offset": CODES}
DISCRETE |= {"image_token_id": None, "eoi_token_id": None}
VARIANTS = {
    "linear": {},
    "modalities": {"has_modality_embedding": True},
    "unet": UNET,
    "causal": {"bidirectional_images": False},
    "discrete": DISCRETE,
}


def tiny(**arguments):
    """Weights large enough that every part matters."""
    sizes = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "context_length": 64,
        "latent_channels": 2,
        "time_frequency_dim": 16,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "boi_token_id": BOI,
        "eoi_token_id": EOI,
        "pad_token_id": PAD,
        "image_token_id": IMAGE,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TransfusionTransformer(**{**sizes, **arguments}).eval()
    draws = generator(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return model


def latents(count, size=(4, 4)):
    return torch.randn(count, 2, *size, generator=generator(5))


def times(count):
    return torch.linspace(900, 300, count)


def batch(model, rows):
    """The arguments of ``forward`` for sequences of equal length; a discrete model gets codes in the slots."""
    ids = torch.tensor(rows)
    if model.is_discrete:
        codes = torch.randint(8, ids.shape, generator=generator(3)) + CODES
        return {"input_ids": torch.where(ids == IMAGE, codes, torch.where(ids == EOI, 9, ids))}
    count = int(image_runs(ids == IMAGE).max())
    return {"input_ids": ids, "latents": latents(count), "timesteps": times(count)}


def dependencies(model, inputs):
    """(B, L, L) boolean: whether the last hidden state at i changes with the input of the trunk at j."""
    kept = {}

    def make_leaf(_, args):
        kept["embeds"] = args[0].detach().requires_grad_()
        return (kept["embeds"], *args[1:])

    hooks = [
        model.model.layers[0].register_forward_pre_hook(make_leaf),
        model.model.norm.register_forward_hook(lambda _, args, out: kept.update(hidden=out)),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    rows = []
    for position in range(inputs["input_ids"].shape[1]):
        (gradient,) = torch.autograd.grad(kept["hidden"][:, position].sum(), kept["embeds"], retain_graph=True)
        rows.append(gradient.abs().sum(dim=-1) > 0)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_presets_have_the_published_size(name):
    def billions(preset):
        with torch.device("meta"):
            return (
                sum(parameter.numel() for parameter in TransfusionTransformer.from_preset(preset).parameters()) / 1e9
            )

    assert billions(name) == pytest.approx(PUBLISHED_SIZES[name], rel=0.05)
    assert billions(f"{name}-unet") - billions(name) == pytest.approx(UNET_SIZE, abs=0.02)


@pytest.mark.parametrize("variant", ["linear", "unet"])
def test_text_sees_the_past_and_an_image_sees_itself(variant):
    model = tiny(**VARIANTS[variant])
    ids = torch.tensor(TWO_IMAGES)
    seen = dependencies(model, batch(model, [TWO_IMAGES]))[0]
    for i in range(len(ids)):
        first, last = (4, 7) if 4 <= i <= 7 else (11, 14) if 11 <= i <= 14 else (i, i)
        assert seen[i].nonzero().flatten().tolist() == list(range(last + 1)), f"position {i}, id {ids[i]}"
        assert seen[i, first : last + 1].all()


@pytest.mark.parametrize("variant", ["causal", "discrete"])
def test_causal_images_see_the_past_only(variant):
    model = tiny(**VARIANTS[variant])
    seen = dependencies(model, batch(model, [TWO_IMAGES]))[0]
    assert torch.equal(seen, torch.ones_like(seen).tril())


@pytest.mark.parametrize("variant", ["linear", "discrete"])
def test_nothing_sees_padding(variant):
    model = tiny(**VARIANTS[variant])
    row = [PAD, BOS, 1, BOI, *SLOTS, EOI, PAD, 3, EOS, PAD, PAD]
    seen = dependencies(model, batch(model, [row]))[0]
    for j in (0, 9, 12, 13):
        assert seen[:, j].nonzero().flatten().tolist() == [j]
    assert seen[11, 10] and seen[11, 1] and not seen[9, 10]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_changes_nothing(variant):
    model = tiny(**VARIANTS[variant])
    alone = batch(model, [TWO_IMAGES])
    expected = model(**alone)
    length = len(TWO_IMAGES)
    for left, right in ((0, 3), (2, 1)):
        ids = torch.nn.functional.pad(alone["input_ids"], (left, right), value=PAD)
        positions = (torch.arange(ids.shape[1])[None] - left).clamp(min=0)
        padded = model(**alone | {"input_ids": ids, "position_ids": positions})
        torch.testing.assert_close(padded.logits[:, left : left + length], expected.logits, rtol=0, atol=1e-5)
        if expected.sample is not None:
            torch.testing.assert_close(padded.sample, expected.sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_packed_sequences_are_those_of_their_own(variant):
    model = tiny(**VARIANTS[variant])
    rows = [[BOS, 1, BOI, *SLOTS, EOI, EOS], [BOS, 2, 3, 4, EOS], [BOS, BOI, *SLOTS, EOI, 5, 6, EOS]]
    alone = [batch(model, [row]) for row in rows]
    packed = {
        "input_ids": torch.cat([each["input_ids"] for each in alone], dim=1),
        "segment_ids": torch.cat([torch.full((len(row),), index + 3) for index, row in enumerate(rows)])[None],
    }
    if not model.is_discrete:
        packed |= {"latents": latents(2), "timesteps": times(2)}
        alone[0] |= {"latents": latents(2)[:1], "timesteps": times(2)[:1]}
        alone[1] |= {"latents": None, "timesteps": None}
        alone[2] |= {"latents": latents(2)[1:], "timesteps": times(2)[1:]}
    output, apart = model(**packed), [model(**each) for each in alone]
    torch.testing.assert_close(output.logits, torch.cat([each.logits for each in apart], dim=1), rtol=0, atol=1e-5)
    if not model.is_discrete:
        samples = torch.cat([apart[0].sample, apart[2].sample])
        torch.testing.assert_close(output.sample, samples, rtol=0, atol=1e-5)
    whole = model(**{key: value for key, value in packed.items() if key != "segment_ids"})
    assert not torch.allclose(whole.logits, output.logits, atol=1e-3)


def test_an_image_ends_with_its_segment():
    is_image = torch.tensor([[True, True, True, True]])
    assert image_runs(is_image).tolist() == [[1, 1, 1, 1]]
    assert image_runs(is_image, torch.tensor([[0, 0, 1, 1]])).tolist() == [[1, 1, 2, 2]]
    assert segment_positions(torch.tensor([[7, 7, 2, 2, 2], [0, 1, 1, 0, 0]])).tolist() == [
        [0, 1, 0, 1, 2],
        [0, 0, 1, 0, 1],
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_are_independent(variant):
    model = tiny(**VARIANTS[variant])
    other = [BOS, BOI, *SLOTS, EOI, 1, 2, 3, 4, 5, 6, 7, EOS, PAD, PAD, PAD]
    both = batch(model, [TWO_IMAGES, other])
    output = model(**both)
    for row, images in ((0, slice(0, 2)), (1, slice(2, 3))):
        inputs = {"input_ids": both["input_ids"][row : row + 1]}
        if not model.is_discrete:
            inputs |= {"latents": both["latents"][images], "timesteps": both["timesteps"][images]}
        alone = model(**inputs)
        torch.testing.assert_close(alone.logits, output.logits[row : row + 1], rtol=0, atol=1e-5)
        if not model.is_discrete:
            torch.testing.assert_close(alone.sample, output.sample[images], rtol=0, atol=1e-5)


@torch.no_grad()
def test_cached_text_equals_uncached():
    for variant in ("linear", "discrete"):
        model = tiny(**VARIANTS[variant])
        ids = batch(model, [TWO_IMAGES])["input_ids"] if variant == "discrete" else torch.tensor([[BOS, *range(9)]])
        expected, cache = model(ids).logits, DynamicCache()
        embeds = model.embed_text(ids)
        parts = []
        for start, end in ((0, 3), (3, 4), (4, 8), (8, ids.shape[1])):  # also several after others
            hidden = model.run(embeds[:, start:end], torch.arange(start, end)[None], cache)
            parts.append(model.text_logits(hidden))
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["linear", "modalities", "unet"])
@torch.no_grad()
def test_cached_images_equal_uncached(variant):
    model = tiny(**VARIANTS[variant])
    prefix, suffix = [BOS, 1, 2, BOI], [EOI, 3, EOS]
    inputs = batch(model, [[*prefix, *SLOTS, *suffix]])
    expected, cache = model(**inputs), DynamicCache()
    model.run(model.embed_text(torch.tensor([prefix])), torch.arange(4)[None], cache)
    embedded = model.embed_images(inputs["latents"], inputs["timesteps"])
    hidden = model.run(embedded.hidden_states, torch.arange(4, 8)[None], cache, causal=False)
    torch.testing.assert_close(model.read_images(hidden, embedded), expected.sample, rtol=0, atol=1e-5)
    after = model.run(model.embed_text(torch.tensor([suffix])), torch.arange(8, 11)[None], cache)
    torch.testing.assert_close(model.text_logits(after), expected.logits[:, 8:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["linear", "unet"])
@torch.no_grad()
def test_repeated_images_are_read_as_the_same(variant):
    model = tiny(**VARIANTS[variant])
    embedded = model.embed_images(latents(2, (4, 8)), times(2))
    assert embedded.grid == (2, 4) and embedded.hidden_states.shape == (2, 8, 32)
    hidden = torch.randn(4, 8, 32, generator=generator(9))
    whole = model.read_images(hidden, embedded.repeat(2))
    assert whole.shape == (4, 2, 4, 8)
    torch.testing.assert_close(whole[2:], model.read_images(hidden[2:], embedded), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_unet_reads_time_and_the_first_half():
    model = tiny(**UNET)
    hidden = torch.randn(1, 4, 32, generator=generator(9))
    base = model.embed_images(latents(1), times(1))
    later, other = model.embed_images(latents(1), times(1) / 2), model.embed_images(latents(1) + 1, times(1))
    for changed in (later, other):
        assert not torch.allclose(base.hidden_states, changed.hidden_states, atol=1e-3)
        assert not torch.allclose(model.read_images(hidden, base), model.read_images(hidden, changed), atol=1e-3)


@pytest.mark.parametrize(("variant", "part"), [("discrete", "time_embedding"), ("discrete", "modality_embedding")])
@torch.no_grad()
def test_embeddings_of_time_and_modality_matter(variant, part):
    model = tiny(**VARIANTS[variant])
    inputs = batch(model, [TWO_IMAGES])
    before = model(**inputs).logits
    for parameter in getattr(model, part).parameters():
        parameter.zero_()
    assert not torch.allclose(model(**inputs).logits, before, atol=1e-3)


@torch.no_grad()
def test_discrete_images_have_their_own_timesteps():
    model = tiny(**DISCRETE, fixed_timestep=40)
    inputs = batch(model, [TWO_IMAGES])
    fixed = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, timesteps=torch.tensor([40, 40])).logits, fixed, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(3,\), but the codes in input_ids are 2 images"):
        model(**inputs, timesteps=torch.tensor([1, 2, 3]))
    changed = model(**inputs, timesteps=torch.tensor([40, 700])).logits
    torch.testing.assert_close(changed[:, :11], fixed[:, :11], rtol=0, atol=1e-5)
    assert ((changed - fixed)[:, 11:].abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant):
    model = tiny(**VARIANTS[variant]).train()

    def gradients():
        model.zero_grad()
        output = model(**batch(model, [TWO_IMAGES]))
        sum(part.square().mean() for part in output.to_tuple()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients()
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in expected.values())
    model.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["linear", "unet", "modalities"])
def test_a_batch_without_images_has_zero_gradients_for_theirs(variant):
    model = tiny(**VARIANTS[variant])
    ids = torch.tensor([[BOS, 1, 2, EOS]])
    output = model(ids, latents(0), times(0))
    assert output.sample.shape == (0, 2, 4, 4) and torch.equal(output.logits, model(ids).logits)
    (output.logits.sum() + output.sample.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name.startswith("image_"):
            assert not parameter.grad.any(), name


@pytest.mark.parametrize("variant", ["linear", "unet", "discrete"])
@torch.no_grad()
def test_autocast(variant):
    model = tiny(**VARIANTS[variant])
    inputs = batch(model, [TWO_IMAGES])
    exact = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**inputs)
    for one, other in zip(rounded.to_tuple(), exact.to_tuple()):
        assert (one.float() - other).abs().max() < 0.1 * other.abs().max()


@torch.no_grad()
def test_positions_stay_exact_in_bfloat16():
    model = tiny(context_length=8192)
    exact = model.model.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)
    cos, _ = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.tensor([[8000]]))
    torch.testing.assert_close(cos[0, 0, :4], (8000 * exact).cos())


def test_saved_models_keep_their_mode(tmp_path):
    for variant in ("unet", "discrete"):
        model = tiny(**VARIANTS[variant])
        model.save_pretrained(tmp_path / variant)
        loaded = TransfusionTransformer.from_pretrained(tmp_path / variant)
        inputs = batch(model, [TWO_IMAGES])
        with torch.no_grad():
            for one, other in zip(loaded(**inputs).to_tuple(), model(**inputs).to_tuple()):
                assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_mode": "pixels"}, "image_mode 'pixels'; choose one of continuous, discrete"),
        ({"image_adapter": "conv"}, "image_adapter 'conv'; choose one of linear, unet"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"pad_token_id": BOS}, "special ids must differ"),
        ({"pad_token_id": 16}, r"lie in \[0, 15\]"),
        ({"image_token_id": None}, "need image_token_id"),
        ({"codebook_size": 4}, "leave them out"),
        ({"image_adapter": "unet", "adapter_channels": (8, 8, 8)}, "3 levels does not make patches of patch_size=2"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'; choose one of default"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"latent_channels": 0}, "latent_channels must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"context_length": 0}, "context_length must be at least 1"),
        ({"num_attention_heads": 32}, "must be an even multiple of num_attention_heads=32"),
        ({"num_text_tokens": 17}, "num_text_tokens must be between 1 and vocab_size=16, got 17"),
        ({**DISCRETE, "codebook_size": -3}, "got codebook_size=-3"),
        ({**DISCRETE, "code_offset": None}, "need codebook_size and code_offset"),
        ({**DISCRETE, "code_offset": 17}, "all codes below vocab_size=24"),
        ({**DISCRETE, "code_offset": 14}, r"lie among the codes \[14, 21\].*'pad_token_id': 14"),
    ],
)
def test_impossible_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.tensor([[BOS, 1, 99]])}, r"\[1, 99\], expected \[0, 15\]; does the text tokenizer"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens, but the context of the model is 64"),
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"shape \(3,\)"),
        ({"position_ids": torch.arange(3)}, r"position_ids have shape \(3,\)"),
        ({"latents": None, "timesteps": None}, r"hold 2 images .* but latents hold 0"),
        ({"latents": latents(3), "timesteps": times(3)}, "hold 2 images .* but latents hold 3"),
        ({"latents": latents(2, (4, 8))}, "Image 0 has 4 slots in input_ids, but 8 tokens"),
        ({"latents": latents(2, (4, 5))}, "size 4x5, which patches of 2x2 do not divide; .* multiples of 2"),
        ({"latents": latents(2)[:, :1]}, r"shape \(2, 1, 4, 4\), expected \(images, 2, H, W\)"),
        ({"timesteps": times(1)}, r"each of the 2 images, got shape \(1,\)"),
        ({"timesteps": None}, "each of the 2 images, got none"),
        ({"input_ids": torch.tensor([[BOS, BOI, *SLOTS, *SLOTS, EOI]])}, "hold 1 images .* but latents hold 2"),
        ({"input_ids": torch.tensor([[BOS, 1, *SLOTS, EOI, BOI, *SLOTS, 3]])}, "boi_token_id=12 .* 2 of these"),
        ({"input_ids": torch.tensor([[*SLOTS, EOI, BOI, *SLOTS, EOI]])}, "1 of these markers are missing"),
        ({"input_ids": torch.tensor([[BOI, 1, BOI, *SLOTS, EOI, BOI, *SLOTS, EOI]])}, "1 are not beside an image"),
        ({"input_ids": torch.tensor([[BOI, *SLOTS, EOI, BOI, *SLOTS, EOI, 1, EOI]])}, "1 are not beside an image"),
        ({"position_ids": torch.arange(50, 50 + len(TWO_IMAGES))[None]}, "tokens, but the context of the model is 64"),
    ],
)
def test_bad_inputs(changes, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model(**batch(model, [TWO_IMAGES]) | changes)


def test_segments_are_checked_each_for_itself():
    model, image = tiny(), [BOI, *SLOTS, EOI]
    ids = torch.tensor([[BOS, 1, BOI, *SLOTS, EOI, 1]])
    segments = torch.tensor([[1, 1, 1, *[2] * (len(SLOTS) + 2)]])
    with pytest.raises(ValueError, match="1 of these markers are missing"):  # the marker is in the segment before
        model(ids, latents(1), times(1), segment_ids=segments)
    rows = torch.tensor([[*image, 1, 1] * 12])
    model(rows, latents(12), times(12), segment_ids=torch.arange(12).repeat_interleave(len(image) + 2)[None])
    with pytest.raises(ValueError, match="context of the model is 64"):
        model(rows, latents(12), times(12), segment_ids=torch.ones_like(rows))


def test_a_sequence_may_end_where_an_image_is_drawn():
    """After the marker that begins it, in a row and in a segment, and with padding behind."""
    model, start = tiny(), [BOS, 1, BOI]
    no_images = {"latents": latents(2)[:0], "timesteps": times(2)[:0]}
    assert model(torch.tensor([start]), **no_images).logits.isfinite().all()
    assert model(torch.tensor([[*start, PAD, PAD]]), **no_images).logits.isfinite().all()
    model(torch.tensor([start + start]), **no_images, segment_ids=torch.tensor([[1, 1, 1, 2, 2, 2]]))


def test_a_discrete_model_takes_no_latents():
    with pytest.raises(ValueError, match="codes in input_ids; leave the latents out"):
        tiny(**DISCRETE)(torch.tensor([[BOS, 1]]), latents(1), times(1))
