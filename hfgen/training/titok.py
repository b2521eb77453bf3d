"""The models of examples/train_titok.py, its settings, and those that may spoil a training without an error.

TiTok is trained in two stages by arXiv 2406.07550 and in a single one by arXiv 2501.07730.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffusers.configuration_utils import register_to_config

from hfgen import MaskGITVQGAN, TiTok
from hfgen.losses.lecam import LeCam
from hfgen.models.layers.blur_discriminator import BlurPatchDiscriminator
from hfgen.training.config import TrainingConfig, flag


@dataclass(kw_only=True)
class TiTokTrainingConfig(TrainingConfig):
    """The settings of a run that trains a TiTok. The help text of each field is its documentation."""

    # With AdamW alone a small TiTok takes several times as many steps to tell shapes apart.
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "muon"] = flag(
        "muon", "as in the other scripts; the publications use adamw", group="optimisation"
    )
    learning_rate: float = flag(1e-2, "peak learning rate; adamw needs a tenth", group="optimisation")
    adamw_ratio: float = flag(
        0.1, "with muon: learning rate of what it leaves to AdamW / --learning_rate", group="optimisation"
    )
    lr_schedule: Literal["constant", "cosine", "linear", "lin0"] = flag(
        "cosine", "course of the learning rate after the warm-up", group="optimisation"
    )
    warmup_steps: int = flag(100, "steps of linear warm-up", group="optimisation")

    stage: Literal["1", "2", "single"] = flag("single", "proxy codes, pixels of them, or pixels at once")
    vqgan: str | None = flag(None, "stages 1 and 2: folder or Hub id of the VQGAN of the proxy codes")
    stage1: str | None = flag(None, "stage 2: folder or Hub id of the result of stage 1, which has the sizes below")
    bottleneck: Literal["vq", "kl"] = flag("vq", "codes, or in a single stage continuous latents")
    num_latent_tokens: int = flag(16, "tokens of an image", least=1)
    latent_channels: int = flag(4, "channels of a token", least=1)
    num_codes: int = flag(512, "size of the codebook", least=1)
    normalize_codes: bool = flag(True, "compare codes as unit vectors; the published single-stage models do not")
    codebook_update: Literal["gradient", "clustering"] = flag(
        "clustering", "clustering also moves codes hardly used; gradient does not"
    )
    patch_size: int = flag(4, "side of a patch; in stage 1 as many pixels as the VQGAN has for a code", least=1)
    encoder: tuple[int, ...] = flag((64, 4, 4), "width, layers and attention heads of the encoder", least=1)
    decoder: tuple[int, ...] = flag((128, 4, 4), "width, layers and attention heads of the decoder", least=1)
    commitment_weight: float = flag(0.25, "weight of the encoder's term inside the quantizer's loss")
    quantizer_weight: float = flag(0.1, "weight of the quantizer's loss; stage 2 has none")
    kl_weight: float = flag(1e-6, "weight of the divergence of an image, a sum over tokens and channels")
    l1_weight: float = flag(0.05, "weight of the absolute error; that of the squared error is 1")
    perceptual_weight: float = flag(0.0, "weight of the mean of LPIPS and the ConvNeXt distance; 0 switches it off")
    perceptual_source: str | None = flag(None, "folder or Hub id with the weights of both")
    lpips_weight: float = flag(1.0, "share of LPIPS in the mean")
    convnext_weight: float = flag(0.1, "share of the ConvNeXt distance")
    adversarial_weight: float = flag(0.0, "weight of the PatchGAN loss; 0 trains no discriminator")
    discriminator_start: int = flag(0, "first step with the adversarial loss")
    discriminator_layers: int = flag(1, "halvings of the discriminator before 16x16 logits", least=0)
    discriminator_channels: int = flag(64, "width of its first layer", least=1)
    lecam_weight: float = flag(0.001, "weight of LeCam in its loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder", "decoder"):
            sizes = getattr(self, name)
            if len(sizes) != 3:
                raise ValueError(
                    f"--{name} is {','.join(map(str, sizes))}; expected three numbers, width, layers and attention "
                    "heads, such as 64,4,4."
                )
        two_stage = self.stage != "single"
        if two_stage and (self.vqgan is None or (self.stage == "2" and self.stage1 is None)):
            raise ValueError("--stage 1 needs --vqgan; --stage 2 needs --vqgan and --stage1, the result of stage 1.")
        if two_stage and self.bottleneck == "kl":
            raise ValueError("--bottleneck kl has no codes to keep for stage 2; use --stage single.")
        if self.stage == "1" and (self.perceptual_weight > 0 or self.adversarial_weight > 0):
            raise ValueError("--stage 1 has no images: set --perceptual_weight and --adversarial_weight to 0.")
        if self.perceptual_weight > 0 and not (self.lpips_weight > 0 or self.convnext_weight > 0):
            raise ValueError("--perceptual_weight needs a positive --lpips_weight or --convnext_weight.")
        if self.perceptual_weight > 0 and self.perceptual_source is None:
            raise ValueError("--perceptual_weight needs --perceptual_source: where the weights of its networks are.")


def questionable_settings(config: TiTokTrainingConfig) -> list[str]:
    """What is allowed but has no effect, or differs from the published training where that is known to matter."""
    first, second = config.stage == "1", config.stage == "2"
    adversarial, start = config.adversarial_weight > 0, config.discriminator_start
    findings = {
        "stage 1 is published with --normalize_codes": first and not config.normalize_codes,
        "stage 1 is published with --codebook_update gradient": first and config.codebook_update != "gradient",
        "stage 2 is published with --lpips_weight 0": second and 0 < config.perceptual_weight * config.lpips_weight,
        "stage 2 is published with --adversarial_weight 0.01": second and config.adversarial_weight > 0.01,
        "the published discriminators start when images are good (--discriminator_start)": adversarial and start == 0,
        "--discriminator_start lies behind the last step": adversarial and start >= config.max_train_steps,
        "--kl_weight weights a sum, not a mean, and is published as 1e-6": config.kl_weight > 1e-3,
    }
    return [message for message, applies in findings.items() if applies]


class LeCamDiscriminator(BlurPatchDiscriminator):
    """A :class:`BlurPatchDiscriminator` whose part ``lecam`` holds the averages of LeCam, so that both are saved.

    Args:
        base_channels, num_layers: as in :class:`BlurPatchDiscriminator`.
    """

    @register_to_config
    def __init__(self, base_channels: int = 128, num_layers: int = 3) -> None:
        super().__init__(3, base_channels, num_layers, norm_num_groups=math.gcd(32, base_channels))
        self.lecam = LeCam()


def new_model(config: TiTokTrainingConfig, vqgan: MaskGITVQGAN | None) -> TiTok:
    """A new TiTok that puts out pixels, or logits of the codes of ``vqgan``.

    Raises:
        ValueError: its patches are not those of ``vqgan``.
    """
    if vqgan is not None and vqgan.downsample_factor != config.patch_size:
        raise ValueError(f"--patch_size must be that of the codes of --vqgan, {vqgan.downsample_factor}.")
    names = [f"{side}_{name}" for side in ("encoder", "decoder") for name in ("width", "layers", "heads")]
    return TiTok(
        image_size=config.resolution,
        encoder_patch_size=config.patch_size,
        decoder_patch_size=config.patch_size,
        num_latent_tokens=config.num_latent_tokens,
        latent_channels=config.latent_channels,
        bottleneck=config.bottleneck,
        num_codes=config.num_codes,
        normalize_codes=config.normalize_codes,
        codebook_update=config.codebook_update,
        commitment_weight=config.commitment_weight,
        two_stage=vqgan is not None,
        num_proxy_codes=1 if vqgan is None else vqgan.codebook_size,
        **dict(zip(names, (*config.encoder, *config.decoder), strict=True)),
    )
