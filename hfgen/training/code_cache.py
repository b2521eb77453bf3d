"""The codes of a data set, computed once and kept in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from hfgen.data.transforms import to_pixels


class CachedCodes(Dataset):
    """Items ``{"codes": (L,) int64, "label": int}`` in place of images; keys are ``(epoch, index)``.

    Only right for data without random augmentation: every epoch sees the codes of epoch 0.

    Args:
        dataset: items with uint8 ``pixels`` and a ``label``.
        tokenizer: gives ``encode(pixels).codes``.
        device: where to encode.
        batch_size: images per encoding step.
        progress: show a progress bar.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: nn.Module,
        *,
        device: torch.device,
        batch_size: int,
        progress: bool = True,
    ) -> None:
        tokenizer.to(device).eval()
        codes, labels = [], []
        for first in tqdm(range(0, len(dataset), batch_size), desc="codes", disable=not progress):
            items = [dataset[0, index] for index in range(first, min(first + batch_size, len(dataset)))]
            codes.append(self._encode(tokenizer, torch.stack([item["pixels"] for item in items]).to(device)))
            labels += [item["label"] for item in items]
        self.codes = torch.cat(codes)
        self.labels = labels

    @staticmethod
    @torch.no_grad()
    def _encode(tokenizer: nn.Module, images: Tensor) -> Tensor:
        return tokenizer.encode(to_pixels(images)).codes.cpu()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor | int]:
        _, index = key
        return {"codes": self.codes[index], "label": self.labels[index]}
