"""What benchmarks/sampling.py compares for Transfusion: a guided image after a context, and text.

"image after N" is one of 256 patches after N tokens of text, "image of a caption" one of zoo/transfusion-shapes, the
size zoo. The plain path runs the context again in every step,
without a cache. "text N" are N likeliest tokens; the plain path is ``generate`` of transformers' own Llama with the
same weights, and the rate is in tokens per second.
"""

from __future__ import annotations

from pathlib import Path

import torch
from comparison import Comparison
from diffusers import DDIMScheduler
from plain_transfusion import sample_plain
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hfgen import TransfusionPipeline, TransfusionTransformer
from hfgen.counters import generator
from hfgen.sampling.transfusion import extend_text, text_tokens
from hfgen.sampling.transfusion_cache import TransfusionCache

# Layers, width, heads, width of the MLP; those of the zoo are its own.
SIZES = {"tiny": (4, 128, 4, 512), "0.16B": (16, 768, 12, 2048), "0.37B": (24, 1024, 16, 2816), "zoo": ()}
ZOO, CAPTION, ZOO_STEPS = (
    Path(__file__).resolve().parent.parent / "zoo" / "transfusion-shapes",
    "a small red circle",
    25,
)
WORDS = 1000  # of the vocabulary, before the special ids
CONTEXTS, STEPS, TOKENS = (64, 256, 1024), 8, 64
GUIDANCE_SCALE, IMAGE_SIZE, TOLERANCE = 3.0, 32, 1e-3


def load(size: str, dtype: torch.dtype, device: str) -> TransfusionPipeline:
    """The zoo's, or seeded random weights (speed does not depend on them) that make pixels in patches of two."""
    if size == "zoo":
        pipe = TransfusionPipeline.from_pretrained(ZOO, dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    layers, width, heads, mlp_width = SIZES[size]
    torch.manual_seed(0)
    transformer = TransfusionTransformer(
        vocab_size=WORDS + 6, hidden_size=width, intermediate_size=mlp_width, num_layers=layers,
        num_attention_heads=heads, context_length=4096, latent_channels=3, bos_token_id=WORDS, eos_token_id=WORDS + 1,
        boi_token_id=WORDS + 2, eoi_token_id=WORDS + 3, pad_token_id=WORDS + 4, image_token_id=WORDS + 5,
    )  # fmt: skip
    for name, parameter in transformer.named_parameters():  # the initial output of images is zero
        if "image_out" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = Tokenizer(models.WordLevel({str(word): word for word in range(WORDS)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = TransfusionPipeline(
        transformer.eval(),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0"),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
        image_size=IMAGE_SIZE,
    )
    pipe.to(dtype)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(pipe: TransfusionPipeline, batch: int) -> list[Comparison]:
    if pipe.vae is not None:  # the zoo's
        return [_compare_images(pipe, batch, "image of a caption", [CAPTION] * batch, ZOO_STEPS)]
    images = (_compare_images(pipe, batch, f"image after {n}", _prompts(batch, n), STEPS) for n in CONTEXTS)
    return [*images, _compare_text(pipe, batch)]


def _prompts(batch: int, length: int) -> list[str]:
    """Texts with which the tokens before an image, with its marker, are ``length``."""
    return [" ".join(str((7 * place + row) % WORDS) for place in range(length - 2)) for row in range(batch)]


def _compare_images(
    pipe: TransfusionPipeline, batch: int, part: str, prompts: list[str], num_steps: int
) -> Comparison:
    noise = torch.randn(batch, *pipe.image_form.latent_shape(), generator=generator(0)).to(pipe.device)

    def optimised() -> tuple[None, Tensor]:
        images = pipe(
            prompts, latents=noise, num_inference_steps=num_steps, guidance_scale=GUIDANCE_SCALE, output_type="pt"
        ).images
        return None, images * 2 - 1

    def plain() -> tuple[None, Tensor]:
        return None, sample_plain(pipe, prompts, noise, num_steps, GUIDANCE_SCALE).clamp(-1, 1)

    if pipe.transformer.dtype == torch.float32:
        difference = (optimised()[1] - plain()[1]).abs().max().item()
        if difference > TOLERANCE:
            raise SystemExit(f"{part}: the two images differ by {difference:.2g}; nothing was timed.")
    return Comparison(part, batch, plain, optimised, transformer=optimised, dtype=pipe.transformer.dtype)


def _compare_text(pipe: TransfusionPipeline, batch: int) -> Comparison:
    transformer, device = pipe.transformer, pipe.device
    llama = LlamaForCausalLM(transformer.model.config).eval().to(device, transformer.dtype)
    llama.model.load_state_dict(transformer.model.state_dict())
    llama.lm_head.load_state_dict(transformer.lm_head.state_dict())
    llama.generation_config.eos_token_id = None  # so that both write all tokens
    llama.generation_config.pad_token_id = transformer.config.pad_token_id
    prompt = torch.randint(WORDS, (batch, 16), generator=generator(0)).to(device)
    blocked = torch.zeros(transformer.config.vocab_size, dtype=torch.bool, device=device)

    def plain() -> tuple[Tensor, None]:
        ids = llama.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False, use_cache=True
        )
        return ids[:, prompt.shape[1] :], None

    @torch.no_grad()
    def optimised() -> tuple[Tensor, None]:
        cache = TransfusionCache(transformer.config.num_layers, prompt.shape[1] + TOKENS, [0] * batch)
        states = extend_text(transformer, cache, prompt)[:, -1]
        stream = text_tokens(transformer, cache, states, blocked, temperature=0)
        return torch.stack([next(stream) for _ in range(TOKENS)], dim=1), None

    return Comparison(
        f"text {TOKENS}", batch, plain, optimised, transformer=optimised, dtype=transformer.dtype, items=TOKENS
    )
