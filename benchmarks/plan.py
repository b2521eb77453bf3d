"""What training a published model takes: memory per GPU and time per epoch, computed and not measured.

    python benchmarks/plan.py
    python benchmarks/plan.py --model var-d30 --gpus 8 64 256 --batch 8 --peak-tflops 989 --mfu 0.4

Parameters are counted on models built on the meta device, which takes no memory. The assumptions, with their sources,
are in docs/scaling.md. A batch is given per GPU; the tables say what the plan needs, not what is fastest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from helping import HelpFormatter, check_counts, check_output, run
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hfgen import VARTransformer

GIB = 2**30
IMAGENET = 1_281_167

# Bytes per parameter: bfloat16 compute copies of weights and gradients beside float32 masters, as mixed precision
# with torch.optim.AdamW keeps them.
MASTER, GRADIENT, MOMENTS, EMA, COMPUTE = 4, 4, 8, 4, 2


@dataclass(frozen=True)
class Plan:
    """A model and its recipe.

    Attributes:
        parameters: trained ones.
        frozen: parameters that are only read, in 2 bytes each: tokenizer or text encoders that run beside it.
        layers: transformer blocks; checkpointing keeps the input of each.
        width: of the tokens.
        tokens: per image, all that the blocks process.
        block_values: numbers per token that one block keeps for the backward pass, in units of ``width``.
        head_values: numbers per token kept outside of the blocks, such as the logits.
        images: per epoch.
        ema: whether the recipe averages the weights.
        embedding: parameters that are looked up and not multiplied.
    """

    parameters: int
    frozen: int
    layers: int
    width: int
    tokens: int
    block_values: float
    head_values: int
    images: int = IMAGENET
    ema: bool = False
    embedding: int = 0

    def activation_bytes(self, batch: int, checkpointing: bool, bytes_per_value: int = 2) -> float:
        """What the backward pass of ``batch`` images needs, beside the parameters.

        With checkpointing: the input of each block, and everything of one block while it is computed again.
        """
        block = self.block_values * self.width
        blocks = self.layers * self.width + block if checkpointing else self.layers * block
        return batch * self.tokens * (blocks + self.head_values) * bytes_per_value

    def flops(self, checkpointing: bool) -> float:
        """Forward and backward of one image: 6 per weight and token (Kaplan et al., arXiv 2001.08361), plus the two
        products of attention, 12 L N^2 C for N tokens; checkpointing runs the forward once more."""
        weights = 6 * (self.parameters - self.embedding) * self.tokens
        attention = 12 * self.layers * self.tokens**2 * self.width
        return (weights + attention) * (4 / 3 if checkpointing else 1)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def var_d30() -> Plan:
    """Tian et al., arXiv 2404.02905: the codes come from a frozen tokenizer of 109M parameters on the fly."""
    with torch.device("meta"):
        model = VARTransformer.from_preset("var-d30")
    return Plan(
        parameters=count(model),
        frozen=108_950_000,
        layers=model.config.num_layers,
        width=model.class_embed.embedding_dim,
        tokens=model.num_tokens,
        block_values=VAR_BLOCK_VALUES,
        head_values=2 * model.config.num_codes * 2,  # logits in float32 and their gradient
        # Class table, and the modulations, which see one vector per image and not every token.
        embedding=sum(x.numel() for name, x in model.named_parameters() if any(p in name for p in ONCE)),
    )


def llamagen_3b() -> Plan:
    """Sun et al., arXiv 2406.06525, at 384 pixels: 576 codes from a cache, one class token.

    transformers' Llama has LlamaGen's weights: RMSNorm, no biases, gated MLP; its table of classes is added here.
    """
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=3200,
        intermediate_size=8704,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        classes = nn.Embedding(1001, config.hidden_size)
    embedding = model.get_input_embeddings().weight.numel() + count(classes)
    hidden = config.intermediate_size / config.hidden_size
    return Plan(
        parameters=count(model) + count(classes),
        frozen=0,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        tokens=577,
        # Per block: inputs of two norms (2) and their results (2), q, k, v and their rotated q, k (5), the attended
        # values (1); gate, its SiLU, up and their product (4 hidden).
        block_values=10 + 4 * hidden,
        head_values=2 * config.vocab_size * 2,
        embedding=embedding,
    )


def titok_l() -> Plan:
    """Yu et al., arXiv 2406.07550, stage 1 of TiTok-L-32: two ViT-L, whose target codes a frozen MaskGIT-VQGAN gives.

    The layers follow the published sizes; :class:`hfgen.TiTok` with the preset titok-l-32 has the pixel decoder of
    stage 2 besides.
    """
    width, layers, grid, latents, code_dim, num_codes, proxy = 1024, 24, 16 * 16, 32, 12, 4096, 1024
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 16, 4 * width, activation="gelu", norm_first=True) for _ in range(layers)
        )
        shared = count(blocks) + 2 * 2 * width  # and two norms
        tables = width + (grid + 1) * width + latents * width  # class token, positions, positions of the latents
        encoder = shared + tables + count(nn.Conv2d(3, width, 16, 16)) + count(nn.Linear(width, code_dim))
        head = count(nn.Linear(width, 2 * width)) + count(nn.Linear(2 * width, proxy))
        decoder = shared + tables + width + count(nn.Linear(code_dim, width)) + head  # one more table: the mask token
    return Plan(
        parameters=encoder + decoder + latents * width + num_codes * code_dim,
        frozen=24_100_000,  # its encoder and codebook
        layers=2 * layers,
        width=width,
        tokens=1 + grid + latents,
        # Korthikanti et al., arXiv 2205.05198: 34 bytes per token and width, 2 of them dropout masks, which a ViT does
        # not have; and no softmax, which fused attention does not keep.
        block_values=16,
        head_values=2 * proxy * 2,
        ema=True,
        embedding=2 * tables,
    )


def mmdit_8b() -> Plan:
    """Esser et al., arXiv 2403.03206, as released in Stable Diffusion 3.5 large, at 1024 pixels from cached latents
    and text features: 4096 image tokens and 77 + 77 text tokens, each stream with weights of its own."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128,
            num_layers=38,
            num_attention_heads=38,
            attention_head_dim=64,
            caption_projection_dim=2432,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        )
    image, text = 4096, 154
    # A token passes the weights of its own stream, half of those of a block, and none of the modulations.
    other_stream = ("context", "add_", "added", ".norm1", "norm_out")
    per_token = sum(
        p.numel() for name, p in model.named_parameters() if not any(part in name for part in other_stream)
    )
    return Plan(
        parameters=count(model),
        frozen=0,
        layers=38,
        width=2432,
        tokens=image + text,
        # As the block of VAR, with q and k kept before and after their normalisation.
        block_values=VAR_BLOCK_VALUES,
        head_values=2 * 64,
        images=IMAGENET,
        ema=True,
        embedding=count(model) - per_token,
    )


