"""The patch discriminator of TiTok and MaskGIT-style tokenizers, which blurs before it drops pixels.

Layout of the discriminator that github.com/bytedance/1d-tokenizer trains with (arXiv 2406.07550, appendix A); blurred
down-sampling is that of Zhang 2019 (arXiv 1904.11486).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hfgen.models.modeling import HFGenModel

_MAX_SIDE = 16  # of the map of logits
_SLOPE = 0.1
_KERNEL = (1.0, 3.0, 3.0, 1.0)


class BlurDownsample(nn.Module):
    """Convolves every channel with the outer product of [1, 3, 3, 1] / 8 at stride 2.

    (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2)), with zeros around as TensorFlow's SAME places them.
    """

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.tensor(_KERNEL, dtype=torch.float32) / sum(_KERNEL)
        self.register_buffer("kernel", torch.outer(kernel, kernel)[None, None], persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        channels, (height, width) = features.shape[1], features.shape[-2:]
        # Kernel size 4: an odd side needs one zero more, at its end.
        padded = F.pad(features, (1, 1 + width % 2, 1, 1 + height % 2))
        kernel = self.kernel.to(features.dtype).expand(channels, 1, -1, -1)
        return F.conv2d(padded, kernel, stride=2, groups=channels)


class BlurPatchDiscriminator(HFGenModel):
    """A convolutional network that rates patches as real or fake, without batch statistics.

    A 5x5 convolution; ``num_layers`` times a 3x3 convolution, :class:`BlurDownsample` and group norm; max pooling to
    16x16; a 1x1 and a 5x5 convolution. LeakyReLU with slope 0.1 between. Parameter names are those of the official
    training checkpoints.

    Args:
        in_channels: channels of the image.
        base_channels: width of the first layers; it doubles with every further one.
        num_layers: number of halvings.
        norm_num_groups: groups of the group normalisations.
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 3, base_channels: int = 128, num_layers: int = 3, norm_num_groups: int = 32
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; it must be at least 1.")
        self.block_in = nn.Sequential(nn.Conv2d(in_channels, base_channels, 5, padding=2), nn.LeakyReLU(_SLOPE))
        width, blocks = base_channels, []
        for depth in range(num_layers):
            previous, width = width, base_channels * 2**depth
            convolution = nn.Conv2d(previous, width, 3, padding=1)
            blocks.append(
                nn.Sequential(
                    convolution, BlurDownsample(), nn.GroupNorm(norm_num_groups, width), nn.LeakyReLU(_SLOPE)
                )
            )
        self.blocks = nn.ModuleList(blocks)
        self.pool = nn.AdaptiveMaxPool2d(_MAX_SIDE)
        self.to_logits = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.LeakyReLU(_SLOPE), nn.Conv2d(width, 1, 5, padding=2)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 1, 16, 16), large for patches taken for real, of ``pixels`` (B, 3, H, W) in [-1, 1]."""
        features = self.block_in(pixels * 0.5 + 0.5)  # the published network sees [0, 1]
        for block in self.blocks:
            features = block(features)
        return self.to_logits(self.pool(features))
