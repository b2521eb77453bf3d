"""Images as sequences of patches, and back.

Legend: B batch, C channels, P patch size, N = h w patches of an (h P, w P) image in raster order, D width.
"""

from __future__ import annotations

from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """A linear layer of each patch, as a convolution whose stride is its kernel size (ViT, arXiv 2010.11929, eq. 1).

    Args:
        in_channels: C.
        width: D.
        patch_size: P.
    """

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, h P, w P) -> (B, N, D).

        Raises:
            ValueError: sides that the patches do not divide.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"The input has the size {height}x{width}, which patches of {self.patch_size}x{self.patch_size} do "
                f"not divide; use multiples of {self.patch_size}."
            )
        return self.proj(images).flatten(2).transpose(1, 2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, h P, w P) -> (B, N, P P C), the numbers of each patch as (row, column, channel), channels last."""
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, P P C) -> (B, C, h P, w P): the inverse of :func:`patchify` for a grid of (h, w) patches."""
    rows, columns = grid
    patches = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    images = patches.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, P, w, P)
    return images.reshape(len(patches), -1, rows * patch_size, columns * patch_size)
