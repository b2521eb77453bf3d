"""Prompts in the flow pipeline: equal to diffusers' SD3 and Flux pipelines, and a single T5 that was trained along."""

import logging

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from hfgen import AutoPipeline, RectifiedFlowPipeline
from hfgen.pipelines.text_conditioning import encode_prompts
from support.text_encoders import CAPTIONS, clip, t5, tokenizer


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def vae(channels=4):
    return seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=channels,
            norm_num_groups=4,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
    )


def mmdit(context=16, pooled=24, channels=4, sample_size=8, max_size=8):
    return seeded(
        lambda: SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=context,
            caption_projection_dim=16,
            pooled_projection_dim=pooled,
            pos_embed_max_size=max_size,
        )
    )


def flux(guidance_embeds=False):
    return seeded(
        lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance_embeds,
        )
    )


def sd3_parts():
    return {
        "text_encoder": clip(8, 12, seed=0),
        "text_encoder_2": clip(8, 12, seed=1),
        "text_encoder_3": t5(16),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "tokenizer_3": tokenizer(),
    }


def flow_pipeline(*arguments, **parts):
    pipeline = RectifiedFlowPipeline(*arguments, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_pipeline(**changes):
    """Pixels of captions, with the T5 that is trained together with the network."""
    parts = {"text_encoder": t5(16), "tokenizer": tokenizer()} | changes
    return flow_pipeline(mmdit(context=16, pooled=16, channels=3), **parts)


WORDS = tokenizer()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_equal_to_the_sd3_pipeline_of_diffusers(guidance):
    parts = {"transformer": mmdit(), "vae": vae(), **sd3_parts()}
    theirs = StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    theirs.set_progress_bar_config(disable=True)
    ours = flow_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    arguments = {
        "prompt": CAPTIONS[:2],
        "negative_prompt": ["a cross", "red"],
        "height": 16,
        "width": 8,
        "num_inference_steps": 3,
        "guidance_scale": guidance,
        "latents": noise(2, 4, 8, 4),
        "max_sequence_length": 12,
        "output_type": "pt",
    }
    output = ours(**arguments)
    torch.testing.assert_close(output.images, theirs(**arguments).images, rtol=0, atol=1e-5)
    assert output.nfe == 3


def test_pipelines_of_diffusers_load(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = StableDiffusion3Pipeline(transformer=mmdit(), vae=vae(), scheduler=scheduler, **sd3_parts())
    theirs.save_pretrained(tmp_path)
    arguments = {"prompt": CAPTIONS[:1], "num_inference_steps": 1, "latents": noise(1, 4, 8, 8), "output_type": "pt"}
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(**arguments, guidance_scale=4.5, max_sequence_length=40).images
    for ours in (RectifiedFlowPipeline.from_pipe(theirs), RectifiedFlowPipeline.from_pretrained(tmp_path)):
        ours.set_progress_bar_config(disable=True)
        assert ours.scheduler.config.shift == 3.0
        torch.testing.assert_close(ours(**arguments).images, expected, rtol=0, atol=1e-5)


def test_model_cpu_offload():
    pipeline, arguments = small_pipeline(), {"latents": noise(1, 3, 8, 8), "num_inference_steps": 2}
    expected = pipeline(CAPTIONS[0], **arguments, output_type="pt").images
    pipeline.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(part, "_hf_hook") for part in (pipeline.text_encoder, pipeline.transformer))
    assert torch.equal(pipeline(CAPTIONS[0], **arguments, output_type="pt").images, expected)


@pytest.mark.parametrize("guidance_embeds", [False, True])
def test_equal_to_the_flux_pipeline_of_diffusers(guidance_embeds):
    """Flux dev embeds the guidance scale; schnell takes none, and its schedule is not shifted."""
    scheduler = {"use_dynamic_shifting": guidance_embeds, "shift": 3.0 if guidance_embeds else 1.0}
    shared = {"transformer": flux(guidance_embeds), "vae": vae(), "tokenizer": tokenizer()}
    shared |= {"text_encoder": clip(8, None), "text_encoder_2": t5(16), "tokenizer_2": tokenizer()}
    theirs = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), **shared)
    theirs.set_progress_bar_config(disable=True)
    ours = flow_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(**scheduler), **shared)
    latents = noise(1, 4, 8, 4)
    packed = theirs._pack_latents(latents, 1, 4, 8, 4)
    scale = 3.5 if guidance_embeds else 1.0
    # diffusers tokenizes for Flux's CLIP, too, with the length that its tokenizer has.
    arguments = {"prompt": CAPTIONS[:1], "num_inference_steps": 3, "max_sequence_length": 12, "output_type": "pt"}
    arguments |= {"height": 16, "width": 8}
    expected = theirs(latents=packed, guidance_scale=scale, **arguments).images
    output = ours(latents=latents, guidance_scale=scale, **arguments)
    torch.testing.assert_close(output.images, expected, rtol=0, atol=1e-5)


