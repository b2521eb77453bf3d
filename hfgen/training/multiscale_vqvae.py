"""The settings of examples/train_multiscale_vqvae.py (VAR's tokenizer, arXiv 2404.02905)."""

from __future__ import annotations

from dataclasses import dataclass

from hfgen.training.config import TrainingConfig, flag


@dataclass(kw_only=True)
class MultiScaleVQVAETrainingConfig(TrainingConfig):
    """The settings of a run that trains the tokenizer. The help text of each field is its documentation."""

    learning_rate: float = flag(1e-3, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.005, "decoupled weight decay of convolutions", group="optimisation")

    num_codes: int = flag(256, "size of the codebook", least=1)
    latent_channels: int = flag(16, "channels of the latents and of each code", least=1)
    base_channels: int = flag(32, "width at full resolution", least=1)
    channel_multipliers: tuple[int, ...] = flag(
        (1, 2, 2), "width of each level; all but the last halve the size", least=1
    )
    layers_per_block: int = flag(2, "residual blocks per level", least=1)
    norm_num_groups: int = flag(8, "groups of the group normalisations; divides every width", least=1)
    patch_nums: tuple[int, ...] = flag(
        (1, 2, 3, 5, 8), "side of each scale; last = resolution / downsampling", least=1
    )
    num_residual_convs: int = flag(4, "convolutions shared by the scales; 0 gives each scale its own")
    dropout: float = flag(0.0, "dropout in the residual blocks")
    restart_after: int = flag(0, "revive codes unused for N steps; 0 never")
    quantizer_dropout: float = flag(0.0, "share of images decoded from a random number of scales")

    l1_weight: float = flag(0.2, "weight of mean |x - x'|")
    l2_weight: float = flag(1.0, "weight of mean (x - x')^2")
    codebook_weight: float = flag(1.0, "weight of the quantizer's loss")
    commitment_weight: float = flag(0.25, "weight of the encoder's term inside the quantizer's loss")
    perceptual_weight: float = flag(0.0, "weight of LPIPS; 0 switches it off")
    perceptual_source: str | None = flag(
        None, "folder or Hub id with the LPIPS weights; needed if its weight is not 0"
    )
    adversarial_weight: float = flag(0.0, "weight of the PatchGAN loss; 0 trains no discriminator")
    discriminator_start: int = flag(0, "first step with the adversarial loss")
    discriminator_layers: int = flag(2, "stride-2 layers of the discriminator")
    discriminator_channels: int = flag(64, "width of its first layer", least=1)
    discriminator_learning_rate: float | None = flag(None, "its peak learning rate; by default the same")

    def __post_init__(self) -> None:
        super().__post_init__()
        factor, last = 2 ** (len(self.channel_multipliers) - 1), self.patch_nums[-1]
        if last * factor != self.resolution:
            fitting = (
                f"end --patch_nums with {self.resolution // factor}"
                if self.resolution % factor == 0
                else (f"choose a multiple of {factor}")
            )
            raise ValueError(
                f"--resolution is {self.resolution}, but --patch_nums ends with {last} and the "
                f"{len(self.channel_multipliers)} levels of --channel_multipliers divide images by {factor}: give "
                f"--resolution {last * factor}, or {fitting}."
            )
