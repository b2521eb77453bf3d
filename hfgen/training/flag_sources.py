"""Loading what a flag names, with errors that say which flag it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from hfgen.downloads import loading_reason
from hfgen.models.modeling import HFGenModel
from hfgen.training.run_folder import FINAL_FOLDER

ModelT = TypeVar("ModelT", bound=HFGenModel)

_PIPELINE_FILE, _MODEL_FILE = "model_index.json", "config.json"
_IMAGE_TOKENIZERS = ("vq_model", "vae")  # their names in pipelines


@contextmanager
def loading_flag(name: str, source: str | None) -> Iterator[None]:
    """Say which flag named what could not be loaded, and what to give instead.

    Args:
        name: of the flag, without dashes.
        source: its value, a folder or a Hub id.

    Raises:
        OSError: instead of that of the loading function.
    """
    try:
        yield
    except OSError as error:
        folder = Path(str(source))
        if (folder / FINAL_FOLDER).is_dir():
            reason = f"that is the folder of a training run; give its result, {folder / FINAL_FOLDER}."
        elif (folder / _PIPELINE_FILE).is_file() and not (folder / _MODEL_FILE).is_file():
            reason = f"that is a whole pipeline; give a part of it, {_parts(folder)}. ({error})"
        elif folder.exists():
            reason = f"no saved model of the kind that is needed. ({error})"
        else:
            reason = f"there is no such folder, and it could not be read from the Hub: {loading_reason(error)}."
        raise OSError(f"--{name} {source}: {reason}") from error


def load_model(name: str, source: str, model_class: type[ModelT]) -> ModelT:
    """The model of one class that a flag names.

    Args:
        name: of the flag, without dashes.
        source: its value, a folder or a Hub id.
        model_class: of hfgen.

    Raises:
        OSError: there is none.
        ValueError: it is of another class.
    """
    with loading_flag(name, source):
        found = model_class.load_config(source).get("_class_name")
    if found is not None and found != model_class.__name__:
        raise ValueError(f"--{name} {source} is a {found}; give the folder or Hub id of a {model_class.__name__}.")
    with loading_flag(name, source):
        return model_class.from_pretrained(source)


def _parts(folder: Path) -> str:
    """The models of a saved pipeline, image tokenizers before everything else."""
    models = sorted(path.parent.name for path in folder.glob(f"*/{_MODEL_FILE}"))
    chosen = [name for name in models if name in _IMAGE_TOKENIZERS] or models
    return " or ".join(str(folder / name) for name in chosen) or "which has no models"
