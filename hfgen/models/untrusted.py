"""What a downloaded configuration may say before anything is built from it.

A repository chooses a class of hfgen and its arguments, nothing else. These checks turn arguments of a wrong type, and
arguments that ask for more memory or time than any real model, into an error before memory is taken.
"""

from __future__ import annotations

import json
import math
import threading
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

# Far above the published models: tens of kilobytes, a few thousand tensors, 10^10 parameters.
MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_TENSORS = 5_000
MAX_LIST_LENGTH = 10_000
MAX_PARAMETERS = 10**11
MAX_BUFFER_ELEMENTS = 2**28  # these are made for real when a model is loaded


def read_json_object(path: str | PathLike[str], max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is larger than ``max_bytes``, nested too deeply, not JSON or not an object.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {max_bytes:,}. Is it the right file?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object with names and values.")
    return content


def check_components(index: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ``ValueError`` unless the components ``names`` of a ``model_index.json`` are [library, class] or null."""
    from diffusers import pipelines

    for name in names:
        entry = index.get(name, [None, None])
        if entry == [None, None]:
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            raise ValueError(
                f"model_index.json names the component {name!r} as {entry!r}; expected [library, class], such as "
                '["hfgen", "VARTransformer"].'
            )
        if hasattr(pipelines, entry[0]):  # a module inside diffusers, of which any attribute would be taken
            raise ValueError(f"model_index.json takes the component {name!r} from {entry[0]!r}, which is no library.")


def check_arguments(model_class: type[nn.Module], arguments: Mapping[str, Any]) -> None:
    """Check constructor arguments of ``model_class`` that come from a file, by building it without memory.

    So a model must be buildable under ``torch.device("meta")``.

    Raises:
        ValueError: an argument that is not of its annotated type, is not finite, is a list of more than
            ``MAX_LIST_LENGTH`` items, or that the class refuses; a model with more than ``MAX_TENSORS`` tensors,
            ``MAX_PARAMETERS`` parameters or ``MAX_BUFFER_ELEMENTS`` numbers in its buffers.
    """
    name = model_class.__name__
    hints = typing.get_type_hints(model_class.__init__)
    for key, value in arguments.items():
        if key in hints and not _fits(value, hints[key]):
            text = repr(value)
            text = text if len(text) <= 80 else text[:80] + "..."
            raise ValueError(f"The configuration of {name} has {key} = {text}; expected {_described(hints[key])}.")
    try:
        with torch.device("meta"), _limited(name):
            model_class(**arguments)
    except ValueError:
        raise
    except Exception as error:  # what a constructor raises on a senseless size depends on where it is used
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{name} cannot be built from its configuration: {reason}") from error


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin in (tuple, list, Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        kinds = arguments if origin is tuple and Ellipsis not in arguments else arguments[:1] * len(value)
        return len(value) == len(kinds) <= MAX_LIST_LENGTH and all(map(_fits, value, kinds))
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation in (bool, str, types.NoneType):
        return isinstance(value, annotation)
    return True


def _described(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if annotation is types.NoneType:
        return "none"
    return "a finite float" if annotation is float else getattr(annotation, "__name__", str(annotation))


@contextmanager
def _limited(name: str) -> Iterator[None]:
    """Count the tensors that this thread registers in modules and raise ``ValueError`` at the limits."""
    thread = threading.get_ident()
    counts = {"tensors": 0, "parameters": 0, "buffer elements": 0}
    limits = {"tensors": MAX_TENSORS, "parameters": MAX_PARAMETERS, "buffer elements": MAX_BUFFER_ELEMENTS}

    def add(kind: str, tensor: Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        counts["tensors"] += 1
        counts[kind] += tensor.numel()
        for what, limit in limits.items():
            if counts[what] > limit:
                raise ValueError(f"The configuration of {name} asks for more than {limit:,} {what}; check its sizes.")

    hooks = (
        register_module_parameter_registration_hook(lambda module, key, tensor: add("parameters", tensor)),
        register_module_buffer_registration_hook(lambda module, key, tensor: add("buffer elements", tensor)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
