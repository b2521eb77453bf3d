"""The trainings behind docs/tokens.md: the example scripts with these settings, each once, one after another."""

from __future__ import annotations

from pathlib import Path

from trainings import Runs, Training

NUM_CODES = 512
SINGLE_PATCH_SIZE = 8
PROXY_PATCH_SIZE = 4  # the VQGAN's pixels per code, which stage 1 shares

COMMON = {
    "batch_size": 32,
    "lr_schedule": "cosine",
    "ema_decay": 0.995,
    "l1_weight": 0.05,
    "num_codes": NUM_CODES,
    "checkpointing_steps": 0,
    "validation_steps": 0,
    "num_validation_images": 32,
    "logging_steps": 50,
}
TITOK = COMMON | {
    "optimizer": "muon",
    "learning_rate": 1e-2,
    "adamw_ratio": 0.1,
    "latent_channels": 4,
    "codebook_update": "clustering",
    "quantizer_weight": 0.1,
}
VQGAN = COMMON | {
    "learning_rate": 2.5e-3,
    "max_grad_norm": 5,
    "entropy_weight": 0,
    "restart_after": 100,
    "quantizer_weight": 0.08,
}
PROXY_VQGAN = {"base_channels": 16, "channel_multipliers": "1,2,2"}
# Grids with nearly the parameters of a TiTok with as many tokens (the page states both).
GRIDS = {
    4: {"base_channels": 24, "channel_multipliers": "1,1,2,2,4"},
    16: {"base_channels": 24, "channel_multipliers": "1,1,3,4"},
}


def titok(tokens: int, steps: int, patch_size: int = SINGLE_PATCH_SIZE, seed: int = 0) -> Training:
    """A TiTok in a single stage."""
    settings = TITOK | {"stage": "single", "num_latent_tokens": tokens, "patch_size": patch_size}
    name = f"titok-{tokens}-patch{patch_size}-seed{seed}"
    return Training(name, "train_titok", settings | _length(steps, seed, 0.2))


def grid(tokens: int, steps: int) -> Training:
    """A MaskGIT-VQGAN with a square of so many codes."""
    return Training(f"grid-{tokens}", "train_maskgit_vqgan", VQGAN | GRIDS[tokens] | _length(steps, 0, 0.4))


def proxy_vqgan(steps: int) -> Training:
    """The MaskGIT-VQGAN whose codes stage 1 predicts."""
    return Training("proxy-vqgan", "train_maskgit_vqgan", VQGAN | PROXY_VQGAN | _length(steps, 0, 0.4))


def two_stages(
    tokens: int, steps: int, seed: int, vqgan: Path, after: tuple[Training, ...], runs: Runs
) -> tuple[Training, Training]:
    """Stage 1 on the codes of ``vqgan`` and stage 2, ``steps`` each."""
    # The weight of the quantizer's loss beside the cross-entropy is the published one; stage 2 has none.
    shared = TITOK | {"num_latent_tokens": tokens, "patch_size": PROXY_PATCH_SIZE, "quantizer_weight": 1.0}
    shared |= {"vqgan": vqgan} | _length(steps, seed, 0.2)
    first = Training(f"stage1-{tokens}-seed{seed}", "train_titok", shared | {"stage": 1}, after)
    second = shared | {"stage": 2, "stage1": runs.final(first)}
    return first, Training(f"stage2-{tokens}-seed{seed}", "train_titok", second, (first,))


def _length(steps: int, seed: int, warmup: float) -> dict[str, int]:
    return {"max_train_steps": steps, "warmup_steps": int(warmup * steps), "seed": seed}
