"""Every public generator, whole and in slices, for a test that starts this file in two processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

import hfgen
from hfgen.training.sharding import FullySharded
from support.instances import MODELS, build_model


def compare(name: str, accelerator: Accelerator) -> dict[str, object]:
    """Outputs of the whole and of the sliced model, and whether the parameters inside its blocks are slices."""
    model, inputs = build_model(name).eval(), MODELS[name].inputs(2)
    with torch.no_grad():
        whole = model(**inputs)[0]
    # Now, because FSDP renames their classes.
    blocks = [part for part in model.modules() if type(part).__name__ in model._repeated_blocks]
    placement = FullySharded(accelerator, "no")
    placement.place(model)
    sharded = placement.wrap(model)(**inputs)[0]
    sharded.square().mean().backward()
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    sliced = bool(parameters) and all(isinstance(parameter, DTensor) for parameter in parameters)
    trained = any(parameter.grad is not None for parameter in parameters)
    return {"whole": whole, "sharded": sharded.detach(), "sliced": sliced, "trained": trained}


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    names = [name for name in MODELS if getattr(hfgen, name).__module__.startswith("hfgen.models.generators")]
    report = {name: compare(name, accelerator) for name in names}
    if accelerator.is_main_process:
        torch.save({"processes": accelerator.num_processes, **report}, Path(sys.argv[1]) / "report.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    # Without the interpreter's teardown, in which a process was seen to abort after all its work was done ("terminate
    # called without an active exception").
    os._exit(0)
