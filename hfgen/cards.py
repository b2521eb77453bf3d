"""Model cards: the README.md of a published folder, written for the person who finds it on the Hub.

:func:`write_short_card` needs only a saved model or pipeline; :func:`write_run_card` also tells how it was trained,
from the folder of the run.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from os.path import isabs
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData

import hfgen
from hfgen.systems import SYSTEMS, System

CARD_FILE = "README.md"
PLACEHOLDER = "USER/NAME"  # stands for the repository until it is known
_INDEX_FILES = ("model_index.json", "config.json")
# Licences by the identifiers of the Hub; another one is `other` with its name.
_HUB_LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail++")
_ABSENT = [None, None]  # a component of a pipeline that it was saved without
_PICTURE = re.compile(r"step-(\d+)_(.+)\.png")


def write_short_card(
    folder: Path,
    repo_id: str = PLACEHOLDER,
    *,
    origin: str | None = None,
    licence: str | None = None,
    converter: str | None = None,
) -> None:
    """Write the card of a saved model or pipeline: what it is, how to use it, whom to cite.

    Args:
        folder: of a model or pipeline; a README.md in it is replaced.
        repo_id: where it will be published.
        origin: a sentence on where the weights come from.
        licence: of the weights, None if it is not known.
        converter: name of the converter that made it, which tells the system of a shared class.
    """
    saved = _Saved(folder, [row for row in SYSTEMS if converter is not None and row.converter == converter])
    text = [f"# {_name(repo_id, saved)}", _summary(saved), *([origin] if origin else [])]
    text += _use(saved, repo_id)
    text += _licence(licence) + _citation(saved.row)
    _write(folder, text, saved, licence=licence)


def write_run_card(
    folder: Path,
    run: Path,
    *,
    command: str,
    environment: str,
    repo_id: str = PLACEHOLDER,
    example: str | None = None,
    licence: str | None = None,
) -> None:
    """Write the card of the result of a training run, with its pictures beside it.

    Args:
        folder: of the saved model or pipeline.
        run: folder of the run: ``training_config.json``, ``log.jsonl``, ``training_curve.png``, ``validation/``.
        command: what was run.
        environment: the versions, devices and number of processes that ran it.
        repo_id: where it will be published.
        example: training script as ``hfgen.systems`` names it, which tells the system of a shared class.
        licence: of the weights, None if its author did not choose one.
    """
    saved = _Saved(folder, [row for row in SYSTEMS if example in row.examples])
    settings = json.loads((run / "training_config.json").read_text(encoding="utf-8"))
    settings = {name: portable(value) for name, value in settings.items()}
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "training_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    text = [f"# {_name(repo_id, saved)}", _summary(saved, "trained with hfgen")]
    for name, path in _last_pictures(run / "validation").items():
        shutil.copyfile(path, folder / f"{name}.png")
        text.append(f"![{name.replace('_', ' ')} of the last validation]({name}.png)")
    text += _use(saved, repo_id)
    text += ["## Data", _data(settings)]
    text += [
        "## Training",
        f"```sh\n{command}\n```",
        f"{environment} All settings: [training_config.json](training_config.json), which the script also takes as "
        "`--config`.",
    ]
    if (run / "training_curve.png").is_file():
        shutil.copyfile(run / "training_curve.png", folder / "training_curve.png")
        text.append("![training curves](training_curve.png)")
    text += _results(records, settings) + _licence(licence) + _citation(saved.row)
    _write(folder, text, saved, licence=licence, dataset=settings.get("dataset"))


def portable(value: Any) -> Any:
    """A setting without the folders above a run: what is published should not name somebody's disk."""
    if isinstance(value, str) and isabs(value):
        return "/".join(Path(value).parts[1:][-2:])
    return value


