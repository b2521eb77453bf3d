"""What several commands need: devices, dtypes and image tokenizers."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from hfgen.auto import AutoModel, AutoPipeline, PipelineIndex
from hfgen.downloads import loading_reason
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


def check_folder(output: Path) -> None:
    """Raise before anything is computed.

    Raises:
        ValueError: there is a file where the folder shall be.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; give a folder.")


def load_pipeline(source: str, dtype: torch.dtype | None) -> DiffusionPipeline:
    """The pipeline at ``source``.

    Raises:
        OSError: there is none; says what is there instead.
        ValueError: it is not a pipeline of hfgen.
    """
    try:
        return AutoPipeline.from_pretrained(source, dtype=dtype)
    except OSError as error:
        if (Path(source) / "model_index.json").is_file():
            raise
        raise OSError(_what_is_at(source, "pipeline", error)) from error


def _what_is_at(source: str, wanted: str, error: OSError) -> str:
    """Why there is no pipeline or tokenizer at ``source``, and what to give."""
    folder = Path(source)
    if (folder / "final").is_dir():
        return f"{source} is the folder of a training run; its {wanted} is {folder / 'final'}."
    if (folder / "config.json").is_file():
        return f"{source} is a single model, not a pipeline; for a tokenizer there is `hfgen reconstruct`."
    if folder.exists():
        return f"{source} is not the folder of a {wanted}; give one that was saved, or USER/NAME on the Hub."
    return f"There is no folder {source!r}, and it could not be read from the Hub: {loading_reason(error)}."


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
    try:
        class_name = HFGenModel.load_config(source, subfolder=subfolder).get("_class_name")
    except OSError as error:
        if subfolder is not None or (Path(source) / "config.json").is_file():
            raise
        raise OSError(_what_is_at(source, "tokenizer", error)) from error
    if class_name == "AutoencoderKL":
        return AutoencoderKL.from_pretrained(source, subfolder=subfolder, dtype=dtype, use_safetensors=True).eval()
    return AutoModel.from_pretrained(source, subfolder=subfolder, dtype=dtype)
