"""What several commands need: devices, dtypes and image tokenizers."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from hfgen.auto import AutoModel, PipelineIndex
from hfgen.models.modeling import HFGenModel

# Names under which pipelines hold their image tokenizer.
COMPONENTS = ("vq_model", "vae")


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


def load_tokenizer(source: str, dtype: torch.dtype | None) -> HFGenModel | AutoencoderKL:
    """The tokenizer at ``source``, or the one of the pipeline at ``source``.

    Raises:
        OSError: there is neither a model nor a pipeline.
        ValueError: the pipeline has no image tokenizer, or the model is no tokenizer that hfgen knows.
    """
    try:
        index = PipelineIndex.load_config(source)
    except OSError:
        subfolder = None
    else:
        subfolder = next((name for name in COMPONENTS if index.get(name, [None, None]) != [None, None]), None)
        if subfolder is None:
            raise ValueError(f"{source!r} is a pipeline without an image tokenizer ({' or '.join(COMPONENTS)}).")
    if HFGenModel.load_config(source, subfolder=subfolder).get("_class_name") == "AutoencoderKL":
        return AutoencoderKL.from_pretrained(source, subfolder=subfolder, dtype=dtype, use_safetensors=True).eval()
    return AutoModel.from_pretrained(source, subfolder=subfolder, dtype=dtype)
