"""What benchmarks/sampling.py compares for flows and diffusion: the pipelines of diffusers ("plain") and of hfgen.

- ``sd3``: ``StableDiffusion3Pipeline`` and ``RectifiedFlowPipeline`` with one ``SD3Transformer2DModel``.
- ``dit``: ``DiTPipeline`` and ``ImageDiffusionPipeline`` with one ``DiT``.
- ``dit network``: the same pipelines, in that of diffusers a ``DiTTransformer2DModel`` with the same weights.

Guided, with equal noise, scheduler and number of steps, so that the ratio of the calls is that of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comparison import Comparison
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from hfgen import DiT, ImageDiffusionPipeline, RectifiedFlowPipeline
from hfgen.conversion import to_original
from hfgen.counters import generator

STEPS, GUIDANCE_SCALE, NUM_TOKENS = 8, 4.5, 77
DIFFERENCE = {torch.float32: 1e-4}  # of equal outputs, of numbers of about 1; coarser dtypes round otherwise
COARSE_DIFFERENCE = 0.2


@dataclass
class Networks:
    """Two networks with seeded random weights (speed does not depend on them)."""

    sd3: SD3Transformer2DModel
    dit: DiT


# SD3: layers, side of the latents, width of the text, of the pooled text, side of the table of positions.
SIZES: dict[str, tuple[tuple[int, int, int, int, int], dict]] = {
    "tiny": ((2, 16, 64, 32, 16), {"sample_size": 16, "num_layers": 4, "width": 128, "num_heads": 4}),
    "s": ((6, 32, 512, 256, 32), DiT.presets["S/2"]),
    "xl": ((24, 64, 4096, 2048, 192), DiT.presets["XL/2"]),  # SD3 medium at 512 pixels, DiT-XL/2 at 256
}


def load(size: str, dtype: torch.dtype, device: str) -> Networks:
    """The networks of a size."""
    (layers, side, context, pooled, positions), sizes = SIZES[size]
    torch.manual_seed(0)
    sd3 = SD3Transformer2DModel(
        sample_size=side, num_layers=layers, num_attention_heads=max(layers, 2), caption_projection_dim=64 * layers,
        joint_attention_dim=context, pooled_projection_dim=pooled, pos_embed_max_size=positions,
    )  # fmt: skip
    dit = DiT(**{**sizes, "out_channels": 8})
    for parameter in dit.parameters():  # a new one predicts zeros
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
    return Networks(*(network.eval().to(device, dtype) for network in (sd3, dit)))


def compare(networks: Networks, batch: int) -> list[Comparison]:
    """The comparisons of a batch.

    Raises:
        SystemExit: outputs that differ.
    """
    comparisons = [_sd3(networks.sd3, batch), _dit(networks.dit, networks.dit, "dit", batch)]
    comparisons.append(_dit(_of_diffusers(networks.dit), networks.dit, "dit network", batch))
    for comparison in comparisons:
        (_, theirs), (_, ours) = comparison.plain(), comparison.optimised()
        difference = (ours.float() - theirs.float()).abs().max().item()
        if not difference <= DIFFERENCE.get(comparison.dtype, COARSE_DIFFERENCE):
            raise SystemExit(f"Outputs of {comparison.part} differ by {difference:.2g}; nothing was timed.")
    return comparisons


def _sd3(transformer: SD3Transformer2DModel, batch: int) -> Comparison:
    config, device, dtype = transformer.config, transformer.device, transformer.dtype
    theirs = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), *[None] * 7)
    ours = RectifiedFlowPipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))
    context, pooled = (NUM_TOKENS, config.joint_attention_dim), (config.pooled_projection_dim,)
    shapes = {"prompt_embeds": context, "pooled_prompt_embeds": pooled}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    conditions = {
        name: torch.randn(batch, *shape, generator=generator(number)).to(device, dtype)
        for number, (name, shape) in enumerate(shapes.items())
    }
    size = (batch, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(size, generator=generator(len(shapes))).to(device, dtype)
    arguments = {
        **conditions,
        "latents": noise,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "output_type": "latent",
    }
    inputs = {
        "hidden_states": noise.repeat(2, 1, 1, 1),
        "timestep": torch.full((2 * batch,), 500.0, device=device),
        "encoder_hidden_states": conditions["prompt_embeds"].repeat(2, 1, 1),
        "pooled_projections": conditions["pooled_prompt_embeds"].repeat(2, 1),
    }
    return _comparison("sd3", batch, transformer, inputs, *(_quiet(pipe, arguments) for pipe in (theirs, ours)))


def _dit(their_network: nn.Module, network: DiT, part: str, batch: int) -> Comparison:
    device, dtype, side = network.device, network.dtype, network.config.sample_size
    # One layer at full resolution: latents are decoded, which DiTPipeline always does, at no cost.
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1, mid_block_add_attention=False)
    vae = vae.eval().to(device, dtype)
    theirs = DiTPipeline(their_network, vae, DDIMScheduler())
    ours = ImageDiffusionPipeline(network, DDIMScheduler(), vae)
    labels = [(7 * index) % network.config.num_classes for index in range(batch)]
    arguments = {"guidance_scale": GUIDANCE_SCALE, "num_inference_steps": STEPS, "output_type": "pt"}
    arguments["class_labels"] = labels
    inputs = {
        "hidden_states": torch.randn(2 * batch, 4, side, side, generator=generator(0)).to(device, dtype),
        "timestep": torch.full((2 * batch,), 500, device=device),
        "class_labels": torch.tensor(2 * labels, device=device),
    }
    calls = (_quiet(pipe, arguments, seed=1) for pipe in (theirs, ours))
    return _comparison(part, batch, network, inputs, *calls)


def _of_diffusers(network: DiT) -> DiTTransformer2DModel:
    """The same network in diffusers, with the frequencies and the epsilon of the official code."""
    config = network.config
    with torch.device(network.device):
        other = DiTTransformer2DModel(
            num_attention_heads=config.num_heads, attention_head_dim=config.width // config.num_heads,
            out_channels=config.out_channels, num_layers=config.num_layers, sample_size=config.sample_size,
            norm_eps=1e-6,
        )  # fmt: skip
    other.load_state_dict(to_original(network, part="diffusers"))
    for block in other.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return other.eval().to(network.dtype)


def _quiet(pipe, arguments: dict, seed: int | None = None) -> Callable[[], tuple[None, Tensor]]:
    pipe.set_progress_bar_config(disable=True)

    def call() -> tuple[None, Tensor]:
        draws = {} if seed is None else {"generator": generator(seed)}
        return None, pipe(**arguments, **draws).images

    return call


def _comparison(
    part: str, batch: int, network: nn.Module, inputs: dict, plain: Callable, optimised: Callable
) -> Comparison:
    def passes() -> None:
        for _ in range(STEPS):
            network(**inputs)

    return Comparison(part, batch, plain, optimised, transformer=passes, dtype=network.dtype)
