"""What TransfusionPipeline does beyond the contracts of every pipeline: both kinds of images, text, and errors."""

import functools

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from hfgen import AutoPipeline, TransfusionPipeline
from hfgen.cli import main
from hfgen.counters import generator
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler
from support.grey_tokenizer import GreyTokenizer
from support.instances import PIPELINES, build_model, build_pipeline
from support.small_autoencoder import save_autoencoder
from support.text_encoders import CAPTIONS, tokenizer

TEXT = 34  # tokens of the tokenizer; then come the special ids
SPECIAL = {"boi_token_id": TEXT, "eoi_token_id": TEXT + 1, "image_token_id": None}
CODES = {"image_mode": "discrete", "codebook_size": 16, "code_offset": TEXT + 2, "vocab_size": TEXT + 18}
CODES["context_length"] = 300
CHANGES = PIPELINES["TransfusionPipeline"].changes["transformer"]


@functools.cache
def transformer(**changes):
    return build_model("TransfusionTransformer", **{**CHANGES, **changes})


def pipeline(model=None, scheduler=None, **parts):
    """Four steps of DDIM on pixels by default."""
    scheduler = scheduler or DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
    parts = {"image_size": 8, "tokenizer": tokenizer(), **parts}
    made = TransfusionPipeline(model or transformer(), scheduler=scheduler, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def discrete_pipeline(vae=None, quantizer=None, **changes):
    model = transformer(**{**CHANGES, **SPECIAL, **CODES, **changes})
    made = TransfusionPipeline(model, tokenizer(), vae=vae, quantizer=quantizer, image_size=8)
    made.set_progress_bar_config(disable=True)
    return made


def noisy_quantizer(channels=3):
    arguments = {"num_codes": 16, "latent_channels": channels, "quantizer_type": "nearest"}
    return build_model("NoisyLatentQuantizer", **arguments)


@pytest.fixture(scope="module")
def pipe():
    return pipeline(class_names=CAPTIONS)


@pytest.fixture(scope="module")
def discrete():
    return discrete_pipeline(quantizer=noisy_quantizer())


def draw(pipe, *arguments, **more):
    steps = {} if pipe.transformer.is_discrete else {"num_inference_steps": 4}
    return pipe(*arguments, output_type="latent", **{**steps, **more})


def counted(pipe, monkeypatch):
    """The shapes (R, T) of what runs through the transformer."""
    runs, run = [], pipe.transformer.run
    monkeypatch.setattr(
        pipe.transformer, "run", lambda x, *rest, **more: runs.append(tuple(x.shape[:2])) or run(x, *rest, **more)
    )
    return runs


def picture(seed=0):
    return torch.rand(1, 3, 8, 8, generator=generator(seed)) * 2 - 1


def test_the_context_runs_once(pipe, monkeypatch):
    """One pass for all prompts, one for no text, then the 16 patches of each image and both halves in each step."""
    runs = counted(pipe, monkeypatch)
    output = draw(pipe, CAPTIONS[:2], num_images_per_prompt=2, guidance_scale=2.0)
    longest = max(len(pipe.vocabulary.encode(caption)) for caption in CAPTIONS[:2]) + 2
    assert sorted(runs) == sorted([(1, 2), (2, longest), *[(8, 16)] * 4])
    assert output.nfe == 4
    runs.clear()
    assert draw(pipe, CAPTIONS[0], guidance_scale=1.0).nfe == 4
    assert runs[1:] == [(1, 16)] * 4
    runs.clear()
    draw(pipe, None, guidance_scale=3.0, num_images_per_prompt=2)  # nothing to guide away from
    assert runs == [(1, 2), *[(2, 16)] * 4]


def test_codes_run_one_by_one(discrete, monkeypatch):
    runs = counted(discrete, monkeypatch)
    output = draw(discrete, CAPTIONS[:2], guidance_scale=2.0, generator=generator(0))
    assert output.images.shape == (2, 64) and output.images.min() >= 0 and output.images.max() < 16
    assert output.nfe == 64 and runs[2:] == [(4, 1)] * 63


@pytest.mark.parametrize("mode", ["continuous", "discrete"])
def test_prompts_of_different_lengths_do_not_touch_each_other(mode, pipe, discrete):
    pipe = pipe if mode == "continuous" else discrete
    prompts = ["a", CAPTIONS[0], ""]
    together = draw(pipe, prompts, generator=[generator(seed) for seed in range(3)]).images
    for row, prompt in enumerate(prompts):
        alone = draw(pipe, prompt, generator=[generator(row)]).images
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


def test_conditions(pipe):
    """A class is its prompt; no text is unconditional; a negative prompt takes its place in guidance."""
    noise = torch.randn(1, 3, 8, 8, generator=generator(0))
    drawn = functools.partial(draw, pipe, latents=noise)
    by_prompt = drawn(CAPTIONS[1]).images
    assert torch.equal(drawn(class_labels=1).images, by_prompt)
    assert torch.equal(drawn(class_labels=[CAPTIONS[1]]).images, by_prompt)
    assert torch.equal(drawn("").images, drawn().images)
    assert torch.equal(drawn(class_labels=3).images, drawn().images)
    assert not torch.allclose(drawn(CAPTIONS[1], negative_prompt=CAPTIONS[2]).images, by_prompt, atol=1e-3)
    # Guidance by zero is what it is guided away from.
    negative = drawn(CAPTIONS[1], negative_prompt=CAPTIONS[2], guidance_scale=0.0).images
    torch.testing.assert_close(negative, drawn(CAPTIONS[2], guidance_scale=1.0).images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scheduler",
    [
        None,
        DDPMScheduler(clip_sample=False),
        FlowMatchEulerDiscreteScheduler(),
        RespacedDDPMScheduler(reverse_variance="fixed_small", prediction_type="v_prediction"),
    ],
)
def test_the_last_denoised_image_is_the_result(scheduler):
    pipe, seen = pipeline(scheduler=scheduler), []

    def watch(pipe, i, timestep, tensors):
        seen.append((i, tensors["denoised"]))
        return {}

    images = draw(
        pipe, CAPTIONS[0], num_inference_steps=5, callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["denoised"],
    ).images  # fmt: skip
    assert [i for i, _ in seen] == list(range(5))
    torch.testing.assert_close(seen[-1][1], images, rtol=0, atol=1e-3 * images.abs().max().item())


def test_sizes(pipe):
    output = pipe(CAPTIONS[0], height=4, width=12, num_inference_steps=1)
    assert output.images[0].size == (12, 4)


def test_an_autoencoder_and_its_scale(tmp_path):
    vae = AutoencoderKL.from_pretrained(save_autoencoder(tmp_path))
    pipe = pipeline(transformer(latent_channels=4), vae=vae)
    assert draw(pipe, CAPTIONS[0]).images.shape == (1, 4, 4, 4)
    latents = (vae.encode(picture()).latent_dist.mode() - 0.1) * 0.5
    torch.testing.assert_close(pipe.image_form.encode(picture()), latents)
    assert pipe.caption(picture(), max_new_tokens=2).nfe <= 2


@pytest.mark.parametrize("vae", ["MaskGITVQGAN", "TiTok", "MultiScaleVQVAE", "grey"])
def test_any_discrete_tokenizer(vae):
    tokenizer_of_images = GreyTokenizer() if vae == "grey" else build_model(vae)
    pipe = discrete_pipeline(tokenizer_of_images)
    codes = draw(pipe, CAPTIONS[0], generator=generator(0)).images
    assert codes.shape == (1, tokenizer_of_images.num_tokens)
    images = pipe(CAPTIONS[0], generator=generator(0), output_type="pt").images
    torch.testing.assert_close(images * 2 - 1, tokenizer_of_images.decode_codes(codes).sample.clamp(-1, 1))
    assert len(pipe.caption(images * 2 - 1, max_new_tokens=3).texts) == 1


def test_a_quantizer_of_latents(discrete, tmp_path):
    """Codes of pixels come back as their rows of the codebook, in raster order."""
    rows = discrete.quantizer.decode(torch.arange(16)[None])[0].detach()  # (16, 3)
    codes = torch.arange(64)[None] % 16
    pixels = rows[codes[0]].T.view(1, 3, 8, 8)
    assert torch.equal(discrete.image_form.encode(pixels), codes)
    torch.testing.assert_close(discrete.decode_latents(codes), pixels.clamp(-1, 1))
    discrete.save_pretrained(tmp_path)
    loaded = AutoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    drawn = [draw(each, CAPTIONS[0], generator=generator(1)).images for each in (discrete, loaded)]
    assert torch.equal(*drawn)


def test_captions(pipe):
    """Several images at once as each alone, and as generate makes them of the same parts."""
    pixels = torch.cat([picture(seed) for seed in range(3)])
    texts = pipe.caption(pixels, "a", max_new_tokens=6).texts
    for row in range(3):
        assert pipe.caption(pixels[row : row + 1], "a", max_new_tokens=6).texts == texts[row : row + 1]
    mixed = pipe.generate([pixels[0], "a"], max_images=0, max_new_tokens=6, temperature=0)
    assert mixed.parts == [text for text in texts[:1] if text] and mixed.nfe <= 6
    one = PIL.Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8))
    drawn = [pipe.caption(one, temperature=1.0, max_new_tokens=6, generator=generator(seed)).texts for seed in (0, 0)]
    assert drawn[0] == drawn[1]


