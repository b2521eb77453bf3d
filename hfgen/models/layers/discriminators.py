"""Discriminators for adversarial training of tokenizers.

PatchGAN: Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", arXiv 1611.07004, section
3.2.2, in the layout of pix2pix and VQGAN (arXiv 2012.09841). Images are in [-1, 1].
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from hfgen.models.modeling import HFGenModel


class PatchDiscriminator(HFGenModel):
    """A convolutional network that rates overlapping patches as real or fake.

    ``num_layers`` 4x4 convolutions of stride 2, one of stride 1 and the output convolution; all but the first and the
    last are followed by batch norm. Parameter names (``main.{k}``) are those of VQGAN's checkpoints.

    Args:
        in_channels: channels of the image.
        base_channels: width of the first convolution; it doubles per layer up to 8 times.
        num_layers: number of stride-2 convolutions; three see patches of 70x70 pixels.
    """

    @register_to_config
    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; it must be at least 1.")
        width = base_channels
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for depth in range(1, num_layers + 1):
            previous, width = width, base_channels * min(2**depth, 8)
            stride = 2 if depth < num_layers else 1
            # No bias: batch norm would remove it.
            convolution = nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(_init_weights)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 1, h, w), large for patches taken for real, of ``pixels`` (B, in_channels, H, W)."""
        smallest = 3 * 2**self.config.num_layers  # each of the two stride-1 convolutions takes one row and column
        if min(pixels.shape[-2:]) < smallest:
            raise ValueError(
                f"pixels are {pixels.shape[-2]}x{pixels.shape[-1]}; {self.config.num_layers} layers need at least "
                f"{smallest}x{smallest}. Use fewer discriminator layers."
            )
        return self.main(pixels)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
