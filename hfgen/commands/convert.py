"""``hfgen convert``: official checkpoints into the folder of a model or a pipeline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from hfgen.auto import PipelineIndex
from hfgen.commands.shared import load_tokenizer, torch_dtype
from hfgen.conversion import load_original, parts, read_checkpoint, released, systems
from hfgen.downloads import loading_reason
from hfgen.models.modeling import HFGenModel
from hfgen.official import assemble, find_released, save_official
from hfgen.pipelines.rectified_flow import RectifiedFlowPipeline
from hfgen.systems import SYSTEMS
from hfgen.training.checkpoints import write_folder

TEXT_ENCODERS = {each.__name__: each for each in (CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel)}


def run(options: argparse.Namespace) -> str:
    """The output appears under its name once it is complete."""
    check_output(options.output, options.overwrite)
    if not options.files:
        return convert_released(options)
    known = tuple(parts(options.system))
    settings = original_settings(options.original_config, known)
    dtype = torch_dtype(options.dtype) if options.dtype else None
    vae = load_autoencoder(options.vae, dtype) if options.vae else None
    text_encoders = load_text_encoders(options.text_encoders, dtype) if options.text_encoders else None
    models: dict[str, HFGenModel] = {}
    for file in options.files:
        for part, model in load_file(file, options, settings).items():
            if part in models:
                raise ValueError(f"{file} holds the part {part} of {options.system} once more; give each part once.")
            models[part] = model if dtype is None else model.to(dtype)
    saved = assemble(options.system, models, vae, text_encoders)
    write_folder(options.output, lambda folder: saved.save_pretrained(folder))

    lines = [f"{options.output}: {type(saved).__name__} from {', '.join(models)}"]
    licences = {row.weights_licence for row in SYSTEMS if row.converter == options.system and row.weights_licence}
    lines.extend(f"licence of the official weights: {licence}" for licence in licences)
    return "\n".join([*lines, *missing_parts(saved, options.system)])


def convert_released(options: argparse.Namespace) -> str:
    """Download and convert official weights by their name."""
    if options.system in systems():
        raise ValueError(
            f"Give the files of {options.system}, or instead of {options.system} the name of official weights such as "
            f"{released()[0].name}; `hfgen systems --weights` lists them."
        )
    for name in ("part", "original_config", "trust_pickle"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} is for files; {options.system} is known by its name.")
    row = find_released(options.system)
    dtype = torch_dtype(options.dtype) if options.dtype else None
    vae = load_autoencoder(options.vae, dtype) if options.vae else None
    text_encoders = load_text_encoders(options.text_encoders, dtype) if options.text_encoders else None
    saved = save_official(row, options.output, vae=vae, text_encoders=text_encoders, dtype=dtype)
    files = ", ".join(file.path for file in row.files)
    lines = [
        f"{options.output}: {type(saved).__name__} from {files} of {row.repo}",
        f"licence of the official weights: {row.licence}",
    ]
    return "\n".join([*lines, *missing_parts(saved, row.system)])


def load_autoencoder(source: str, dtype: torch.dtype | None) -> AutoencoderKL:
    """The autoencoder at ``source``, or that of the pipeline at ``source``.

    Raises:
        OSError: there is neither.
        ValueError: it is of another class.
    """
    vae = load_tokenizer(source, dtype)
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"--vae {source} is of the class {type(vae).__name__}; expected an AutoencoderKL.")
    return vae


def load_text_encoders(source: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """The text encoders and tokenizers of the pipeline at ``source``, by the names of its parts.

    Raises:
        OSError: there is no pipeline.
        ValueError: it has none.
    """
    try:
        index = PipelineIndex.load_config(source)
    except OSError as error:
        raise OSError(f"--text-encoders {source}: there is no pipeline. ({loading_reason(error)})") from error
    found: dict[str, Any] = {}
    for suffix in ("", "_2", "_3"):
        encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
        _, class_name = index.get(encoder) or (None, None)
        if class_name is None:
            continue
        if class_name not in TEXT_ENCODERS:
            known = ", ".join(TEXT_ENCODERS)
            raise ValueError(f"--text-encoders {source}: {encoder} is a {class_name}; expected one of {known}.")
        part = {"subfolder": encoder, "dtype": dtype, "use_safetensors": True}
        found[encoder] = TEXT_ENCODERS[class_name].from_pretrained(source, **part)
        found[tokenizer] = AutoTokenizer.from_pretrained(source, subfolder=tokenizer)
    if not found:
        raise ValueError(f"--text-encoders {source}: that pipeline has no text_encoder.")
    return found


def missing_parts(saved: DiffusionPipeline | HFGenModel, converter: str) -> list[str]:
    """Lines on what a pipeline lacks to make images of what a user gives; none for others."""
    if not isinstance(saved, DiffusionPipeline):
        return []
    rows = (row for row in SYSTEMS if row.converter == converter and row.pipeline == type(saved).__name__)
    autoencoder, lines = next(rows).autoencoder, []
    if autoencoder is not None and saved.components.get("vae", saved) is None:  # else the weights make pixels
        lines.append(f"without an autoencoder the pipeline gives latents; for images add --vae {autoencoder}")
    if isinstance(saved, RectifiedFlowPipeline) and saved.network.takes == "prompt" and not saved.text_encoders:
        lines.append(f"without text encoders calls need prompt_embeds; for prompts add --text-encoders {autoencoder}")
    return lines


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
    """The models in one official file or folder, by the name of their part."""
    found = [options.part] if options.part else parts_in(file, options)
    # By its path, so that without settings the configuration that lies beside the weights in a folder is taken.
    return {
        name: load_original(
            options.system,
            file,
            part=name,
            original_config=settings.get(name) or None,
            allow_pickle=options.trust_pickle,
        )
        for name in found
    }


def parts_in(file: Path, options: argparse.Namespace) -> list[str]:
    """The names of the parts that an official file or folder holds."""
    content = read_checkpoint(file, allow_pickle=options.trust_pickle)
    found = [name for name, part in parts(options.system).items() if part.find(content)]
    if not found:
        load_original(options.system, content)  # its error says what a checkpoint of this system holds
    return found


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
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, ArithmeticError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"--original-config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--original-config {path} holds a {type(content).__name__}; expected names with values.")
    return content