def likeliest(pipe, ids, latents, count):
    """Whole passes over a sequence with its finished images."""
    config, ids = pipe.transformer.config, list(ids)
    never = [config.bos_token_id, config.pad_token_id, config.image_token_id, config.boi_token_id]
    for _ in range(count):
        logits = pipe.transformer(torch.tensor([ids]), latents, torch.zeros(len(latents))).logits[0, -1]
        logits[never] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[-count:]


@torch.no_grad()
def test_an_image_between_texts(pipe):
    """It is that of a call with the text before it, and the text after it has seen it without noise."""
    arguments = {"num_inference_steps": 4, "output_type": "latent"}
    written = pipe.generate(
        "a small", begin_with_image=True, max_new_tokens=5, temperature=0, generator=generator(3), **arguments
    )
    image = written.parts[0][None]
    torch.testing.assert_close(image, pipe("a small", generator=generator(3), **arguments).images, rtol=0, atol=1e-5)
    config, text = pipe.transformer.config, pipe.vocabulary.encode("a small")
    ids = [config.bos_token_id, *text, config.boi_token_id, *[config.image_token_id] * 16, config.eoi_token_id]
    expected = likeliest(pipe, ids, image, 5)
    if config.eos_token_id in expected:
        expected = expected[: expected.index(config.eos_token_id) + 1]
    assert "".join(written.parts[1:]) == pipe.vocabulary.decode(expected)  # after an image it begins anew
    assert written.nfe == 4 + len(expected)


