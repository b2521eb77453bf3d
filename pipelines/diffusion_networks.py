"""What the diffusion pipeline asks of its components: a DiT or a U-Net, a discrete scheduler, an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import DDPMScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from hfgen.models.generators.dit import DiT
from hfgen.pipelines.latents import LatentDecoder, check_channels, check_guidance_channels
from hfgen.sampling.gaussian_diffusion import PREDICTION_TYPES
from hfgen.schedulers.respaced_ddpm import RespacedDDPMScheduler


# Told apart by their configurations, which a compiled network still has.
def number_of_classes(transformer: DiT | UNet2DModel) -> int | None:
    """Classes without that for no class, whose label is this number; None if the network has none."""
    config = transformer.config
    if "num_class_embeds" not in config:
        return config.num_classes
    return None if config.num_class_embeds is None else config.num_class_embeds - 1


def out_channels(transformer: DiT | UNet2DModel) -> int:
    """Channels of the output, which are those of the input or twice as many."""
    return transformer.config.out_channels or transformer.config.in_channels


def latent_multiple(transformer: DiT | UNet2DModel) -> int:
    """The latents' sides are multiples of it."""
    if "patch_size" in transformer.config:
        return transformer.config.patch_size
    return 2 ** (len(transformer.config.block_out_channels) - 1)


def default_scheduler(transformer: DiT | UNet2DModel, prediction_type: str) -> RespacedDDPMScheduler:
    """That of the released DiT, with the variance that the network has."""
    learned = out_channels(transformer) == 2 * transformer.config.in_channels
    return RespacedDDPMScheduler(
        respacing="250",
        prediction_type=prediction_type,
        reverse_variance="learned_range" if learned else "fixed_small",
    )


def uses_variance(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler takes the second half of the channels."""
    if isinstance(scheduler, RespacedDDPMScheduler):
        return scheduler.config.reverse_variance == "learned_range"
    return scheduler.config.get("variance_type") in ("learned", "learned_range")


def check_components(
    transformer: DiT | UNet2DModel,
    vae: LatentDecoder | None,
    class_names: Sequence[str] | None,
    guidance_channels: int | None,
) -> None:
    """Raise a ``ValueError`` for components that do not make a pipeline."""
    if not isinstance(transformer, (DiT, UNet2DModel)):
        raise ValueError(f"transformer is a {type(transformer).__name__}, expected a DiT or a UNet2DModel.")
    config = transformer.config
    if isinstance(transformer, DiT) and (config.reverse_time or config.has_duration):
        raise ValueError(
            "This DiT is no diffusion network but predicts a velocity (SiT, MeanFlow): use RectifiedFlowPipeline or "
            "MeanFlowPipeline."
        )
    channels = config.in_channels
    if out_channels(transformer) not in (channels, 2 * channels):
        raise ValueError(
            f"The network has {channels} input and {out_channels(transformer)} output channels; a diffusion network "
            f"has {channels}, or {2 * channels} with a learned variance."
        )
    check_channels(vae, channels)
    check_guidance_channels(guidance_channels, channels)
    num_classes = number_of_classes(transformer)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"Got {len(class_names)} class_names for {num_classes} classes; give one each.")


def check_scheduler(scheduler: SchedulerMixin, transformer: DiT | UNet2DModel, prediction_type: str | None) -> None:
    """Raise a ``ValueError`` for a scheduler of another kind of network."""
    name, config = type(scheduler).__name__, scheduler.config
    given = config.get("prediction_type")
    if given not in PREDICTION_TYPES:
        raise ValueError(
            f"{name} has prediction_type {given!r}, expected one of {', '.join(PREDICTION_TYPES)}: this pipeline is "
            "for diffusion; networks that predict a velocity and their schedulers go into a RectifiedFlowPipeline."
        )
    if given != prediction_type:
        raise ValueError(
            f"The network predicts {prediction_type!r}, but the {name} expects {given!r}; make it with "
            f"from_config(..., prediction_type={prediction_type!r})."
        )
    if not uses_variance(scheduler):
        return
    if not isinstance(scheduler, (RespacedDDPMScheduler, DDPMScheduler)):
        raise ValueError(
            f"{name} with variance_type {config.variance_type!r} takes the network's first three channels for the "
            "prediction; make it with from_config(..., variance_type=None), since its steps use no variance."
        )
    if out_channels(transformer) == transformer.config.in_channels:
        setting = "reverse_variance" if isinstance(scheduler, RespacedDDPMScheduler) else "variance_type"
        raise ValueError(
            f"{name} has {setting}={config[setting]!r}, but the network predicts no variance; use 'fixed_small'."
        )
