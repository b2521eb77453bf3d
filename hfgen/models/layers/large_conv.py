"""3x3 convs for inference on CPUs where images are large: fewer products, and memory that is used again.

Every function here equals the plain operation up to rounding, and is one for training, other devices and small images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfgen.models.layers.winograd import winograd_conv_over

# malloc of glibc maps blocks of this size anew each time, and then every page costs a fault: for a conv at full
# resolution, whose kernel also wants copies of input and output in its own layout, as long as a third of the products.
_MAPPED_BYTES = 2**25
_BAND_ROWS = 64
# For smaller images preparing the kernels costs more than they save.
_SUBPIXEL_BYTES = 2**20
# Below, the sums take longer than the products that they save.
_WINOGRAD_BYTES = 5 * 2**20


def in_cpu_inference(images: Tensor) -> bool:
    """Whether nothing but the values of the result counts: no gradients, no graph to compile, no autocast."""
    if images.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled("cpu")


def conv_over(conv: nn.Module, images: Tensor) -> Tensor:
    """``conv(images)``, written over ``images`` where these are large.

    Args:
        conv: a 3x3 conv with a padding of 1 and as many output as input channels. A plain one in float32 takes half of
            the products; another one is called as a module, on bands of rows, so that adapters and hooks work.
        images: (B, C, H, W) that nobody else needs.
    """
    if not in_cpu_inference(images):
        return conv(images)
    if images[0].nbytes >= _WINOGRAD_BYTES and _is_plain(conv) and _is_plain_tensor(images):
        return winograd_conv_over(images, conv.weight, conv.bias)
    if images[0].nbytes <= _MAPPED_BYTES:
        return conv(images)
    height = images.shape[2]
    for image in images.split(1):
        above = image[:, :, :0]
        for first in range(0, height, _BAND_ROWS):
            last = min(first + _BAND_ROWS, height)
            band = torch.cat([above, image[:, :, first : last + 1]], dim=2)  # with the neighbours that the conv reads
            skipped = above.shape[2]
            above = image[:, :, last - 1 : last].clone()
            image[:, :, first:last] = conv(band)[:, :, skipped : skipped + last - first]
    return images


class NearestUpsampleConv(nn.Module):
    """Upsampling by 2 to the nearest neighbour, then a 3x3 conv; the parameters of diffusers' ``Upsample2D``.

    Among the nine pixels that the conv reads at most four differ, so large images take a 2x2 conv with summed weights
    for each of the four positions in a 2x2 cell of the output (Shi et al., arXiv 1609.05158): 4 instead of 9 products.

    Args:
        conv: the 3x3 conv with a padding of 1, taken over as it is.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, hidden_states: Tensor, output_size: None = None) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, 2 H, 2 W). ``output_size`` is what some diffusers stacks pass: None."""
        large = hidden_states[0].nbytes >= _SUBPIXEL_BYTES
        if large and in_cpu_inference(hidden_states) and _is_plain(self.conv):
            return _subpixel_conv(hidden_states, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


def _is_plain(conv: nn.Module) -> bool:
    """Whether calling a conv is no more than its float32 weights in the usual layout: no adapter, hook or offload."""
    hooked = "forward" in vars(conv) or conv._forward_hooks or conv._forward_pre_hooks
    if hooked or type(conv) is not nn.Conv2d or type(conv.weight) is not nn.Parameter:
        return False
    return conv.weight.device.type == "cpu" and _is_plain_tensor(conv.weight)


def _is_plain_tensor(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


def _subpixel_conv(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, height, width = images.shape
    result = images.new_empty(batch, len(weight), 2 * height, 2 * width)
    for row in (0, 1):
        for column in (0, 1):
            kernel = _merge_taps(_merge_taps(weight, 2, row), 3, column)
            for image, written in zip(images.split(1), result.split(1)):
                position = F.conv2d(image, kernel, bias, padding=1)  # one row and column too many
                written[:, :, row::2, column::2] = position[:, :, row : row + height, column : column + width]
    return result


def _merge_taps(weight: Tensor, dim: int, position: int) -> Tensor:
    """The three taps along ``dim`` as two: those that read the same pixel at this position in a cell are summed."""
    before, here, after = weight.unbind(dim)
    return torch.stack([before, here + after] if position == 0 else [before + here, after], dim)
