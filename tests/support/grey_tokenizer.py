"""A tokenizer that a person can read: the code of a patch is the index of the nearest of V greys."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from hfgen.models.modeling import DecoderOutput, HFGenModel, TokenizerOutput


class GreyTokenizer(HFGenModel):
    """A grid of side x side patches, or with ``grid=False`` a sequence that is not said to be a grid.

    Args:
        num_codes: greys, from black to white.
        side: patches in a row.
        patch_size: pixels of a patch in a row.
        grid: whether the tokenizer tells where its codes lie.
    """

    @register_to_config
    def __init__(self, num_codes: int = 16, side: int = 4, patch_size: int = 2, grid: bool = True):
        super().__init__()
        self.codebook_size, self.num_tokens, self.side = num_codes, side * side, side
        self.greys = nn.Parameter(torch.linspace(-1, 1, num_codes))
        if grid:
            self.downsample_factor, self.image_size = patch_size, side * patch_size

    @apply_forward_hook
    def encode(self, pixels: Tensor) -> TokenizerOutput:
        means = F.avg_pool2d(pixels.mean(1, keepdim=True), self.config.patch_size).flatten(1)
        codes = (means[..., None] - self.greys).abs().argmin(dim=-1)
        return TokenizerOutput(latents=self.greys[codes], codes=codes)

    @apply_forward_hook
    def decode_codes(self, codes: Tensor) -> DecoderOutput:
        patches = self.greys[codes].unflatten(1, (1, self.side, self.side))
        return DecoderOutput(F.interpolate(patches.expand(-1, 3, -1, -1), scale_factor=self.config.patch_size))
