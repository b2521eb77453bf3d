"""The settings of examples/train_autoencoder_kl.py, and its model: diffusers' AutoencoderKL with its posterior."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from hfgen.data.transforms import to_pixels
from hfgen.training.batches import validation_images
from hfgen.training.config import TrainingConfig, flag


@dataclass(kw_only=True)
class AutoencoderKLTrainingConfig(TrainingConfig):
    """The settings of a run that trains a KL autoencoder. The help text of each field is its documentation."""

    batch_size: int = flag(16, "images per process and micro-step", group="optimisation")
    learning_rate: float = flag(1e-3, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.0, "decoupled weight decay of convolutions", group="optimisation")

    latent_channels: int = flag(4, "channels of the latents", least=1)
    channels: tuple[int, ...] = flag((16, 32, 32), "channels of each level; every next one halves the sides", least=1)
    layers_per_block: int = flag(1, "residual blocks of a level of the encoder; the decoder has one more", least=1)
    norm_num_groups: int = flag(8, "groups of the group normalisations; divides all channels", least=1)
    mid_attention: bool = flag(True, "attention between the pixels of the last level")

    reconstruction: Literal["l1", "l2"] = flag("l1", "absolute or squared error of the pixels")
    kl_weight: float = flag(1e-6, "weight of the divergence; both are sums over an image")
    perceptual_weight: float = flag(0.0, "weight of LPIPS; 0 switches it off")
    perceptual_source: str | None = flag(
        None, "folder or Hub id with the LPIPS weights; needed if its weight is not 0"
    )
    adversarial_weight: float = flag(0.0, "weight of the PatchGAN loss; 0 trains no discriminator")
    discriminator_start: int = flag(0, "first step with the adversarial loss")
    discriminator_layers: int = flag(2, "stride-2 layers of the discriminator", least=1)
    discriminator_channels: int = flag(64, "width of its first layer", least=1)
    discriminator_learning_rate: float | None = flag(None, "its peak learning rate; by default the same")

    num_scaling_images: int = flag(
        1024, "validation images that the scale of the latents is measured on at the end", least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [width for width in self.channels if width % self.norm_num_groups]
        if wrong:
            raise ValueError(
                f"--channels has {wrong}; they must be multiples of --norm_num_groups, {self.norm_num_groups}."
            )
        factor = 2 ** (len(self.channels) - 1)
        if self.resolution % factor:
            raise ValueError(f"--resolution {self.resolution} cannot be halved {len(self.channels) - 1} times.")
        if self.perceptual_weight > 0 and self.perceptual_source is None:
            raise ValueError("--perceptual_weight needs --perceptual_source: where the LPIPS weights are.")


class PosteriorAutoencoderKL(AutoencoderKL):
    """An ``AutoencoderKL`` whose training pass also returns the posterior, which its loss needs."""

    def forward(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruct pixels (B, 3, H, W) in [-1, 1] from a sample of the posterior.

        Returns:
            The reconstruction, and mean and log-variance of the posterior (B, 2 C, h, w).
        """
        posterior = self.encode(pixels).latent_dist
        return self.decode(posterior.sample(generator)).sample, posterior.parameters

    def plain(self, scaling_factor: float) -> AutoencoderKL:
        """The model as diffusers knows it, with another scale of the latents; it shares no memory with this one."""
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        model = AutoencoderKL(**{**config, "scaling_factor": scaling_factor}).to(self.device)
        model.load_state_dict(self.state_dict())
        return model.eval()


def new_autoencoder(config: AutoencoderKLTrainingConfig) -> PosteriorAutoencoderKL:
    """The new model of a run."""
    levels = len(config.channels)
    return PosteriorAutoencoderKL(
        latent_channels=config.latent_channels,
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_attention,
        sample_size=config.resolution,
        scaling_factor=1.0,  # measured at the end
    )


@torch.no_grad()
def measure_scaling_factor(model: AutoencoderKL, config: AutoencoderKLTrainingConfig) -> float:
    """1 / standard deviation of the latents of validation images, as latent diffusion does (arXiv 2112.10752, G).

    The latents are means of their posteriors plus its variance, which is what sampling from it adds.
    """
    pixels = to_pixels(validation_images(replace(config, num_validation_images=config.num_scaling_images)))
    means, variances = [], []
    for part in pixels.split(config.batch_size):
        posterior: DiagonalGaussianDistribution = model.encode(part.to(model.device)).latent_dist
        means.append(posterior.mean.double().cpu())
        variances.append(posterior.var.double().cpu())
    variance = torch.cat(means).var(correction=0) + torch.cat(variances).mean()
    return float(variance.rsqrt())