def test_flux_with_heun_takes_the_times_of_the_scheduler():
    parts = {"text_encoder": clip(8, None), "tokenizer": tokenizer(), "text_encoder_2": t5(16)}
    pipeline = flow_pipeline(flux(), FlowMatchHeunDiscreteScheduler(), tokenizer_2=tokenizer(), **parts)
    output = pipeline(CAPTIONS[0], height=8, width=8, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    assert output.nfe == 3 and output.images.isfinite().all()


def test_embedded_guidance_takes_no_negative_prompt():
    pipeline = flow_pipeline(flux(guidance_embeds=True))
    arguments = {"prompt_embeds": noise(1, 4, 16), "pooled_prompt_embeds": noise(1, 8), "output_type": "latent"}
    arguments |= {"height": 8, "width": 8, "num_inference_steps": 1, "latents": noise(1, 4, 8, 8)}
    images = pipeline(**arguments).images
    assert torch.equal(images, pipeline(**arguments, guidance_scale=3.5).images)
    assert not torch.equal(images, pipeline(**arguments, guidance_scale=1.0).images)
    with pytest.raises(ValueError, match="a negative prompt cannot change"):
        pipeline(**arguments, negative_prompt="red")


def test_one_t5_ignores_padding():
    """Its states at the padding are zero and the others do not depend on how much there is."""
    encoder, words = t5(16), tokenizer()
    with torch.no_grad():
        short, short_pooled = encode_prompts([(encoder, words)], CAPTIONS, context_width=16, max_sequence_length=36)
        long, long_pooled = encode_prompts([(encoder, words)], CAPTIONS, context_width=16)
        tokens = words(CAPTIONS[0], return_tensors="pt")["input_ids"]
        states = encoder(tokens).last_hidden_state
    torch.testing.assert_close(short_pooled, long_pooled)
    torch.testing.assert_close(long[:, :36], short)
    assert not long[:, 36:].any()
    torch.testing.assert_close(long[:1, : states.shape[1]], states)
    torch.testing.assert_close(long_pooled[:1], states.mean(dim=1))


def test_gradients_reach_the_text_encoder():
    encoder = t5(16)
    context, pooled = encode_prompts([(encoder, tokenizer())], CAPTIONS, context_width=16)
    (context.square().sum() + pooled.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_prompts_in_pixels():
    pipeline = small_pipeline()
    arguments = {"num_inference_steps": 2, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipeline(CAPTIONS[:2], generator=generators, **arguments).images
    assert images.shape == (2, 3, 8, 8)
    alone = pipeline(CAPTIONS[1], generator=[torch.Generator().manual_seed(1)], **arguments).images
    torch.testing.assert_close(alone, images[1:], rtol=0, atol=1e-5)
    latents = noise(2, 3, 8, 8)
    for_both = pipeline(CAPTIONS[0], num_images_per_prompt=2, latents=latents, **arguments).images
    torch.testing.assert_close(for_both, pipeline([CAPTIONS[0]] * 2, latents=latents, **arguments).images)
    # No negative prompt is the empty one.
    negative = pipeline(CAPTIONS[:2], negative_prompt="", latents=latents, **arguments).images
    torch.testing.assert_close(pipeline(CAPTIONS[:2], latents=latents, **arguments).images, negative)
    other = pipeline(CAPTIONS[:2], negative_prompt=["a circle", "green"], latents=latents, **arguments).images
    assert not torch.allclose(other, negative, atol=1e-4)


def test_embeddings_instead_of_prompts():
    pipeline = small_pipeline()
    context, pooled = encode_prompts(pipeline.text_encoders, CAPTIONS[:2], context_width=16)
    null, null_pooled = encode_prompts(pipeline.text_encoders, [""], context_width=16)
    arguments = {"latents": noise(2, 3, 8, 8), "num_inference_steps": 2, "output_type": "pt"}
    without_encoder = flow_pipeline(pipeline.transformer)
    images = without_encoder(
        prompt_embeds=context.detach(),
        pooled_prompt_embeds=pooled.detach(),
        negative_prompt_embeds=null.detach(),
        negative_pooled_prompt_embeds=null_pooled.detach(),
        **arguments,
    ).images
    torch.testing.assert_close(images, pipeline(CAPTIONS[:2], **arguments).images)


def test_text_is_encoded_once_per_call():
    pipeline, calls = small_pipeline(), []
    pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    pipeline(CAPTIONS[:2], num_inference_steps=4, output_type="latent")
    assert len(calls) == 2  # the prompts and the empty one


def test_save_and_load(tmp_path):
    pipeline = small_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = AutoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is RectifiedFlowPipeline and loaded.text_encoder_2 is None
    arguments = {"latents": noise(1, 3, 8, 8), "num_inference_steps": 2, "output_type": "pt"}
    assert torch.equal(loaded(CAPTIONS[0], **arguments).images, pipeline(CAPTIONS[0], **arguments).images)


def test_a_long_prompt_is_cut_with_a_warning(caplog):
    pipeline = small_pipeline(tokenizer=tokenizer(max_length=6))
    with caplog.at_level(logging.WARNING):
        pipeline(CAPTIONS[0], num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    assert "was cut to the 6" in caplog.text and "left" in caplog.text


def embeds(batch=1, width=16, pooled=16):
    return {"prompt_embeds": noise(batch, 4, width), "pooled_prompt_embeds": noise(batch, pooled)}


BAD_CALLS = {
    "nothing": ({}, "Give prompt or prompt_embeds"),
    "labels": ({"class_labels": 0}, "Got class_labels, but a SD3Transformer2DModel takes prompt"),
    "both": ({"prompt": "a", "class_labels": 0}, "Got class_labels"),
    "prompt twice": ({"prompt": "a", **embeds()}, "Got prompt and prompt_embeds"),
    "no text": ({"prompt": []}, "at least one"),
    "no tokens": ({"prompt": "a", "max_sequence_length": 0}, "max_sequence_length must be at least 1"),
    "no string": ({"prompt": [3]}, r"got \[3\]"),
    "no pooled": ({"prompt_embeds": noise(1, 4, 16)}, "pooled_prompt_embeds; give both"),
    "width": (embeds(width=8), r"\(1, 4, 8\).*expected \(batch, tokens, 16\)"),
    "negative twice": (
        {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": noise(1, 16, 16)},
        "negative_prompt and negative_prompt_embeds",
    ),
    "negatives": ({"prompt": ["a"] * 3, "negative_prompt": ["b"] * 2}, "one negative prompt or one per prompt"),
    "tokens of negatives": (embeds(), "of the same length"),
}


@pytest.mark.parametrize("arguments, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_pipeline()(num_inference_steps=1, **arguments)


def test_without_text_encoders():
    pipeline = flow_pipeline(mmdit(pooled=16, channels=3))
    with pytest.raises(ValueError, match="no text encoder: give prompt_embeds"):
        pipeline("a circle")
    with pytest.raises(ValueError, match="negative_pooled_prompt_embeds"):
        pipeline(**embeds())
    assert pipeline(**embeds(), guidance_scale=1.0, num_inference_steps=1).nfe == 1


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"text_encoder": t5(16)}, "has no tokenizer"),
        ({"text_encoder": t5(8), "tokenizer": tokenizer()}, "8 pooled features; the transformer takes 16"),
        (
            {"text_encoder": clip(8, 16), "tokenizer": tokenizer(), "text_encoder_2": t5(8), "tokenizer_2": WORDS},
            "width 8; the transformer takes 16",
        ),
        (
            {"text_encoder": t5(16), "tokenizer": tokenizer(), "text_encoder_2": t5(16), "tokenizer_2": tokenizer()},
            "one T5EncoderModel",
        ),
        ({"vae": vae(4)}, "4 channels, but the transformer has 3"),
        ({"class_names": ["a"]}, "1 class_names for 0 classes"),
    ],
    ids=["tokenizer", "pooled", "width", "two T5", "vae", "classes"],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        flow_pipeline(mmdit(pooled=16, channels=3), **parts)


def test_flux_needs_a_t5():
    with pytest.raises(ValueError, match="reads the states of a T5"):
        flow_pipeline(flux(), text_encoder=clip(8, None), tokenizer=tokenizer())


def test_largest_size():
    pipeline = flow_pipeline(mmdit(pooled=16, channels=3, max_size=6))
    assert pipeline(**embeds(), guidance_scale=1.0, num_inference_steps=1, height=12).nfe == 1
    with pytest.raises(ValueError, match="height can be at most 12 pixels"):
        pipeline(**embeds(), guidance_scale=1.0, height=14)