@pytest.mark.parametrize("mode", ["continuous", "discrete"])
def test_the_transformer_begins_images_itself(mode, discrete, monkeypatch):
    """Text is shown piece by piece and images step by step; after the last image that is allowed only text follows."""
    pipe = pipeline(transformer(context_length=200)) if mode == "continuous" else discrete
    boi, logits_of, calls = pipe.transformer.config.boi_token_id, pipe.transformer.text_logits, []

    def eager(hidden_states):
        calls.append(1)
        logits = logits_of(hidden_states).clone()
        logits[..., boi] += 1000 * (len(calls) > 2)
        logits[..., pipe.transformer.config.eos_token_id] = -1000
        return logits

    monkeypatch.setattr(pipe.transformer, "text_logits", eager)
    pieces, steps = [], []
    steps_argument = {} if mode == "discrete" else {"num_inference_steps": 4}
    output = pipe.generate(
        [picture(), "a"],
        max_new_tokens=8,
        max_images=2,
        generator=generator(0),
        callback_on_text=lambda pipe, text: pieces.append(text),
        callback_on_step_end=lambda pipe, i, timestep, tensors: steps.append(i) or {},
        **steps_argument,
    )
    texts = [part for part in output.parts if isinstance(part, str)]
    images = [part for part in output.parts if not isinstance(part, str)]
    assert len(images) == 2 and all(image.size == (8, 8) for image in images)
    assert "".join(pieces) == "".join(texts) and texts
    each = 4 if mode == "continuous" else 64
    assert steps == [*range(each)] * 2 and output.nfe == 2 * each + 8