# A VAR block keeps per token, in units of the width: the inputs of the two norms (2), the modulated results (2), the
# normalised ones that the scale multiplies (2), q, k, v (3), q and k of unit length (2), the attended values (1), the
# outputs of both branches, which the gates multiply (2), the hidden layer before and after GELU (8).
VAR_BLOCK_VALUES = 22
ONCE = ("modulation", "norm_out", "embed")  # parts of VAR that see one vector per image, and tables

MODELS: dict[str, Callable[[], Plan]] = {
    "var-d30": var_d30,
    "titok-l": titok_l,
    "llamagen-3b": llamagen_3b,
    "mmdit-8b": mmdit_8b,
}
PARALLELISMS = ("DDP", "FSDP2", "FSDP2 + checkpointing")


@dataclass(frozen=True)
class Estimate:
    """One row of the table; memory in bytes, time in seconds."""

    model: str
    parallelism: str
    gpus: int
    batch: int
    state: float
    activations: float
    total: float
    epoch: float


def estimate(name: str, plan: Plan, parallelism: str, gpus: int, batch: int, flops_per_second: float) -> Estimate:
    """Memory per GPU and time per epoch of a plan.

    DDP keeps everything on each GPU. FSDP2 slices masters, gradients, moments and average over the GPUs, and gathers
    one block at a time (this one and the next, in 2 bytes, and its gradients).
    """
    sharded = parallelism != "DDP"
    checkpointing = parallelism.endswith("checkpointing")
    per_parameter = MASTER + GRADIENT + MOMENTS + (EMA if plan.ema else 0)
    if sharded:
        gathered = 3 * COMPUTE * plan.parameters / plan.layers
        state = per_parameter * plan.parameters / gpus + gathered
    else:
        state = (per_parameter + COMPUTE) * plan.parameters
    state += COMPUTE * plan.frozen
    activations = plan.activation_bytes(batch, checkpointing)
    epoch = plan.images * plan.flops(checkpointing) / (gpus * flops_per_second)
    return Estimate(name, parallelism, gpus, batch, state, activations, state + activations, epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS), help="which recipes")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256], metavar="N", help="numbers of GPUs")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images per GPU and micro-step")
    parser.add_argument("--memory", type=float, default=80, metavar="GIB", help="of one GPU; rows above it are marked")
    parser.add_argument("--peak-tflops", type=float, default=989, help="dense bfloat16 peak of a GPU (H100 SXM: 989)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    check_counts(parser, arguments, ("batch", "gpus"))
    check_output(parser, "--json", arguments.json)
    for name in ("memory", "peak_tflops"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be positive")
    if not 0 < arguments.mfu <= 1:
        parser.error(f"--mfu is {arguments.mfu}; it must be in (0, 1]")

    rows = []
    for name in arguments.model:
        plan = MODELS[name]()
        print(f"\n{name}: {plan.parameters / 1e6:,.1f}M parameters, {plan.tokens} tokens per image, ", end="")
        print(f"{plan.flops(False) / 1e12:.2f} TFLOP per image and step")
        print("| parallelism | GPUs | batch per GPU | state GiB | activations GiB | total GiB | hours per epoch |")
        print("|---|---|---|---|---|---|---|")
        for parallelism in PARALLELISMS:
            for gpus in arguments.gpus:
                rate = arguments.peak_tflops * 1e12 * arguments.mfu
                row = estimate(name, plan, parallelism, gpus, arguments.batch, rate)
                rows.append(row)
                mark = " (too much)" if row.total > arguments.memory * GIB else ""
                print(
                    f"| {parallelism} | {gpus} | {row.batch} | {row.state / GIB:.1f} | {row.activations / GIB:.1f} | "
                    f"{row.total / GIB:.1f}{mark} | {row.epoch / 3600:.3f} |"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    run(main)
