"""What several commands need: devices and dtypes."""

from __future__ import annotations

import torch


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` as a dtype."""
    return getattr(torch, name)


def torch_device(name: str | None) -> torch.device:
    """The named device; without a name the accelerator, if there is one.

    Raises:
        ValueError: the name is not a device of this machine.
    """
    accelerator = torch.accelerator.current_accelerator()
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not a device such as cpu, cuda or cuda:1.") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise ValueError(f"--device {name!r} is not on this machine, which has {accelerator or 'cpu only'}.")
    return device
