"""What MaskGITPipeline does beyond the contracts of every pipeline: passes, guidance, editing, steps and errors."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AmusedScheduler

from hfgen import ImageBert, MaskedTokenScheduler, MaskGITPipeline, MaskGITTransformer
from hfgen.counters import generator
from hfgen.losses.masked import masked_token_loss
from hfgen.pipelines.steps import StepRecorder
from hfgen.sampling.masked_tokens import mask_ratio, masked_positions, random_token_mask
from support.grey_tokenizer import GreyTokenizer
from support.instances import MASKED_SIZES, build_model

NAMES = ["red", "green", "blue", "cyan", "pink"]
TRANSFORMERS = ["MaskGITTransformer", "ImageBert", "UViTBert"]


def pipeline(vq_model=None, transformer="UViTBert", scheduler=None, **arguments):
    made = MaskGITPipeline(vq_model or GreyTokenizer(), build_model(transformer), scheduler, **arguments)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipe():
    scheduler = MaskedTokenScheduler(num_inference_steps=5, guidance_scale=3.0, guidance_schedule="linear")
    return pipeline(scheduler=scheduler, class_names=NAMES)


def recorded(pipe, class_labels=0, **arguments):
    recorder = StepRecorder()
    output = pipe(class_labels, callback_on_step_end=recorder, output_type="latent", **arguments)
    return recorder, output


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_sampling_equals_the_plain_loop(name):
    """Logits of all tokens, both halves in every step, all of them drawn: the same codes."""
    scheduler = MaskedTokenScheduler(num_inference_steps=5, guidance_scale=3.0, guidance_schedule="linear")
    pipe, labels = pipeline(transformer=name, scheduler=scheduler), torch.tensor([3, 0])
    codes = torch.full((2, 16), 16)
    draws, again = generator(7), generator(7)
    for step in scheduler.plan([16, 16]):
        count = step.num_positions
        positions = masked_positions(codes, 16, count)
        with torch.no_grad():
            conditional = pipe.transformer(codes, labels).logits
            unconditional = pipe.transformer(codes, torch.full_like(labels, 5)).logits
        guided = unconditional + step.guidance_scale * (conditional - unconditional)
        token_noise = -torch.empty(2, count, 16).exponential_(generator=draws).log()
        drawn = codes.scatter(1, positions, 0)
        rows = torch.arange(2)[:, None]
        drawn[rows, positions] = (guided[rows, positions] + token_noise).argmax(-1)
        score = guided.log_softmax(-1).gather(-1, drawn[..., None])[..., 0].masked_fill(codes != 16, torch.inf)
        codes = drawn
        if step.num_remasked[0]:
            choice_noise = -torch.empty(2, count).exponential_(generator=draws).log()
            score[rows, positions] += step.choice_temperature * choice_noise
            lowest = score.argsort(1)[:, : step.num_remasked[0]]
            codes = drawn.scatter(1, lowest, 16)
    assert torch.equal(pipe(labels, generator=again, output_type="latent").images, codes)


def test_only_what_is_needed_is_computed(pipe, monkeypatch):
    """The head only on masked tokens, the unconditional half only while guidance is on."""
    calls = []
    plain = pipe.transformer.forward_positions

    def count(codes, labels, positions):
        calls.append(tuple(positions.shape))
        return plain(codes, labels, positions)

    monkeypatch.setattr(pipe.transformer, "forward_positions", count)
    left = [step.num_positions for step in pipe.scheduler.plan([16])]
    for labels, scale, batches in (([0, 1], 2.0, [2, 4, 4, 4, 4]), ([0, 1], 1.0, [2] * 5), (None, 2.0, [1] * 5)):
        calls.clear()
        output = pipe(labels, guidance_scale=scale, output_type="latent")
        assert calls == list(zip(batches, left))
        assert output.nfe == len(calls) == 5
    assert left == sorted(left, reverse=True) and left[0] == 16


def test_the_first_step_sees_each_class_once(pipe, monkeypatch):
    """While all is masked images of one class are alike, and so are all without a class; the codes stay the same."""
    labels, arguments = [1, 0, 1, 1], {"guidance_scale": 3.0, "guidance_schedule": "constant", "output_type": "latent"}
    rows, plain = [], pipe.transformer.forward_positions
    monkeypatch.setattr(
        pipe.transformer, "forward_positions", lambda codes, *others: rows.append(len(codes)) or plain(codes, *others)
    )
    batch = pipe(labels, generator=[generator(seed) for seed in range(4)], **arguments).images
    assert rows == [3, 8, 8, 8, 8]
    alone = [pipe(label, generator=[generator(seed)], **arguments).images for seed, label in enumerate(labels)]
    assert torch.equal(batch, torch.cat(alone))


def test_number_of_steps(pipe):
    for steps in (1, 3, 16):
        output = pipe(0, num_inference_steps=steps, output_type="latent")
        assert output.nfe == steps
        assert output.images.min() >= 0 and output.images.max() < 16


def test_temperatures(pipe):
    """Without noise the result does not depend on the generator; with little it is close to it."""
    greedy = [
        pipe(1, token_temperature=0, choice_temperature=0, generator=generator(seed), output_type="latent").images
        for seed in range(2)
    ]
    assert torch.equal(*greedy)
    drawn = [pipe(1, generator=generator(seed), output_type="latent").images for seed in range(2)]
    assert not torch.equal(*drawn)


def test_classes_by_name_and_by_index(pipe):
    by_name = pipe(["blue", "red"], generator=generator(0), output_type="latent").images
    assert torch.equal(by_name, pipe([2, 0], generator=generator(0), output_type="latent").images)
    assert pipe.class_names == NAMES


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_default_scheduler_is_that_of_the_published_weights(name):
    pipe = pipeline(transformer=name)
    assert pipe.scheduler.plan([64]) == MaskedTokenScheduler.from_preset(pipe.transformer.default_scheduler).plan([64])


@pytest.mark.parametrize("grid", [True, False])
def test_a_tokenizer_that_is_no_class_of_hfgen(grid):
    """What is needed is the protocol; tests/contracts has all tokenizers of the package with all generators."""
    pipe = pipeline(GreyTokenizer(grid=grid), scheduler=MaskedTokenScheduler(num_inference_steps=3))
    images = pipe([0, 1], generator=generator(0), output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and len(images.unique()) > 2
    assert pipe.grid_size == ((4, 4) if grid else None)


def picture(seed=0, side=8):
    return torch.rand(1, 3, side, side, generator=generator(seed)) * 2 - 1


def box(top, left, bottom, right, side=8):
    mask = torch.zeros(side, side)
    mask[top:bottom, left:right] = 1
    return mask


def test_what_is_not_painted_stays(pipe):
    """Left half painted: the codes of the right half are those of the image, with every class and every draw."""
    true = pipe.vq_model.encode(picture()).codes.unflatten(1, (4, 4))
    mask = box(0, 0, 8, 4)
    recorder, output = recorded(pipe, [0, 3], image=picture(), mask_image=mask, generator=generator(0))
    edited = output.images.unflatten(1, (4, 4))
    assert torch.equal(edited[:, :, 2:], true[:, :, 2:].expand(2, -1, -1))
    assert not torch.equal(edited[:, :, :2], true[:, :, :2].expand(2, -1, -1))
    assert not torch.equal(edited[0], edited[1])
    assert output.nfe == 5
    assert all((codes.unflatten(1, (4, 4))[:, :, 2:] < 16).all() for codes in recorder.codes)


def test_out_painting_and_margin(pipe):
    """The complement of a box is painted; the margin grows what is painted by whole tokens."""
    start = pipe.prepare_edit(picture(), 1 - box(2, 2, 6, 6), 1, "cpu")
    assert (start.unflatten(1, (4, 4)) == 16).int()[0].tolist() == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1] * 4]
    inner = box(3, 3, 4, 4)  # one pixel of one token
    assert (pipe.prepare_edit(picture(), inner, 1, "cpu") == 16).sum() == 1
    assert (pipe.prepare_edit(picture(), inner, 1, "cpu", mask_margin=1) == 16).sum() == 9


def test_masks_of_different_sizes_in_one_batch(pipe):
    """Images with few and with many painted tokens do not change each other."""
    masks = torch.stack([box(0, 0, 4, 4), box(0, 0, 8, 6)])
    arguments = {"image": picture(), "num_inference_steps": 3, "output_type": "latent"}
    together = pipe([0, 1], mask_image=masks, generator=[generator(0), generator(1)], **arguments).images
    for row in range(2):
        alone = pipe([row], mask_image=masks[row], generator=[generator(row)], **arguments).images
        assert torch.equal(alone, together[row : row + 1])


def test_first_step_of_an_edit(pipe):
    output = pipe(
        0, image=picture(), mask_image=box(0, 0, 8, 8), num_inference_steps=12, first_step=2, output_type="latent"
    )
    assert output.nfe == 10


def test_in_painting_from_pictures(pipe):
    image = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (8, 8, 3), dtype=np.uint8))
    mask = PIL.Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    images = pipe([0, 1], image=image, mask_image=mask, generator=generator(0)).images
    assert [one.size for one in images] == [(8, 8)] * 2


def test_a_callback_can_replace_codes(pipe):
    def blacken(pipe, index, masked, tensors):
        codes = tensors["codes"]
        return {"codes": torch.where(codes == 16, codes, 0)}

    output = pipe(0, generator=generator(0), output_type="latent", callback_on_step_end=blacken)
    assert not output.images.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: codes.clamp(max=15), r"\(0,\) masked tokens, expected"),
        (lambda codes: -codes, r"codes lie in \[-16, "),
        (lambda codes: codes[:, :4], r"shape \(1, 4\), expected \(batch, 16\)"),
    ],
)
def test_a_callback_cannot_break_the_plan(pipe, change, message):
    with pytest.raises(ValueError, match=message):
        pipe(0, callback_on_step_end=lambda pipe, index, masked, tensors: {"codes": change(tensors["codes"])})


def test_steps_as_pictures(pipe, tmp_path):
    recorder, output = recorded(pipe, [1, 2], generator=generator(0))
    assert len(recorder.codes) == 5 and torch.equal(recorder.codes[-1], output.images)
    frames = recorder.frames(pipe, index=1)
    assert [frame.size for frame in frames] == [(16, 8)] * 5  # the image and, beside it, what is masked
    first = np.asarray(frames[0])[:, 8:, 0] == 128
    masked = (recorder.codes[0][1] == 16).reshape(4, 4).numpy().repeat(2, 0).repeat(2, 1)
    assert np.array_equal(first, masked)
    path = recorder.save_gif(pipe, tmp_path / "new" / "steps.gif", index=1, upscale=4)
    with PIL.Image.open(path) as gif:
        assert gif.n_frames == 5 and gif.size == (64, 32)
    assert [one.name for one in path.parent.iterdir()] == ["steps.gif"]


def test_steps_of_a_sequence_have_no_places():
    pipe = pipeline(GreyTokenizer(grid=False))
    recorder, _ = recorded(pipe, num_inference_steps=4)
    assert {frame.size for frame in recorder.frames(pipe)} == {(8, 8)}


def test_bad_records(pipe, tmp_path):
    with pytest.raises(ValueError, match="No steps of image 0 were recorded"):
        StepRecorder().frames(pipe)
    recorder, _ = recorded(pipe)
    with pytest.raises(ValueError, match="No steps of image 3"):
        recorder.frames(pipe, index=3)
    with pytest.raises(ValueError, match="end in .gif"):
        recorder.save_gif(pipe, tmp_path / "steps.png")
    with pytest.raises(ValueError, match="upscale and milliseconds must be at least 1, got 0"):
        recorder.save_gif(pipe, tmp_path / "steps.gif", upscale=0)


BAD_CALLS = {
    "label too large": ({"class_labels": 6}, "Class label 6 is out of range.*0 to 4, and 5"),
    "label negative": ({"class_labels": [0, -1]}, "Class label -1"),
    "no labels": ({"class_labels": []}, "class_labels is empty"),
    "unknown name": ({"class_labels": "pinkish"}, "'pinkish'.*red, green, blue"),
    "generators": ({"class_labels": [0, 1], "generator": [generator(0)]}, "1 generators for 2 images"),
    "more steps than tokens": ({"class_labels": 0, "num_inference_steps": 17}, "17 steps are more than the 16 masked"),
    "no steps": ({"class_labels": 0, "num_inference_steps": 0}, "no step 0 of 0"),
    "first step": ({"class_labels": 0, "first_step": 5}, "no step 5 of 5"),
    "negative guidance": ({"class_labels": 0, "guidance_scale": -1.0}, "guidance_scale.*-1"),
    "guidance list": ({"class_labels": 0, "guidance_schedule": [1.0]}, "1 values.*5 steps"),
    "token temperature": ({"class_labels": 0, "token_temperature": -1.0}, "token_temperature.*-1"),
    "choice temperature": ({"class_labels": 0, "choice_temperature": float("nan")}, "choice_temperature.*nan"),
    "output type": ({"class_labels": 0, "output_type": "jpeg"}, "output_type.*'jpeg'"),
    "no images": ({"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt.*0"),
    "callback tensor": ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["latent"]}, "latent.*codes"),
    "image without mask": ({"class_labels": 0, "image": picture()}, "both image and mask_image"),
    "image of another size": ({"image": picture(side=16), "mask_image": torch.ones(8, 8)}, r"16x16.*8x8.*resize"),
    "mask of another size": ({"image": picture(), "mask_image": torch.ones(4, 8)}, r"mask_image is 8x4.*8x8"),
    "mask shape": ({"image": picture(), "mask_image": torch.ones(8)}, r"mask_image must be.*\(8,\)"),
    "mask range": ({"image": picture(), "mask_image": torch.full((8, 8), 255.0)}, "mask_image must lie in"),
    "nothing to paint": ({"image": picture(), "mask_image": torch.zeros(8, 8)}, "masks no token"),
    "too few to paint": ({"image": picture(), "mask_image": box(0, 0, 2, 4)}, "5 steps are more than the 2 masked"),
    "margin": ({"image": picture(), "mask_image": torch.ones(8, 8), "mask_margin": -1}, "mask_margin.*-1"),
    "image range": ({"image": picture() * 9, "mask_image": torch.ones(8, 8)}, r"\[-1, 1\]"),
    "image batch": (
        {"class_labels": 0, "image": picture().expand(3, -1, -1, -1), "mask_image": torch.ones(8, 8)},
        "batch of 3.*1 images",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_editing_needs_a_grid():
    pipe = pipeline(GreyTokenizer(grid=False))
    with pytest.raises(ValueError, match="GreyTokenizer has no grid of tokens"):
        pipe(0, image=picture(), mask_image=torch.ones(8, 8))


def test_without_unconditional_class():
    transformer = MaskGITTransformer(**MASKED_SIZES).eval()
    pipe = MaskGITPipeline(GreyTokenizer(), transformer)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(4, output_type="latent").nfe == 8
    with pytest.raises(ValueError, match="no unconditional class, so only guidance_scale=1"):
        pipe(0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="no unconditional class: give class_labels"):
        pipe()
    with pytest.raises(ValueError, match="Class label 5 is out of range; the transformer has the classes 0 to 4"):
        pipe(5)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 16), 16), r"complete codes in \[0, 15\].* got \[16, 16\]; in a callback use predicted"),
        (torch.full((1, 16), -1), r"complete codes in \[0, 15\].* got \[-1, -1\]"),
        (torch.zeros(1, 9, dtype=torch.long), r"shape \(1, 9\), expected \(batch, 16\)"),
        (torch.zeros(1, 4, 4, dtype=torch.long), r"shape \(1, 4, 4\), expected \(batch, 16\)"),
    ],
)
def test_codes_that_make_no_image(pipe, codes, message):
    with pytest.raises(ValueError, match=message):
        pipe.decode_latents(codes)


@pytest.mark.parametrize(
    ("vq_model", "message"),
    [
        (GreyTokenizer(num_codes=17), "codebook sizes: 17 and 16"),
        (GreyTokenizer(side=2), "numbers of codes per image: 4 and 16"),
        (torch.nn.Identity(), "Identity is no discrete tokenizer"),
    ],
)
def test_components_that_do_not_fit(vq_model, message):
    with pytest.raises(ValueError, match=message):
        MaskGITPipeline(vq_model, build_model("UViTBert"))


def test_parts_of_another_kind():
    with pytest.raises(ValueError, match="VARTransformer is no masked-token generator"):
        MaskGITPipeline(GreyTokenizer(), build_model("VARTransformer"))
    with pytest.raises(ValueError, match="scheduler is a AmusedScheduler, expected a MaskedTokenScheduler"):
        pipeline(scheduler=AmusedScheduler(mask_token_id=16))


def test_one_name_per_class():
    with pytest.raises(ValueError, match="2 class_names for 5 classes"):
        pipeline(class_names=["a", "b"])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_learns_two_pictures(name):
    """Trained on one picture per class, the pipeline draws that picture, guided and unguided."""
    transformer = build_model(name, hidden_size=32, num_classes=2).train()
    pictures = torch.randint(16, (2, 16), generator=generator(5))
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    for step in range(120):
        draws = generator(6, step)
        labels = torch.arange(8) % 2
        codes = pictures[labels]
        mask = random_token_mask(
            mask_ratio("cosine", torch.rand(8, generator=draws), 16), torch.rand(8, 16, generator=draws)
        )
        dropped = torch.rand(8, generator=draws) < 0.1
        inputs = codes.masked_fill(mask, transformer.mask_token_id)
        logits = transformer(inputs, labels.masked_fill(dropped, transformer.unconditional_label)).logits
        loss = masked_token_loss(logits, codes, mask, label_smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe = MaskGITPipeline(GreyTokenizer(), transformer.eval(), MaskedTokenScheduler(num_inference_steps=4))
    pipe.set_progress_bar_config(disable=True)
    for scale in (1.0, 2.0):
        drawn = pipe([0, 1] * 4, guidance_scale=scale, generator=generator(7), output_type="latent").images
        assert (drawn == pictures[torch.arange(8) % 2]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("model", "num_tokens", "preset"),
    [
        (ImageBert, 32, "titok-l32"),
        (ImageBert, 64, "titok-b64"),
        (MaskGITTransformer, 256, "maskgit"),
        (MaskGITTransformer, 1024, "maskgit-512"),
    ],
)
def test_published_scheduler_of_each_size(model, num_tokens, preset):
    sizes = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "num_codes": 4}
    assert model(num_tokens=num_tokens, num_classes=2, **sizes).default_scheduler == preset
