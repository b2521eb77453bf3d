"""Where the models of a run live, and what the loop does with them: the case of a whole copy in every process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hfgen.training.checkpoints import load_weights


class Replicated:
    """Every process holds every model; DDP averages the gradients. The other placements change what differs."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def place(self, module: nn.Module) -> None:
        """Bring a trained model, or its average, to where it stays; before optimizers see its parameters."""
        module.to(self.accelerator.device)

    def attach(self, optimizer: torch.optim.Optimizer, modules: Sequence[nn.Module]) -> None:
        """Tell which models the optimizer of a phase updates; before weights and states are loaded."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """What the training step calls."""
        return self.accelerator.prepare_model(module)

    def no_sync(self, module: nn.Module) -> AbstractContextManager:
        """For a micro-step whose gradients are only added up."""
        return self.accelerator.no_sync(module)

    def backward(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to those of the phase of ``optimizer``."""
        loss.backward()

    def step(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, max_norm: float, scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, bool, bool]:
        """Clip and apply the gradients of a phase, unless its loss or a gradient is not finite.

        Args:
            optimizer: of the phase.
            loss: mean over all processes, a scalar.
            max_norm: of the gradients after clipping; infinity does not clip.
            scaler: scaled the losses.

        Returns:
            The norm before clipping, a scalar; whether the loss and whether the norm is finite.
        """
        scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, max_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss_is_finite, norm_is_finite = torch.isfinite(torch.stack([loss, norm])).tolist()
        if loss_is_finite and norm_is_finite:
            scaler.step(optimizer)
        return norm, loss_is_finite, norm_is_finite

    def whole(self, module: nn.Module) -> nn.Module | None:
        """The module with all of its weights, on the main process. Every process must call it."""
        return module

    def load_weights(self, module: nn.Module, folder: Path) -> None:
        """Load what ``save_pretrained`` of :meth:`whole` wrote. Every process must call it."""
        load_weights(module, folder)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state dict of the optimizer of whole parameters. Every process must call it."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Load what :meth:`optimizer_state` of any placement gave."""
        optimizer.load_state_dict(state)


def holds_quantizer(module: nn.Module) -> bool:
    """Whether training changes weights of the module in place (moving averages, restarts of codes)."""
    # Of their classes: a generator can have a codebook_size in its config, which diffusers shows as an attribute.
    return any(hasattr(type(part), "codebook_size") for part in module.modules())
