"""Renaming a state dict by a table of rules that reads in both directions.

A rule pairs official names with hfgen names. A name is a template: ``{field}`` stands for one part between dots and
``{field:regex}`` for what the regular expression matches, so that

    Rule("blocks.{i}.attn.mat_qkv.weight",
         ("blocks.{i}.attn.to_q.weight", "blocks.{i}.attn.to_k.weight", "blocks.{i}.attn.to_v.weight"),
         Split(3))

covers every block. The first rule that fits a name takes it. ``convert`` goes from official names to hfgen names and
``revert`` goes back; both insist that every key is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

_FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
_MAX_LISTED = 10


class Operation(Protocol):
    """A tensor operation with an inverse: ``forward`` from official to hfgen, ``inverse`` back."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...

    def inverse(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Keep:
    """No change."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    inverse = forward


@dataclass(frozen=True)
class Split:
    """One official tensor holds ``parts`` equal pieces along ``dim``, such as a fused query, key and value."""

    parts: int
    dim: int = 0

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.shape[self.dim] % self.parts:
            raise ValueError(f"dimension {self.dim} of {tuple(tensor.shape)} does not split into {self.parts} parts")
        return tensor.chunk(self.parts, self.dim)

    def inverse(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (torch.cat(tensors, self.dim),)


@dataclass(frozen=True)
class Squeeze:
    """The official tensor has extra dimensions of size 1 at ``dims``, ascending positions in its own shape."""

    dims: tuple[int, ...]

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self.dims[-1] >= tensor.ndim or any(tensor.shape[dim] != 1 for dim in self.dims):
            raise ValueError(f"dimensions {self.dims} of {tuple(tensor.shape)} are not all 1")
        return (tensor.squeeze(self.dims),)

    def inverse(self, tensor: Tensor) -> tuple[Tensor, ...]:
        for dim in self.dims:
            tensor = tensor.unsqueeze(dim)
        return (tensor,)


@dataclass(frozen=True)
class Chain:
    """Several operations, in the order from official to hfgen."""

    operations: tuple[Operation, ...]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for operation in self.operations:
            tensors = operation.forward(*tensors)
        return tensors

    def inverse(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for operation in reversed(self.operations):
            tensors = operation.inverse(*tensors)
        return tensors


@dataclass(frozen=True)
class Rule:
    """Official tensors ``source`` become hfgen tensors ``target`` through ``operation``.

    Both sides are one template or several; all of them hold the same fields.
    """

    source: str | tuple[str, ...]
    target: str | tuple[str, ...]
    operation: Operation = field(default_factory=Keep)

    def __post_init__(self) -> None:
        names = [{name for name, _ in _FIELD.findall(template)} for template in self.sources + self.targets]
        if any(fields != names[0] for fields in names):
            raise ValueError(f"The templates of {self.source!r} -> {self.target!r} differ in their fields.")

    @cached_property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @cached_property
    def targets(self) -> tuple[str, ...]:
        return (self.target,) if isinstance(self.target, str) else self.target

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        templates = self.sources + self.targets
        regexes = {name: regex for template in templates for name, regex in _FIELD.findall(template) if regex}
        return {template: _compile(template, regexes) for template in templates}

    def match(self, name: str, templates: Iterable[str]) -> dict[str, str] | None:
        """The fields of the first of ``templates`` that fits ``name``; None if none does."""
        for template in templates:
            if found := self._patterns[template].fullmatch(name):
                return found.groupdict()
        return None


@dataclass(frozen=True)
class Derived:
    """An official tensor that follows from the configuration: left out by ``convert``, made again by ``revert``.

    Attributes:
        source: its official name, without fields.
        make: builds the official value.
        check: whether a checkpoint must hold exactly this value. False for statistics that inference does not use.
    """

    source: str
    make: Callable[[], Tensor]
    check: bool = True


@dataclass(frozen=True)
class Drop:
    """Official tensors that the model has no use for and that cannot be made again, such as a frozen loss network."""

    source: str


Rules = Sequence[Rule | Derived | Drop]


def convert(
    state: Mapping[str, Tensor], rules: Rules, expected: Mapping[str, torch.Size] | None = None
) -> dict[str, Tensor]:
    """Rename official tensors to hfgen names.

    Args:
        state: official state dict; it is not changed, and results may be views of its tensors.
        rules: the table.
        expected: shape of every tensor of the hfgen model; with it the result is complete and fits.

    Returns:
        The state dict in hfgen names.

    Raises:
        ValueError: names (up to ten of each kind) of unknown, missing or ill-shaped official tensors.
    """
    renaming, derived, drops = _sort(rules)
    problems = _Problems()
    left = {}
    for name, tensor in state.items():
        if name in derived:
            _check_derived(name, tensor, derived[name], problems)
        elif not any(pattern.fullmatch(name) for pattern in drops):
            left[name] = tensor
    converted, origin = _apply(left, renaming, forward=True, problems=problems)
    if expected is not None:
        for name in expected.keys() - converted.keys():
            problems.missing += [source for source in _counterparts(name, renaming) if source not in state]
        misshapen: dict[tuple[str, ...], str] = {}
        for name, tensor in converted.items():
            if name not in expected:
                problems.unknown += origin[name]
            elif tensor.shape != expected[name]:
                shapes = f"{tuple(tensor.shape)} where {tuple(expected[name])} is needed"
                misshapen.setdefault(origin[name], f"{', '.join(origin[name])} (gives {name} {shapes})")
        problems.wrong += misshapen.values()
    problems.raise_if_any("official checkpoint")
    return converted


def revert(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Rename hfgen tensors back to official names and add the derived tensors.

    Raises:
        ValueError: names of unknown or missing hfgen tensors.
    """
    renaming, derived, _ = _sort(rules)
    problems = _Problems()
    official, _ = _apply(state, renaming, forward=False, problems=problems)
    problems.raise_if_any("hfgen state dict")
    return official | {name: rule.make() for name, rule in derived.items()}


def original_name(name: str, rules: Rules) -> tuple[str, ...]:
    """The official names behind one hfgen name.

    Raises:
        ValueError: when no rule produces ``name``.
    """
    renaming = _sort(rules)[0]
    if all(rule.match(name, rule.targets) is None for rule in renaming):
        raise ValueError(f"No rule produces {name!r}.")
    return _counterparts(name, renaming)


@dataclass
class _Problems:
    """Everything that is wrong with a state dict, told in one error."""

    unknown: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def raise_if_any(self, what: str) -> None:
        kinds = {"unknown": self.unknown, "missing": self.missing, "wrong": self.wrong}
        told = [f"{len(set(names))} {kind}: {listing(names)}" for kind, names in kinds.items() if names]
        if told:
            raise ValueError(f"The {what} does not fit the model. " + "; ".join(told) + ".")


def listing(names: Iterable[str]) -> str:
    """The first ten of ``names`` in alphabetical order, and how many more there are."""
    names = sorted({str(name) for name in names})
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _sort(rules: Rules) -> tuple[list[Rule], dict[str, Derived], list[re.Pattern[str]]]:
    renaming = [rule for rule in rules if isinstance(rule, Rule)]
    derived = {rule.source: rule for rule in rules if isinstance(rule, Derived)}
    drops = [_compile(rule.source, dict(_FIELD.findall(rule.source))) for rule in rules if isinstance(rule, Drop)]
    return renaming, derived, drops


def _compile(template: str, regexes: Mapping[str, str]) -> re.Pattern[str]:
    """The regular expression of a template; a field that occurs twice must read the same both times."""
    pattern, position, seen = "", 0, set()
    for found in _FIELD.finditer(template):
        name = found[1]
        pattern += re.escape(template[position : found.start()])
        pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{regexes.get(name) or '[^.]+'})"
        seen.add(name)
        position = found.end()
    return re.compile(pattern + re.escape(template[position:]))


