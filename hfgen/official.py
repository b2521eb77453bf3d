"""Official weights by name: download, check, convert, keep.

The tables beside the converters (``RELEASED`` in ``hfgen/conversion``) say what was released.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import typing
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock

import hfgen
from hfgen.auto import AutoModel, AutoPipeline
from hfgen.cards import write_short_card
from hfgen.conversion import ReleasedCheckpoint, load_original, released
from hfgen.downloads import download_file
from hfgen.models.modeling import HFGenModel
from hfgen.systems import SYSTEMS
from hfgen.training.checkpoints import write_folder

logger = logging.getLogger(__name__)


def from_official(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    cache_dir: str | PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> DiffusionPipeline | HFGenModel:
    """Load released weights: a pipeline where all its parts were released, else the model.

    The first call downloads the official files, compares them with what the Hub says they are, and converts them;
    later ones load the result. The licence is that of the authors; it is logged and stands in the card of the folder.

    Args:
        name: such as ``"var-d16"``; ``hfgen systems --weights`` lists all.
        dtype: dtype of the weights; by default that of the release.
        cache_dir: folder of the downloaded and of the converted files; by default ``HF_HOME``.
        token: access token of the Hub; None takes the stored one.
        local_files_only: use only what was downloaded before.
        force_download: download and convert again.

    Raises:
        ValueError: unknown name, a damaged download, or files that do not fit the converter.
        OSError: the Hub cannot be reached.
    """
    row = find_released(name)
    # A converter of another version may write other files.
    folder = Path(cache_dir or HF_HOME) / "hfgen" / "official" / f"{row.name}-{hfgen.__version__}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{folder}.lock"):  # one process converts, the others of a training wait for it
        if force_download or not folder.is_dir():
            save_official(
                row,
                folder,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
    logger.info("%s is under the licence of its authors: %s (%s).", row.name, row.licence, row.repo)
    is_pipeline = (folder / "model_index.json").is_file()
    return (AutoPipeline if is_pipeline else AutoModel).from_pretrained(folder, dtype=dtype)


def save_official(
    row: ReleasedCheckpoint,
    output: Path,
    *,
    vae: AutoencoderKL | None = None,
    text_encoders: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    cache_dir: str | PathLike | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> DiffusionPipeline | HFGenModel:
    """Download and convert a release into the folder ``output``, which appears when it is complete.

    ``vae`` and ``text_encoders`` become parts of the pipeline, see :func:`assemble`; the other arguments are those of
    :func:`from_official`.
    """
    models = {}
    for file in row.files:
        path = download_file(
            row.repo,
            file.path,
            revision=row.revision,
            sha256=file.sha256,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        model = load_original(row.system, path, part=file.part, original_config=file.original_config)
        models[file.part] = model if dtype is None else model.to(dtype)
    saved = assemble(row.system, models, vae, text_encoders)

    def write(folder: Path) -> None:
        saved.save_pretrained(folder)
        names = ", ".join(f"`{file.path}`" for file in row.files)
        source = f"[{row.repo}](https://huggingface.co/{row.repo})"
        origin = f"Weights of the authors: {names} of {source}, converted by hfgen {hfgen.__version__}."
        write_short_card(folder, origin=origin, licence=row.licence, converter=row.system)

    write_folder(output, write)
    return saved


def find_released(name: str) -> ReleasedCheckpoint:
    """The release of that name.

    Raises:
        ValueError: there is none.
    """
    rows = {row.name: row for row in released()}
    if name not in rows:
        similar = difflib.get_close_matches(name, rows, n=1)
        hint = f"Did you mean {similar[0]!r}? " if similar else ""
        raise ValueError(f"There are no official weights {name!r}. {hint}`hfgen systems --weights` lists all.")
    return rows[name]


def assemble(
    system: str,
    models: Mapping[str, HFGenModel],
    vae: AutoencoderKL | None = None,
    text_encoders: Mapping[str, Any] | None = None,
) -> DiffusionPipeline | HFGenModel:
    """The pipeline of a system if ``models`` are all that it needs; else the single model.

    Args:
        system: name of the converter.
        models: the converted parts by name.
        vae: decoder for a pipeline of latents.
        text_encoders: of a text-to-image pipeline, with their tokenizers, by the names of its parts.

    Raises:
        ValueError: several models that do not make a pipeline, or others that have no place in what they make.
    """
    added = {} if vae is None else {"vae": vae}
    added |= text_encoders or {}
    reasons = []
    for row in (row for row in SYSTEMS if row.converter == system and row.pipeline):
        pipeline_class = getattr(hfgen, row.pipeline)
        types = typing.get_type_hints(pipeline_class.__init__)
        parameters = inspect.signature(pipeline_class).parameters.values()
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        components = {key: model for key in needed for model in models.values() if isinstance(model, types[key])}
        missing = [key for key in needed if key not in components]
        if not missing and len(components) == len(models):
            unknown = [key for key in added if key not in types]
            if unknown:
                raise ValueError(f"A {row.pipeline} takes no {unknown[0]}; leave it out.")
            return pipeline_class(**components, **added, **row.pipeline_arguments)
        reasons.append(f"{row.pipeline} needs {', '.join(needed)}")
    if len(models) == 1:
        (model,) = models.values()
        if added:
            raise ValueError(
                f"A {type(model).__name__} alone makes no pipeline that could have a {next(iter(added))}."
            )
        return model
    raise ValueError(
        f"The parts {', '.join(models)} of {system} make no pipeline ({'; '.join(reasons) or 'it has none'}); convert "
        "them one by one."
    )
