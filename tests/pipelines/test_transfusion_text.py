"""Vocabularies, texts and their streaming in TransfusionPipeline, and calls that are easy to get wrong."""

import logging

import PIL.Image
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from transformers import AddedToken

from hfgen import TransfusionPipeline
from hfgen.counters import generator
from hfgen.pipelines.transfusion_text import GrowingText, TransfusionVocabulary
from support.instances import PIPELINES, build_model
from support.text_encoders import CAPTIONS, tokenizer

CHANGES = PIPELINES["TransfusionPipeline"].changes["transformer"]
MARKERS = ("boi_token_id", "eoi_token_id", "image_token_id", "pad_token_id")


def model(num_ids, **changes):
    """With the markers of images after ``num_ids`` ids of text."""
    markers = {name: num_ids + index for index, name in enumerate(MARKERS)}
    return build_model("TransfusionTransformer", **{**CHANGES, **markers, "vocab_size": num_ids + 4, **changes})


def pipeline(transformer=None, text=None, **parts):
    text = text or tokenizer()
    made = TransfusionPipeline(transformer or model(len(text)), text, **{"image_size": 8, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def picture(side=8, seed=0):
    return torch.rand(1, 3, side, side, generator=generator(seed)) * 2 - 1


def never_ends(transformer, monkeypatch):
    """Its logits of the end of a text are as low as can be."""
    logits_of, eos = transformer.text_logits, transformer.config.eos_token_id

    def without_end(hidden_states):
        logits = logits_of(hidden_states).clone()
        if eos is not None:
            logits[..., eos] = -1e4
        return logits

    monkeypatch.setattr(transformer, "text_logits", without_end)


# -------------------------------------------------------------------------------------------------------- vocabularies


def test_a_tokenizer_whose_ends_are_its_last_ids():
    text = tokenizer()
    text.add_special_tokens({"bos_token": AddedToken("<begin>"), "eos_token": AddedToken("<end>")})
    bos, eos = text.bos_token_id, text.eos_token_id
    assert {bos, eos} == {len(text) - 2, len(text) - 1}
    pipe = pipeline(model(len(text), bos_token_id=bos, eos_token_id=eos), text)
    assert len(pipe.caption(picture(), max_new_tokens=3).texts) == 1
    with pytest.raises(ValueError, match="use the tokenizer that the transformer was trained with"):
        TransfusionVocabulary(model(len(text) - 2), text)


def test_a_padded_vocabulary():
    """Its last rows mean nothing: the transformer says how many ids are text, and none of the others is drawn."""
    text = tokenizer()
    with pytest.raises(ValueError, match="34 tokens, but the transformer has 40 .* num_text_tokens"):
        pipeline(model(40))
    padded = model(40, num_text_tokens=34)
    blocked = TransfusionVocabulary(padded, text).blocked()
    assert blocked[34:40].all() and not blocked[padded.config.boi_token_id] and not blocked[padded.config.eos_token_id]
    assert pipeline(padded).caption(picture(), max_new_tokens=2).nfe
    with pytest.raises(ValueError, match="34 tokens, but the transformer has 33"):
        pipeline(model(40, num_text_tokens=33))


def test_one_id_for_both_ends(monkeypatch):
    text = tokenizer()
    text.bos_token = text.eos_token
    both = text.eos_token_id
    transformer = model(len(text), bos_token_id=both, eos_token_id=both)
    pipe = pipeline(transformer, text)
    assert not pipe.vocabulary.blocked()[both]
    logits_of = transformer.text_logits
    monkeypatch.setattr(
        transformer, "text_logits", lambda states: logits_of(states).index_fill(-1, torch.tensor([both]), 1e4)
    )
    assert pipe.caption(picture()).texts == [""] and pipe.generate("a").nfe == 1


def test_text_is_not_drawn_from_what_is_no_text():
    text, vocabulary = tokenizer(), pipeline().vocabulary
    blocked = vocabulary.blocked()
    assert blocked[[text.unk_token_id, text.pad_token_id, text.bos_token_id]].all() and not blocked[text.eos_token_id]
    assert not blocked[vocabulary.encode(CAPTIONS[0])].any()
    for special in ("<pad>", "<s>", "</s>"):
        with pytest.raises(ValueError, match=f"special token '{special}'"):
            vocabulary.encode(f"a {special} circle")


# -------------------------------------------------------------------------------------------------------- growing text


class Bytes:
    """Decodes UTF-8 bytes, so that a character is up to four tokens."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["a €uro", "no end: €"])
def test_unfinished_characters_wait(text):
    growing, pieces = GrowingText(Bytes()), []
    for token in text.encode():
        growing.add(token, ends=False)
        pieces.append(growing.piece())
    assert "".join(pieces) == text == growing.text
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_is_never_finished_comes_at_the_end():
    growing = GrowingText(Bytes())
    growing.add(ord("a"), ends=False)
    growing.add("€".encode()[0], ends=False)
    assert (growing.piece(), growing.piece(last=True)) == ("", "a\ufffd") and growing.text == "a\ufffd"
    growing.add(7, ends=True)
    growing.add(ord("b"), ends=False)
    assert growing.ended and growing.text == "a\ufffd"


def test_a_continuation_joins_what_it_continues():
    """With the space between two words, and without one inside of a word."""
    vocabulary = pipeline().vocabulary
    ids = vocabulary.encode(CAPTIONS[0])
    for cut in range(len(ids) + 1):
        growing = GrowingText(vocabulary, ids[:cut])
        for token in ids[cut:]:
            growing.add(token, ends=False)
        assert vocabulary.decode(ids[:cut]) + growing.text == CAPTIONS[0]


def test_captions_are_streamed(monkeypatch):
    pipe, pieces = pipeline(), []
    never_ends(pipe.transformer, monkeypatch)
    output = pipe.caption(
        torch.cat([picture(), picture(seed=1)]),
        max_new_tokens=6,
        temperature=1.0,
        generator=[generator(0), generator(1)],
        callback_on_text=lambda pipe, new: pieces.append(new),
    )
    assert len(pieces) == output.nfe == 6
    assert ["".join(column) for column in zip(*pieces)] == output.texts and all(output.texts)


def test_text_without_an_end_goes_on(monkeypatch):
    """A model of codes need not know where texts end."""
    text = tokenizer()
    discrete = {"image_mode": "discrete", "codebook_size": 16, "code_offset": len(text) + 2, "image_token_id": None}
    transformer = model(len(text), eos_token_id=None, vocab_size=len(text) + 18, pad_token_id=0, **discrete)
    quantizer = build_model("NoisyLatentQuantizer", num_codes=16, latent_channels=3, quantizer_type="nearest")
    pipe = pipeline(transformer, text, quantizer=quantizer)
    output = pipe.generate("a", max_new_tokens=5, max_images=0, temperature=0.0)
    assert output.nfe == 5 and len(output.parts) == 1 and output.parts[0]


def test_both_ways_to_write_reach_the_end_of_the_context(monkeypatch):
    """The last token need not run, so one more than the context has room for can be drawn."""
    pipe = pipeline(model(34, context_length=24))
    never_ends(pipe.transformer, monkeypatch)
    caption = pipe.caption(picture(), max_new_tokens=50)  # begin, image with markers: 19
    written = pipe.generate([picture()], max_new_tokens=50, max_images=0, temperature=0.0)
    assert caption.nfe == written.nfe == 24 - 19 + 1
    assert caption.texts == written.parts


# --------------------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("solver", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_solvers_of_flows(solver):
    scheduler = solver(prediction_type="flow_prediction", use_flow_sigmas=True)
    images = pipeline(scheduler=scheduler)("a", num_inference_steps=4, output_type="pt").images
    assert images.isfinite().all()


def test_a_callback_may_return_nothing():
    pipe, steps = pipeline(), []

    def watch(pipe, i, timestep, tensors):
        steps.append(set(tensors))

    kept = {"num_inference_steps": 2, "output_type": "latent", "callback_on_step_end": watch}
    noise = torch.randn(1, 3, 8, 8, generator=generator(0))
    expected = pipe("a", latents=noise, num_inference_steps=2, output_type="latent", generator=generator(1)).images
    assert torch.equal(pipe("a", latents=noise, generator=generator(1), **kept).images, expected)
    pipe.generate("a", begin_with_image=True, max_new_tokens=0, generator=generator(0), **kept)
    assert steps == [{"latents"}] * 4


def test_images_of_another_size_are_warned_of(caplog):
    pipe = pipeline()
    with caplog.at_level(logging.WARNING):
        pipe.caption(picture(), max_new_tokens=1)
        assert not caplog.records
        pipe.caption(picture(side=4), max_new_tokens=1)
    assert "4x4 pixels is read by a transformer that was trained on 8x8" in caplog.text


def pictures(*sides):
    return [PIL.Image.new("RGB", (side, side)) for side in sides]


REFUSED = {
    "class without classes": (lambda pipe: pipe(class_labels=0), "no class_names, so it has no classes"),
    "draws of continuous images": (lambda pipe: pipe("a", top_k=3), "of discrete images"),
    "sizes": (lambda pipe: pipe.caption(pictures(8, 16)), r"one size, got \[\(8, 8\), \(16, 16\)\]"),
    "no images": (lambda pipe: pipe.caption([]), "a list of at least one, .* got an empty list"),
    "no image": (lambda pipe: pipe.caption(None), "got a NoneType"),
    "list of tensors": (lambda pipe: pipe.caption([picture()]), "got a list of Tensor"),
    "array": (lambda pipe: pipe.caption(picture().numpy()), "got a ndarray"),
    "not finite": (lambda pipe: pipe.caption(picture() * torch.nan), "from nan to nan"),
    "two prompts": (lambda pipe: pipe.caption(picture(), ["a", "b"]), "Expected a text, got"),
    "part": (lambda pipe: pipe.generate([5]), "got a int"),
    "parts": (lambda pipe: pipe.generate(5), "parts must be texts and images in order, got 5"),
    "prompt": (lambda pipe: pipe(5), "prompt must be a text or a list of at least one, .* got 5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(pipeline())