def test_command_line(tmp_path):
    build_pipeline("TransfusionPipeline").save_pretrained(tmp_path / "pipe")
    main(
        ["sample", str(tmp_path / "pipe"), "--prompt", "a red circle", "--num-inference-steps", "2", "--num", "2"]
        + ["--output", str(tmp_path / "out")]
    )
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


REFUSED = {
    "context": (lambda pipe: pipe("a small red circle " * 5), "needs .* tokens .* context has 64"),
    "context of a sequence": (lambda pipe: pipe.generate([picture()] * 4), "context has 64"),
    "context of an image": (lambda pipe: pipe("a", height=32, width=32), "context has 64"),
    "height": (lambda pipe: pipe("a", height=9), "height must be a multiple of 2 pixels"),
    "size of a part": (lambda pipe: pipe.generate([torch.zeros(3, 7, 8)]), "height must be a multiple of 2"),
    "marker in a text": (lambda pipe: pipe("a <pad> circle"), "special token '<pad>'"),
    "marker in a part": (lambda pipe: pipe.generate(["a</s>", picture()]), "images are given as images"),
    "several images in a part": (lambda pipe: pipe.generate([torch.zeros(2, 3, 8, 8)]), "batch of 2 images"),
    "two conditions": (lambda pipe: pipe("a", class_labels=0), "prompt and class_labels"),
    "class": (lambda pipe: pipe(class_labels=7), "7 is out of range"),
    "no prompts": (lambda pipe: pipe([]), "list of at least one"),
    "negative prompts": (lambda pipe: pipe(["a"] * 3, negative_prompt=["b"] * 2), "2 negative prompts for 3"),
    "no text": (lambda pipe: pipe([3]), "got 3"),
    "steps": (lambda pipe: pipe("a", num_inference_steps=0), "between 1 and 1000, got 0"),
    "noise": (lambda pipe: pipe("a", latents=torch.zeros(1, 3, 4, 4)), r"expected \(1, 3, 8, 8\)"),
    "temperature": (lambda pipe: pipe.caption(picture(), temperature=-1), "got -1"),
    "tokens": (lambda pipe: pipe.caption(picture(), max_new_tokens=0), "at least 1, got 0"),
    "images": (lambda pipe: pipe.generate(max_images=0, begin_with_image=True), "max_images must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calls(name, pipe):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(pipe)


def test_bad_parts(discrete):
    with pytest.raises(ValueError, match="The tokenizer has 34 tokens, but the transformer has 30"):
        pipeline(transformer(boi_token_id=30, eoi_token_id=31, image_token_id=32, vocab_size=33))
    with pytest.raises(ValueError, match="bos_token_id is 1 in the tokenizer and 3 in the transformer"):
        pipeline(transformer(bos_token_id=3))
    with pytest.raises(ValueError, match="clips every step"):
        pipeline(transformer(latent_channels=4), vae=AutoencoderKL(latent_channels=4), scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match="leave the quantizer out"):
        pipeline(quantizer=noisy_quantizer())
    with pytest.raises(ValueError, match="no discrete image tokenizer"):
        discrete_pipeline()
    with pytest.raises(ValueError, match="16 codes and the transformer 12"):
        discrete_pipeline(GreyTokenizer(), codebook_size=12, vocab_size=TEXT + 14)
    with pytest.raises(ValueError, match="for timestep 100 and the transformer for 7"):
        discrete_pipeline(quantizer=noisy_quantizer(), fixed_timestep=7)
    with pytest.raises(ValueError, match="one step for each code"):
        discrete("a", num_inference_steps=4)
    with pytest.raises(ValueError, match="no noise"):
        discrete("a", latents=torch.zeros(1))
    with pytest.raises(ValueError, match="no tokenizer"):
        pipeline(tokenizer=None)("a")
    with pytest.raises(ValueError, match="give height"):
        pipeline(image_size=None)("a")
