"""``hfgen convert``: official checkpoints into the folder of a model or a pipeline."""

from __future__ import annotations

import argparse
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import hfgen
from hfgen.commands.shared import torch_dtype
from hfgen.conversion import load_original, parts, read_checkpoint
from hfgen.models.modeling import HFGenModel
from hfgen.systems import SYSTEMS
from hfgen.training.checkpoints import write_folder


def run(options: argparse.Namespace) -> str:
    """The output appears under its name once it is complete."""
    check_output(options.output, options.overwrite)
    known = tuple(parts(options.system))
    settings = original_settings(options.original_config, known)
    models: dict[str, HFGenModel] = {}
    for file in options.files:
        for part, model in load_file(file, options, settings).items():
            if part in models:
                raise ValueError(f"{file} holds the part {part} of {options.system} once more; give each part once.")
            models[part] = model.to(torch_dtype(options.dtype)) if options.dtype else model
    saved = assemble(options.system, models)
    write_folder(options.output, lambda folder: saved.save_pretrained(folder))

    lines = [f"{options.output}: {type(saved).__name__} from {', '.join(models)}"]
    licences = {row.weights_licence for row in SYSTEMS if row.converter == options.system and row.weights_licence}
    lines.extend(f"licence of the official weights: {licence}" for licence in licences)
    return "\n".join(lines)


def check_output(path: Path, overwrite: bool) -> None:
    """A folder that exists is replaced on request only, and only if a model or a pipeline was saved there."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another --output or pass --overwrite.")
    if not any((path / name).is_file() for name in ("model_index.json", "config.json")):
        raise FileExistsError(f"{path} is no saved model or pipeline, so --overwrite leaves it alone.")


def load_file(
    file: Path, options: argparse.Namespace, settings: Mapping[str, dict[str, Any]]
) -> dict[str, HFGenModel]:
    """The models in one official file, by the name of their part."""
    content = read_checkpoint(file, allow_pickle=options.trust_pickle)
    if options.part:
        found = [options.part]
    else:
        found = [name for name, part in parts(options.system).items() if part.find(content)]
    if not found:
        load_original(options.system, content)  # its error says what a checkpoint of this system holds
    return {
        name: load_original(options.system, content, part=name, original_config=settings.get(name)) for name in found
    }


def assemble(system: str, models: Mapping[str, HFGenModel]) -> DiffusionPipeline | HFGenModel:
    """The pipeline of a system if ``models`` are all that it needs; else the single model.

    Raises:
        ValueError: several models that do not make a pipeline.
    """
    reasons = []
    for name in (row.pipeline for row in SYSTEMS if row.converter == system and row.pipeline):
        pipeline_class = getattr(hfgen, name)
        types = typing.get_type_hints(pipeline_class.__init__)
        parameters = inspect.signature(pipeline_class).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        components = {key: model for key in needed for model in models.values() if isinstance(model, types[key])}
        missing = [key for key in needed if key not in components]
        if not missing and len(components) == len(models):
            return pipeline_class(**components)
        reasons.append(f"{name} needs {', '.join(needed)}")
    if len(models) == 1:
        return next(iter(models.values()))
    raise ValueError(
        f"The parts {', '.join(models)} of {system} make no pipeline ({'; '.join(reasons) or 'it has none'}); convert "
        "them one by one."
    )


def original_settings(items: Sequence[str], known_parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The official constructor arguments of each part from ``KEY=VALUE``, ``PART.KEY=VALUE`` and files."""
    settings: dict[str, dict[str, Any]] = {part: {} for part in known_parts}
    for item in items:
        name, equals, text = item.partition("=")
        arguments = {name: parse_value(text)} if equals else read_settings(Path(item))
        for key, value in arguments.items():
            part, dot, rest = key.partition(".")
            if dot and part in settings:
                settings[part][rest] = value
            elif key in settings and isinstance(value, dict):
                settings[key].update(value)
            else:
                for of_part in settings.values():
                    of_part[key] = value
    return settings


def parse_value(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a JSON or YAML file."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(f"--original-config {path} is neither KEY=VALUE nor a .json, .yaml or .yml file.")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"--original-config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--original-config {path} holds a {type(content).__name__}; expected names with values.")
    return content