class _Saved:
    """What the files of a saved model or pipeline tell."""

    def __init__(self, folder: Path, rows: Sequence[System]) -> None:
        """``rows``: the systems that it can belong to, as far as it is known where it comes from."""
        index = next((folder / name for name in _INDEX_FILES if (folder / name).is_file()), None)
        if index is None:
            raise ValueError(f"{folder} holds neither {' nor '.join(_INDEX_FILES)}: it is no saved model or pipeline.")
        self.config: Mapping[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        self.class_name = str(self.config.get("_class_name"))
        self.is_pipeline = index.name == _INDEX_FILES[0]
        self.network_config = _read_config(folder / "transformer") if self.is_pipeline else {}
        of_diffusers = self.class_name not in hfgen.__all__ and hasattr(diffusers, self.class_name)
        self.package = "diffusers" if of_diffusers else "hfgen"
        # A model of diffusers is the class of no system.
        rows = [row for row in rows or SYSTEMS if self.class_name in row.classes or (of_diffusers and row in rows)]
        if self.is_pipeline:  # several systems share a class: first the one whose network it holds
            library, network = self.config.get("transformer", (None, None))
            rows.sort(key=lambda row: network not in row.classes if library == "hfgen" else row.generator is not None)
        self.row: System | None = rows[0] if rows else None

    @property
    def role(self) -> str:
        if self.is_pipeline:
            return "pipeline"
        is_tokenizer = self.class_name == "AutoencoderKL" or (self.row and self.row.tokenizer == self.class_name)
        return "tokenizer" if is_tokenizer else "generator"

    @property
    def condition(self) -> str | None:
        """The argument of a call that says what to make: ``prompt``, ``prompt_embeds`` or ``class_labels``."""
        if not self.is_pipeline or self.class_name not in hfgen.__all__:
            return None
        parameters = inspect.signature(getattr(hfgen, self.class_name).__call__).parameters
        if "prompt" in parameters and self.config.get("text_encoder") != _ABSENT:
            return "prompt"
        if any(self.network_config.get(name) for name in ("num_classes", "num_class_embeds")):
            return "class_labels"
        return "prompt_embeds" if "joint_attention_dim" in self.network_config else None

    @property
    def gives_latents(self) -> bool:
        """Whether a pipeline of latents lacks its decoder."""
        if self.config.get("quantizer", _ABSENT) not in (_ABSENT, ["hfgen", "NoisyLatentQuantizer"]):
            return False  # a tokenizer of images, which needs no autoencoder
        network = self.network_config
        return self.config.get("vae") == _ABSENT and network.get("in_channels", network.get("latent_channels")) != 3


def _name(repo_id: str, saved: _Saved) -> str:
    return repo_id.rpartition("/")[2] if repo_id != PLACEHOLDER else saved.class_name


def _summary(saved: _Saved, made: str = "for hfgen") -> str:
    what = f"a {saved.role} (`{saved.class_name}`) {made}"
    if saved.row is None:
        return f"{what[0].upper()}{what[1:]}."
    return f"[{saved.row.title}](https://arxiv.org/abs/{saved.row.arxiv}): {what}. {saved.row.notes}"


def _use(saved: _Saved, repo_id: str) -> list[str]:
    lines = [f"from {saved.package} import {saved.class_name}", ""]
    if saved.is_pipeline:
        lines.append(f'pipeline = {saved.class_name}.from_pretrained("{repo_id}")')
        if saved.gives_latents:
            arguments = ", ".join([*_condition(saved), 'output_type="latent"'])
            lines.append(f"latents = pipeline({arguments}).images")
        else:
            lines.append(f"image = pipeline({', '.join(_condition(saved))}).images[0]")
    elif saved.role == "tokenizer":
        lines.append(f'tokenizer = {saved.class_name}.from_pretrained("{repo_id}")')
        lines.append("reconstruction = tokenizer(pixels).sample  # (B, 3, H, W) in [-1, 1]")
    else:
        lines.append(f'model = {saved.class_name}.from_pretrained("{repo_id}")')
    return ["## Use", "```python\n" + "\n".join(lines) + "\n```"]


def _condition(saved: _Saved) -> list[str]:
    """The arguments of an example call."""
    if saved.condition == "class_labels":
        names = saved.config.get("class_names")
        label = next(iter(names.values())) if isinstance(names, Mapping) and names else 0
        return [f"class_labels={json.dumps(label)}"]
    if saved.condition == "prompt_embeds":
        return [*(f"{name}={name}" for name in ("prompt_embeds", "pooled_prompt_embeds")), "guidance_scale=1"]
    return ['prompt="a small red circle at the top left"'] if saved.condition == "prompt" else []


def _data(settings: Mapping[str, Any]) -> str:
    dataset, size = settings.get("dataset"), settings.get("resolution")
    if dataset == "shapes":
        source = "The captioned shapes of hfgen, rendered from a seed: nothing to download, no licence of others"
    elif _is_hub_id(dataset):
        source = f"[{dataset}](https://huggingface.co/datasets/{dataset})"
    else:
        source = f"`{dataset}`"
    steps = [f"{settings[name]} crop" for name in ("crop",) if settings.get(name)]
    steps += ["random mirroring"] if settings.get("flip") else []
    steps += [f"the first {settings['limit']} items"] if settings.get("limit") else []
    return f"{source}. Images of {size}x{size} pixels{', ' if steps else ''}{', '.join(steps)}."


def _results(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    validated = [record for record in records if any(name.startswith("validation/") for name in record)]
    if not validated:
        return []
    last = validated[-1]
    rows = [
        f"| {name.removeprefix('validation/').replace('_', ' ')} | {value:.4g} |"
        for name, value in last.items()
        if name.startswith("validation/") and value is not None
    ]
    images = settings.get("num_validation_images")
    measured = f"Measured by the command above: its validation after step {last['step']}, on {images} images."
    return ["## Results", measured, "\n".join(["| metric | value |", "|---|---|", *rows])]


def _licence(licence: str | None) -> list[str]:
    text = f"The weights are under {licence}." if licence else "None was stated: ask the author before you use them."
    return ["## Licence", text]


def _citation(row: System | None) -> list[str]:
    if row is None:
        return []
    fields = {
        "title": row.paper,
        "year": row.published[-4:],
        "eprint": row.arxiv,
        "archivePrefix": "arXiv",
        "note": row.published,
    }
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return ["## Citation", f"```bibtex\n@misc{{{row.key}_{row.published[-4:]},\n{body}\n}}\n```"]


def _last_pictures(folder: Path) -> dict[str, Path]:
    """The newest picture of each name, samples before the others."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in folder.glob("step-*.png"):
        if match := _PICTURE.fullmatch(path.name):
            newest[match[2]] = max(newest.get(match[2], (-1, path)), (int(match[1]), path))
    names = sorted(newest, key=lambda name: (name != "samples", name))
    return {name: newest[name][1] for name in names}


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_hub_id(dataset: Any) -> bool:
    return (
        isinstance(dataset, str)
        and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) is not None
        and not Path(dataset).exists()
    )


def _write(
    folder: Path, text: Sequence[str], saved: _Saved, *, licence: str | None, dataset: str | None = None
) -> None:
    licences: dict[str, str] = {}
    if licence is not None and licence.lower() in _HUB_LICENCES:
        licences = {"license": licence.lower()}
    elif licence is not None:
        licences = {"license": "other", "license_name": licence}
    task = "image-to-image" if saved.role == "tokenizer" else None
    if saved.is_pipeline and saved.class_name in hfgen.__all__:
        task = "text-to-image" if saved.condition else "unconditional-image-generation"
    tags = ["hfgen", *(["diffusers"] if saved.is_pipeline else []), *([saved.row.key] if saved.row else [])]
    data = ModelCardData(
        library_name=saved.package,
        pipeline_tag=task,
        tags=[*tags, *(["class-conditional"] if saved.condition == "class_labels" else [])],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        **licences,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")
    card.save(folder / CARD_FILE)
