"""The trainings of benchmarks/unified.py: train_transfusion.py in both modes, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainings import Runs, Training

# Codes by the noise in the latents, whose standard deviation is 1.
DISCRETE = {f"discrete-{sigma:g}": sigma for sigma in (0.0, 0.1, 0.3, 1.0)}
ROBUST_SIGMA = 0.5  # of the decoder that is fine-tuned without codes: noise half as strong as the latents
CODES = 256

DATA = {"dataset": "shapes:single"}
SCHEDULE = {"lr_schedule": "cosine", "ema_decay": 0.99, "checkpointing_steps": 0, "validation_steps": 0}
# Captions are read off images with little noise, in which shapes of a few pixels can be seen.
TRANSFORMER = {
    "num_layers": 4,
    "width": 96,
    "batch_size": 128,
    "caption_first_share": 0.6,
    "image_first_max_timestep": 100,
    "image_weight": 10,
}
UNET = {"image_adapter": "unet"}

# What is different in each model of continuous images; the number is the side of a patch of latents.
CONTINUOUS: dict[str, Mapping[str, object]] = {
    "linear-1": {"patch_size": 1},
    "linear-2": {"patch_size": 2},
    "linear-4": {"patch_size": 4},
    "linear-2-causal": {"patch_size": 2, "causal_images": None},
    "unet-2": UNET | {"patch_size": 2, "adapter_channels": "32,64"},
    "unet-4": UNET | {"patch_size": 4, "adapter_channels": "32,64,64"},
    "unet-2-causal": UNET | {"patch_size": 2, "adapter_channels": "32,64", "causal_images": None},
}
# Text alone, and text beside images: every second batch is text.
TEXT = {
    "text": {"patch_size": 2, "text_only_share": 1},
    "joint": {"patch_size": 2, "text_only_share": 0.5},
}


@dataclass(frozen=True)
class Plan:
    """What all trainings share.

    Attributes:
        runs: their folder.
        vae: folder of the KL autoencoder of all models, with 8 x 8 latents.
        steps: of a transformer.
        decoder_steps: of each fine-tuning of its decoder.
        validation_images: of a training; text alone is measured on their captions.
    """

    runs: Runs
    vae: Path
    steps: int
    decoder_steps: int
    validation_images: int

    def model(self, name: str, seed: int) -> Training:
        """One of the models that are compared."""
        if name == "robust":  # the decoder alone, without codes
            return self._fine_tuned(name, seed, {"sigma": ROBUST_SIGMA})
        if name not in DISCRETE:
            return self._transformer(name, seed, {"vae": self.vae} | dict((CONTINUOUS | TEXT)[name]))
        codes = self.noisy_codes(DISCRETE[name], seed)
        final = self.runs.final(codes)
        flags = {"image_mode": "discrete", "vae": final, "quantizer": final / "quantizer"}
        return self._transformer(name, seed, flags, (codes,))

    def noisy_codes(self, sigma: float, seed: int) -> Training:
        """Codes of latents with this noise, and a decoder that was fine-tuned on them."""
        return self._fine_tuned(f"codes-{sigma:g}", seed, {"sigma": sigma, "codebook_size": CODES})

    def _transformer(
        self, name: str, seed: int, flags: Mapping[str, object], after: tuple[Training, ...] = ()
    ) -> Training:
        flags = TRANSFORMER | DATA | self._schedule(seed, self.steps) | dict(flags)
        return Training(f"seed-{seed}/{name}", "train_transfusion", flags, after)

    def _fine_tuned(self, name: str, seed: int, flags: Mapping[str, object]) -> Training:
        flags = DATA | {"vae": self.vae} | self._schedule(seed, self.decoder_steps) | dict(flags)
        return Training(f"seed-{seed}/{name}", "finetune_noise_robust_decoder", flags)

    def _schedule(self, seed: int, steps: int) -> dict[str, object]:
        return SCHEDULE | {
            "seed": seed,
            "max_train_steps": steps,
            "warmup_steps": steps // 20,
            "logging_steps": max(steps // 20, 1),
            "num_validation_images": self.validation_images,
        }


def chain(training: Training) -> list[Training]:
    """What has to be trained for a training, in order, and the training itself."""
    before = {each.name: each for parent in training.after for each in chain(parent)}
    return [*before.values(), training]
