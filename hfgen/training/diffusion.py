"""The settings of examples/train_diffusion.py, its U-Net and its scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusers import UNet2DModel

from hfgen.models.generators.dit import DiT
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler
from hfgen.training.config import flag
from hfgen.training.latents import LatentTrainingConfig


@dataclass(kw_only=True)
class DiffusionTrainingConfig(LatentTrainingConfig):
    """The settings of a run that trains a diffusion model. The help text of each field is its documentation."""

    learning_rate: float = flag(1e-3, "peak learning rate", group="optimisation")
    weight_decay: float = flag(0.0, "decoupled weight decay of matrices and convolutions", group="optimisation")

    model: Literal["unet", "dit"] = flag("unet", "diffusers' UNet2DModel, or DiT")
    class_dropout: float = flag(0.1, "probability of training an image without its class, for guidance")
    patch_size: int = flag(4, "dit: side of a patch of pixels or latents", least=1)
    num_layers: int = flag(4, "dit: transformer blocks", least=1)
    width: int = flag(128, "dit: width of the model", least=1)
    num_heads: int = flag(4, "dit: attention heads", least=1)
    channels: tuple[int, ...] = flag(
        (16, 32, 64), "unet: channels of each level; every next one halves the sides", least=1
    )
    layers_per_block: int = flag(1, "unet: residual blocks of a level", least=1)
    attention_levels: tuple[int, ...] = flag((2,), "unet: levels with attention, 0 is the finest")
    attention_head_dim: int = flag(32, "unet: channels of an attention head", least=1)
    norm_num_groups: int = flag(8, "unet: groups of the norms", least=1)
    dropout: float = flag(0.0, "unet: dropout of the residual blocks")

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = flag(
        "epsilon", "what the model predicts: the noise, v, or the clean data"
    )
    learned_variance: bool = flag(False, "predict a variance too, by the variational bound")
    snr_gamma: float | None = flag(None, "min-SNR weights of the squared errors with this gamma (5 in the paper)")
    num_train_timesteps: int = flag(1000, "timesteps of the diffusion", least=1)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = flag(
        "linear", "noise schedule: DDPM's, latent diffusion's, or the cosine one"
    )
    beta_start: float = flag(1e-4, "first beta of linear and scaled_linear")
    beta_end: float = flag(0.02, "last beta of linear and scaled_linear")

    sampler: Literal["ddim", "ddpm"] = flag("ddim", "sampling rule of the result: deterministic or ancestral")
    num_inference_steps: int = flag(50, "its steps")
    guidance_scale: float = flag(2.0, "guidance of the validation samples, 1 is off")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"--class_dropout is {self.class_dropout}; it must be between 0 and 1.")
        if not 1 <= self.num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"--num_inference_steps is {self.num_inference_steps}; it must be between 1 and the "
                f"{self.num_train_timesteps} of --num_train_timesteps."
            )
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"--snr_gamma is {self.snr_gamma}; it must be positive, or 'none'.")
        if self.class_dropout == 0 and self.guidance_scale != 1:
            raise ValueError("--class_dropout 0 trains no unconditional class, so --guidance_scale must be 1.")
        if self.model != "unet":
            return
        unknown = [level for level in self.attention_levels if not 0 <= level < len(self.channels)]
        if unknown:
            raise ValueError(
                f"--attention_levels has {unknown}; --channels has the levels 0 to {len(self.channels) - 1}."
            )
        wrong = [width for width in self.channels if width % self.norm_num_groups]
        if wrong:
            raise ValueError(
                f"--channels has {wrong}; they must be multiples of --norm_num_groups, {self.norm_num_groups}."
            )
        # The middle of the network, at the last level, always has attention.
        attended = [self.channels[level] for level in (*self.attention_levels, len(self.channels) - 1)]
        wrong = [width for width in attended if width % self.attention_head_dim]
        if wrong:
            raise ValueError(
                f"--channels has {wrong} where there is attention; they must be multiples of --attention_head_dim, "
                f"{self.attention_head_dim}."
            )


def diffusion_network(
    config: DiffusionTrainingConfig, channels: int, side: int, num_classes: int
) -> UNet2DModel | DiT:
    """The new network of a run, for samples (B, ``channels``, ``side``, ``side``).

    The U-Net is that of guided diffusion (arXiv 2105.05233): residual blocks modulated by time and class, which also
    change the resolution. Its last class embedding stands for no class.

    Raises:
        ValueError: the U-Net cannot halve ``side`` so often.
    """
    out_channels = channels * (1 + config.learned_variance)
    if config.model == "dit":
        return DiT(
            sample_size=side,
            patch_size=config.patch_size,
            in_channels=channels,
            out_channels=out_channels,
            num_classes=num_classes,
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
        )
    halvings = len(config.channels) - 1
    if side % 2**halvings:
        raise ValueError(f"--channels has {halvings + 1} levels, which samples of side {side} cannot be halved for.")
    kinds = ["Attn" if level in config.attention_levels else "Resnet" for level in range(halvings + 1)]
    down = {"Attn": "AttnDownBlock2D", "Resnet": "ResnetDownsampleBlock2D"}
    up = {"Attn": "AttnUpBlock2D", "Resnet": "ResnetUpsampleBlock2D"}
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=config.channels,
        down_block_types=tuple(down[kind] for kind in kinds),
        up_block_types=tuple(up[kind] for kind in reversed(kinds)),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        layers_per_block=config.layers_per_block,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        attn_norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
        num_class_embeds=num_classes + 1,
    )


def diffusion_scheduler(config: DiffusionTrainingConfig) -> RespacedDDPMScheduler:
    """The diffusion of a run, and the sampling rule of its result. Predicted pixels are clipped, latents are not."""
    return RespacedDDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        reverse_variance="learned_range" if config.learned_variance else "fixed_small",
        clip_sample=config.vae is None,
        algorithm=config.sampler,
        respacing=str(config.num_inference_steps),
    )
