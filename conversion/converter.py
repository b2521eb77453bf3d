"""What a converter is, and how a model is built from an official state dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from hfgen.conversion.rules import Rules, convert, listing, revert
from hfgen.models.modeling import HFGenModel
from hfgen.models.untrusted import check_arguments


class OriginalConfig:
    """Official constructor arguments that the user gave, taken one by one by name.

    Names that nobody took are unknown, which ``finish`` reports; so a converter states each official argument once.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._known: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        """The given value, or ``default``, which is that of the official constructor or of the released models."""
        self._known.add(name)
        return self._values.get(name, default)

    def read(self, name: str, value: Any) -> Any:
        """``value``, which the tensors tell; a given value must not contradict it."""
        given = self.get(name, value)
        if given != value:
            raise ValueError(f"original_config[{name!r}] is {given!r}, but the tensors say {value!r}.")
        return value

    def fixed(self, name: str, value: Any) -> None:
        """An official argument for which hfgen supports one value."""
        given = self.get(name, value)
        if given != value:
            raise ValueError(f"original_config[{name!r}] is {given!r}; hfgen supports {value!r} only.")

    def ignore(self, *names: str) -> None:
        """Official arguments that choose kernels or modes and not the model."""
        self._known.update(names)

    def finish(self) -> None:
        """Raises ``ValueError`` for names that the converter does not know."""
        unknown = self._values.keys() - self._known
        if unknown:
            raise ValueError(
                f"original_config has unknown arguments: {listing(unknown)}. Known: {', '.join(sorted(self._known))}."
            )


@dataclass(frozen=True)
class Part:
    """How one model of an official repository is read.

    Attributes:
        model: the hfgen class.
        config: constructor arguments of ``model`` from the official state dict and the user's ``original_config``.
        rules: the table of rules for a configuration of ``model``.
        signature: names that every official state dict of this part holds, by which it is recognised.
        wrappers: keys under which official trainers put this state dict inside a larger checkpoint.
        hints: official constructor arguments that such a checkpoint tells beside the tensors.
        config_file: JSON file with official constructor arguments in the folders that were published.
    """

    model: type[HFGenModel]
    config: Callable[[Mapping[str, Tensor], OriginalConfig], dict[str, Any]]
    rules: Callable[[Mapping[str, Any]], Rules]
    signature: tuple[str, ...]
    wrappers: tuple[tuple[str, ...], ...] = ()
    hints: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    config_file: str | None = None

    def find(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor] | None:
        """The state dict of this part inside a checkpoint; None if there is none."""
        for keys in ((), *self.wrappers):
            state: Any = checkpoint
            for key in keys:
                state = state.get(key) if isinstance(state, Mapping) else None
            if isinstance(state, Mapping) and all(name in state for name in self.signature):
                return state
        return None

    def load(self, checkpoint: Mapping[str, Any], original_config: Mapping[str, Any]) -> HFGenModel:
        """The model with the weights of this part of ``checkpoint``, in evaluation mode and with memory of its own."""
        state = self.find(checkpoint)
        if state is None:
            raise ValueError(f"The checkpoint lacks {listing(self.signature)}; it holds {listing(checkpoint)}.")
        hints = self.hints(checkpoint) if self.hints else {}
        original = OriginalConfig({**hints, **original_config})
        arguments = self.config(state, original)
        original.finish()
        check_arguments(self.model, arguments)
        # Parameters without memory, buffers with their values: those outside the state dict are never loaded.
        with init_empty_weights(include_buffers=False):
            model = self.model(**arguments)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        converted = convert(state, self.rules(model.config), expected)
        # Copies, so that the model shares memory neither with a mapped file nor with the caller's state dict.
        own = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in converted.items()}
        model.load_state_dict(own, strict=True, assign=True)
        return model.eval()

    def save(self, model: HFGenModel) -> dict[str, Tensor]:
        """The state dict of ``model`` in the official layout."""
        return revert(model.state_dict(), self.rules(model.config))


@dataclass(frozen=True)
class ReleasedFile:
    """One official file.

    Attributes:
        part: part of the system that it holds.
        path: its path inside the Hub repository.
        megabytes: approximate size, for people; the exact one is checked against the Hub.
        sha256: of the content, if known; what the Hub says is checked in any case.
        original_config: official constructor arguments that the file does not tell.
    """

    part: str
    path: str
    megabytes: int
    sha256: str | None = None
    original_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """A pipeline or a model that was released, as ``hfgen.from_official`` loads it by name.

    Attributes:
        name: short name, such as ``var-d16``.
        system: its converter.
        repo: repository on the Hugging Face Hub.
        files: its files; those of all parts of a system make a pipeline, one alone a model.
        licence: licence of the weights.
        revision: branch, tag or commit of the repository.
    """

    name: str
    system: str
    repo: str
    files: tuple[ReleasedFile, ...]
    licence: str
    revision: str = "main"

    @property
    def megabytes(self) -> int:
        """Approximate size of the download."""
        return sum(file.megabytes for file in self.files)


def shape(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of an official tensor that tells the configuration.

    Raises:
        ValueError: the tensor is missing or has not ``ndim`` dimensions.
    """
    if name not in state:
        raise ValueError(f"The official checkpoint does not fit the model. 1 missing: {name}.")
    if state[name].ndim != ndim:
        raise ValueError(f"{name} has the shape {tuple(state[name].shape)}; expected {ndim} dimensions.")
    return tuple(state[name].shape)


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many indices there are: 1 + the largest number that the group of ``pattern`` matches, 0 without a match."""
    found = (re.match(pattern, name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)
