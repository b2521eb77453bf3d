"""The methods that benchmarks/paradigms.py compares, and their training with the scripts of examples/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainings import Training

LATENTS = "latents"  # the folder of the cache
ADAMW_RATIO = 0.2  # learning rate of AdamW, which trains U-Nets and the outer layers of DiT, to that of Muon


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        title: its name in tables.
        script: of examples/, without ending.
        flags: of the script, in addition to those of all methods.
        parent: the method whose result it starts from, or whose pairs it learns from.
        samplers: names of ``paradigms_sampling.SAMPLERS``.
        few: it is made for few steps, so that more are not measured.
    """

    title: str
    script: str
    flags: Mapping[str, object]
    parent: str | None = None
    samplers: tuple[str, ...] = ("euler",)
    few: int | None = None


DIFFUSION = ("ddim", "dpm-solver++")


# Noise alone says little about latents where they are nearly all noise, and latents cannot be clipped as pixels can:
# so v is predicted (arXiv 2202.00512), under the cosine schedule (arXiv 2102.09672), which spends less time there.
_DIFFUSION = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}


def _unet(channels: str, head_dim: int) -> dict[str, object]:
    return _DIFFUSION | {"model": "unet", "channels": channels, "attention_head_dim": head_dim}


def _dit(width: int) -> dict[str, object]:
    return _DIFFUSION | {"model": "dit", "width": width}


# U-Net and DiT have three sizes of about equal numbers of parameters: 0.14, 0.42 and 1.0 million.
METHODS = {
    "unet": Method("U-Net, diffusion", "train_diffusion", _unet("16,40,72", 24), samplers=DIFFUSION),
    "dit": Method("DiT, diffusion", "train_diffusion", _dit(112), samplers=DIFFUSION),
    "flow": Method("DiT, rectified flow", "train_rectified_flow", {"width": 112}, samplers=("euler", "heun")),
    "reflow": Method("2-rectified flow", "reflow", {"mode": "reflow"}, parent="flow"),
    "distilled": Method("2-rectified flow, distilled", "reflow", {"mode": "distill"}, parent="reflow", few=1),
    "mean_flow": Method("MeanFlow", "train_mean_flow", {"width": 112}, samplers=("mean-flow",), few=4),
    "matching": Method(
        "trajectory matching, independent pairs",
        "train_mean_flow",
        {"width": 112, "loss": "trajectory_matching"},
        samplers=("mean-flow",),
        few=1,
    ),
    "matching_pairs": Method(
        "trajectory matching, pairs of the flow",
        "train_mean_flow",
        {"width": 112, "loss": "trajectory_matching"},
        parent="reflow",
        samplers=("mean-flow",),
        few=1,
    ),
    "unet_s": Method("U-Net, diffusion, small", "train_diffusion", _unet("8,16,24", 24), samplers=("ddim",)),
    "unet_m": Method("U-Net, diffusion, medium", "train_diffusion", _unet("8,24,48", 24), samplers=("ddim",)),
    "dit_s": Method("DiT, diffusion, small", "train_diffusion", _dit(40), samplers=("ddim",)),
    "dit_m": Method("DiT, diffusion, medium", "train_diffusion", _dit(72), samplers=("ddim",)),
}


@dataclass(frozen=True)
class TrainingSettings:
    """What all methods share.

    Attributes:
        budget: optimizer steps of each method; reflow and distillation spend theirs on top of their parent's.
        batch_size: images per step.
        vae: folder of the KL autoencoder of all methods.
        images: to train on.
        resolution: side of the images in pixels.
        patch_size: of the transformers, in latents.
        learning_rate: peak of the cosine schedule, for matrices; a fifth of it for the rest.
        guidance: w; pairs are made with it and MeanFlow learns it.
        num_pairs: of noise and image, for reflow and distillation.
        pair_steps: Euler steps that make them.
    """

    budget: int
    batch_size: int
    vae: Path
    images: int
    resolution: int
    patch_size: int
    learning_rate: float
    guidance: float
    num_pairs: int
    pair_steps: int


def with_parents(names: Sequence[str]) -> list[str]:
    """The methods and those that they need, each after its parent."""
    ordered: list[str] = []
    for name in names:
        chain = [name]
        while METHODS[chain[-1]].parent is not None:
            chain.append(METHODS[chain[-1]].parent)
        ordered += [each for each in reversed(chain) if each not in ordered]
    return ordered


def training_flags(name: str, seed: int, settings: TrainingSettings, runs: Path) -> dict[str, object]:
    """The flags of a method's script, without ``--output_dir``."""
    method = METHODS[name]
    flags = dict(method.flags) | {
        "seed": seed,
        "max_train_steps": settings.budget,
        "batch_size": settings.batch_size,
        "lr_schedule": "cosine",
        "warmup_steps": settings.budget // 20,
        "ema_decay": 0.99,
        "weight_decay": 0.0,
        "checkpointing_steps": 0,
        "validation_steps": 0,
        "num_validation_images": 24,
        "logging_steps": max(settings.budget // 20, 1),
    }
    if method.script == "reflow":
        teacher = run_folder(runs, method.parent, seed)
        # The guidance of the first pairs is learned with them.
        guidance = settings.guidance if method.parent == "flow" else 1.0
        flags |= {
            "model": teacher / "final",
            "pairs": pairs_folder(runs, name, seed),
            "num_pairs": settings.num_pairs,
            "num_inference_steps": settings.pair_steps,
            "guidance_scale": guidance,
        }
    else:
        flags |= {"vae": settings.vae, "resolution": settings.resolution, "limit": settings.images}
        flags["num_inference_steps"] = 1 if "mean" in method.script else 16
        flags |= {"pairs": pairs_folder(runs, method.parent, seed)} if method.parent else {"cache": runs / LATENTS}
    if flags.get("model") == "unet":
        flags["learning_rate"] = ADAMW_RATIO * settings.learning_rate
    else:
        flags |= {"optimizer": "muon", "learning_rate": settings.learning_rate, "adamw_ratio": ADAMW_RATIO}
        if method.script != "reflow":
            flags["patch_size"] = settings.patch_size
    if name == "mean_flow":
        flags["kappa"] = 1 - 1 / settings.guidance  # with omega 1, a guidance of 1 / (1 - kappa)
    return flags


def run_name(name: str, seed: int) -> str:
    """The folder, in that of all runs, where a method with a seed is trained."""
    return f"seed-{seed}/{name}"


def run_folder(runs: Path, name: str, seed: int) -> Path:
    return runs / run_name(name, seed)


def pairs_folder(runs: Path, name: str, seed: int) -> Path:
    """Where the pairs that a method learns from are."""
    return runs / f"seed-{seed}" / f"{name}-pairs"


def latents(settings: TrainingSettings) -> Training:
    """The cache of latents, which all methods and seeds share."""
    flags = {"tokenizer": settings.vae, "resolution": settings.resolution, "limit": settings.images}
    return Training(LATENTS, "cache_latents", flags, result="cache.json")


def training(name: str, seed: int, settings: TrainingSettings, runs: Path) -> Training:
    """The run of a method's script."""
    method = METHODS[name]
    before = latents(settings) if method.parent is None else training(method.parent, seed, settings, runs)
    flags = training_flags(name, seed, settings, runs)
    return Training(run_name(name, seed), method.script, flags, (before,))
