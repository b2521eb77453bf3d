"""The optimizers of a run: AdamW, 8-bit AdamW, Adafactor and Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfgen.training import schedules
from hfgen.training.config import TrainingConfig
from hfgen.training.param_groups import parameter_groups, split_hidden_matrices
from hfgen.training.task import Phase


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (arXiv 2502.16982) for hidden matrices and AdamW for all other parameters, as one optimizer.

    The update of a matrix is scaled to the root mean square that AdamW's has (0.2 sqrt(max(rows, columns)) after the
    orthogonalisation), so that both parts use the same learning rate and weight decay.

    Args:
        matrices: groups of parameters with two dimensions.
        others: groups of all other parameters; may be empty.
        lr: learning rate of groups that do not set one.
        momentum: Muon's.
        betas, eps: AdamW's.
        fused: AdamW's.
    """

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        ]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share_state()

    def _share_state(self) -> None:
        """The parts work on the groups and the state of this optimizer, which are what is saved and loaded."""
        first = 0
        for part in self.parts:
            part.param_groups = self.param_groups[first : first + len(part.param_groups)]
            part.state = self.state
            first += len(part.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share_state()

    def step(self, closure: None = None) -> None:
        """Update all parameters. A closure is not supported, because two methods cannot share its evaluation."""
        if closure is not None:
            raise ValueError("MuonWithAdamW.step takes no closure; compute the gradients before the call.")
        for part in self.parts:
            part.step()


def _adamw8bit(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            f"--optimizer adamw8bit needs torchao ({error}): pip install 'hfgen[adamw8bit]', or choose "
            "--optimizer adamw."
        ) from error
    # torchao compiles its update. Tensors keep a schedule from compiling it anew at every step.
    groups = [{**group, "weight_decay": torch.tensor(0.0)} for group in groups]
    return AdamW8bit(
        groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
    )


def make_optimizers(
    phases: Mapping[str, Phase], models: Mapping[str, nn.Module], config: TrainingConfig, device: torch.device
) -> dict[str, torch.optim.Optimizer]:
    """One optimizer of the kind ``config.optimizer`` per phase.

    Every parameter group has the key ``decay``; :func:`set_hyperparameters` gives it its rate and decay.

    Raises:
        ValueError: if a phase has nothing to train, or Muon finds no hidden matrix in any phase.
        ImportError: if the package of the 8-bit optimizer is not installed.
    """
    optimizers, found_matrix = {}, False
    adam = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "fused": device.type == "cuda",
    }
    for name, phase in phases.items():
        modules = [models[module] for module in phase.modules]
        groups = parameter_groups(modules, phase.no_decay)
        if not groups:
            raise ValueError(f"Phase {name!r} has no trainable parameters in {', '.join(phase.modules)}.")
        matrices, others = split_hidden_matrices(groups, modules) if config.optimizer == "muon" else ([], groups)
        found_matrix = found_matrix or bool(matrices)
        if matrices:
            others = [{**group, "left_to_adamw": True} for group in others]
            optimizers[name] = MuonWithAdamW(matrices, others, **adam)
        elif config.optimizer == "adamw8bit":
            optimizers[name] = _adamw8bit(groups, config)
        elif config.optimizer == "adafactor":
            optimizers[name] = torch.optim.Adafactor(groups, lr=config.learning_rate)
        else:
            optimizers[name] = torch.optim.AdamW(groups, **adam)
    if config.optimizer == "muon" and not found_matrix:
        classes = ", ".join(sorted({type(model).__name__ for model in models.values()}))
        raise ValueError(
            f"--optimizer muon updates the linear layers of repeated blocks, and {classes} has none; use adamw."
        )
    return optimizers


def set_hyperparameters(optimizer: torch.optim.Optimizer, phase: Phase, config: TrainingConfig, step: int) -> None:
    """Give every group the learning rate and the weight decay of optimizer step ``step`` (0 is the first)."""
    rate = schedules.learning_rate(
        step,
        schedule=config.lr_schedule,
        peak=config.learning_rate if phase.learning_rate is None else phase.learning_rate,
        max_steps=config.max_train_steps,
        warmup_steps=config.warmup_steps,
        warmup_start=config.lr_warmup_start,
        final=config.lr_final,
    )
    decay = schedules.weight_decay(
        step,
        start=config.weight_decay if phase.weight_decay is None else phase.weight_decay,
        end=config.weight_decay_end,
        max_steps=config.max_train_steps,
    )
    for group in optimizer.param_groups:
        ratio = config.adamw_ratio if group.get("left_to_adamw", False) else 1.0
        for name, value in (("lr", rate * ratio), ("weight_decay", decay if group["decay"] else 0.0)):
            if isinstance(group[name], Tensor):
                group[name].fill_(value)
            else:
                group[name] = value
