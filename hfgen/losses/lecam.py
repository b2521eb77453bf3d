"""LeCam: a discriminator loss that keeps its logits near the averages of the other kind of image."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


class LeCam(nn.Module):
    """relu(mean D(x) - a_fake)^2 + relu(a_real - mean D(x'))^2 with moving averages a of the mean logits.

    Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", arXiv 2104.03310, equation 4, in
    the one-sided form that TiTok trains with. The averages start at 0, are saved with the module, change in train
    mode after they were used, and are those of all processes.

    Args:
        decay: of the averages.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros((), dtype=torch.float32))
        self.register_buffer("fake", torch.zeros((), dtype=torch.float32))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The loss, a scalar, of the discriminator's logits of any shape; TiTok weights it by 0.001."""
        real, fake = real_logits.float().mean(), fake_logits.float().mean()
        loss = F.relu(real - self.fake).square() + F.relu(self.real - fake).square()
        if self.training:
            means = torch.stack([real, fake]).detach()
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(means)
                means /= distributed.get_world_size()
            # New tensors: the graph of the loss holds the old ones.
            self.real, self.fake = (
                old.lerp(new, 1 - self.decay) for old, new in zip((self.real, self.fake), means.to(self.real.dtype))
            )
        return loss
