"""Official checkpoints into hfgen models and back.

Each official repository has one module here that states, as data, how its tensors map to hfgen names (``rules``), how
the configuration follows from the tensors, and which files were released.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import Tensor

from hfgen.conversion.checkpoints import read_checkpoint
from hfgen.conversion.converter import Part, ReleasedCheckpoint, ReleasedFile
from hfgen.conversion.rules import listing
from hfgen.models.modeling import HFGenModel
from hfgen.models.untrusted import MAX_CONFIG_BYTES, read_json_object

# System -> module of this package; the module's CONVERTERS maps the system to its parts by name.
_MODULES = {
    "var": "var",
    "var_vqvae": "var",
    "maskgit_vqgan": "maskgit_vqgan",
    "titok": "titok",
    "maskgit": "maskgit",
    "dit": "dit",
    "sit": "dit",
    "mean_flow": "mean_flow",
    "rectified_flow": "rectified_flow",
    "sd3": "mmdit",
    "transfusion_pytorch": "transfusion",
}

__all__ = [
    "ReleasedCheckpoint",
    "ReleasedFile",
    "load_original",
    "parts",
    "read_checkpoint",
    "released",
    "systems",
    "to_original",
]


def systems() -> tuple[str, ...]:
    """The systems that have a converter."""
    return tuple(_MODULES)


def parts(system: str) -> dict[str, Part]:
    """The convertible parts of a system by name, such as ``transformer`` and ``vae``.

    Raises:
        ValueError: unknown system.
    """
    if system not in _MODULES:
        raise ValueError(f"There is no converter for {system!r}; choose one of {', '.join(_MODULES)}.")
    return import_module(f"hfgen.conversion.{_MODULES[system]}").CONVERTERS[system]


def released() -> tuple[ReleasedCheckpoint, ...]:
    """Everything official that loads by its name, see ``hfgen.from_official``."""
    modules = dict.fromkeys(_MODULES.values())
    return tuple(row for module in modules for row in import_module(f"hfgen.conversion.{module}").RELEASED)


def load_original(
    system: str,
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    *,
    part: str | None = None,
    original_config: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
) -> HFGenModel:
    """Build a model from a checkpoint in the layout of an official repository.

    Args:
        system: name of the converter, see :func:`systems`.
        checkpoint: a file, a folder or a state dict with official names; a checkpoint of the official trainer, which
            wraps several state dicts, is also read.
        part: which model of the system; needed when the checkpoint holds several.
        original_config: official constructor arguments that the tensors do not tell; by default those of the official
            configuration file, if ``checkpoint`` is a folder that has one.
        allow_pickle: see :func:`hfgen.conversion.read_checkpoint`.

    Returns:
        The model on the CPU in evaluation mode, in the dtype of the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown system, part or argument; an unreadable file; tensors that are missing, unknown or of
            another shape than the configuration implies, by name.
    """
    choices = parts(system)
    if part is not None and part not in choices:
        raise ValueError(f"{system} has no part {part!r}; choose one of {', '.join(choices)}.")
    content = read_checkpoint(checkpoint, allow_pickle=allow_pickle)
    if part is None:
        part = _only_part(system, choices, content)
    if original_config is None:
        original_config = _config_beside(checkpoint, choices[part].config_file)
    return choices[part].load(content, original_config)


def to_original(model: ModelMixin, system: str | None = None, part: str | None = None) -> dict[str, Tensor]:
    """The weights of a model as the state dict that the official code loads; tensors may share the model's memory.

    Args:
        model: the model, of hfgen or diffusers.
        system, part: whose layout, where several repositories have one for the class of the model; by default that of
            the first. A class of diffusers does not name one.

    Raises:
        ValueError: the class of the model has no official layout, or this one has no place for all of its weights.
    """
    system = system or getattr(model, "original_system", None)
    part = part or getattr(model, "original_part", None)
    if system is None or part is None:
        missing = " and ".join(name for name, value in (("system", system), ("part", part)) if value is None)
        raise ValueError(
            f"A {type(model).__name__} names no official checkpoint layout: give {missing}, such as "
            "to_original(model, 'sd3', 'transformer')."
        )
    choices = parts(system)
    if part not in choices or not isinstance(model, choices[part].model):
        names = ", ".join(name for name, choice in choices.items() if isinstance(model, choice.model)) or "none"
        raise ValueError(f"{system} has no layout {part!r} for a {type(model).__name__}; it has {names}.")
    return choices[part].save(model)


def _config_beside(checkpoint: str | PathLike[str] | Mapping[str, Any], name: str | None) -> dict[str, Any]:
    if name is None or isinstance(checkpoint, Mapping) or not (Path(checkpoint) / name).is_file():
        return {}
    return read_json_object(Path(checkpoint) / name, MAX_CONFIG_BYTES)


def _only_part(system: str, choices: Mapping[str, Part], content: Mapping[str, Any]) -> str:
    found = [name for name, part in choices.items() if part.find(content) is not None]
    if not found:
        wanted = " or ".join(f"{listing(part.signature)} ({name})" for name, part in choices.items())
        raise ValueError(f"This is no checkpoint of {system}: it should hold {wanted}, but holds {listing(content)}.")
    if len(found) > 1:
        raise ValueError(f"The checkpoint holds several parts of {system}: name one with part={' or '.join(found)}.")
    return found[0]