def _fill(templates: Iterable[str], fields: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(_FIELD.sub(lambda found: fields[found[1]], template) for template in templates)


def _counterparts(name: str, rules: Iterable[Rule]) -> tuple[str, ...]:
    """The official names behind the hfgen tensor ``name``; the name itself when no rule produces it."""
    for rule in rules:
        fields = rule.match(name, rule.targets)
        if fields is not None:
            return _fill(rule.sources, fields)
    return (name,)


def _check_derived(name: str, tensor: Tensor, rule: Derived, problems: _Problems) -> None:
    if not rule.check:
        return
    value = rule.make()
    if tensor.shape != value.shape:
        problems.wrong.append(f"{name} ({tuple(tensor.shape)} where {tuple(value.shape)} is needed)")
    elif not torch.equal(tensor.to(value.dtype), value):
        problems.wrong.append(f"{name} (its values are not those that the configuration implies)")


def _apply(
    state: Mapping[str, Tensor], rules: Sequence[Rule], *, forward: bool, problems: _Problems
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Run the rules in one direction; returns the new state dict and, for each new name, the names it came from."""
    result: dict[str, Tensor] = {}
    origin: dict[str, tuple[str, ...]] = {}
    done: set[str] = set()
    for name in state:
        if name in done:
            continue
        for rule in rules:
            here, there = (rule.sources, rule.targets) if forward else (rule.targets, rule.sources)
            fields = rule.match(name, here)
            if fields is not None:
                break
        else:
            problems.unknown.append(name)
            continue
        inputs, outputs = _fill(here, fields), _fill(there, fields)
        done.update(inputs)
        absent = [each for each in inputs if each not in state]
        if absent:
            problems.missing += absent
            continue
        clash = [each for each in outputs if each in result]
        if clash:
            problems.wrong.append(f"{', '.join(inputs)} (a second source of {', '.join(clash)})")
            continue
        try:
            values = (rule.operation.forward if forward else rule.operation.inverse)(*(state[each] for each in inputs))
        except ValueError as error:
            problems.wrong.append(f"{', '.join(inputs)} ({error})")
            continue
        result.update(zip(outputs, values, strict=True))
        origin.update(dict.fromkeys(outputs, inputs))
    return result, origin
