"""The settings of a training run: one dataclass is the command line, the YAML file and the saved record.

A script extends :class:`TrainingConfig` with the fields of its method and decorates its main with
:func:`hfgen.training.script`. Values come, in rising priority, from the defaults of the fields, the file given with
``--config`` and the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

ConfigT = TypeVar("ConfigT", bound="TrainingConfig")
REQUIRED = dataclasses.MISSING


def flag(default: Any, help: str, *, group: str = "method", least: int | None = None) -> Any:
    """A dataclass field with its help text.

    Args:
        default: its value; ``REQUIRED`` makes it mandatory.
        help: for ``--help``.
        group: heading in that text.
        least: smallest value, or smallest element, that :func:`check_least` accepts.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "least": least})


def check_least(config: Any) -> None:
    """Compare the values of a dataclass with the ``least`` of their flags, also where a subclass has a new default.

    Raises:
        ValueError: for the first one that is smaller, is not a number or is an empty list.
    """
    bounds: dict[str, int] = {}
    for base in type(config).__mro__:  # from the class to its bases: the nearest bound counts
        for field in getattr(base, "__dataclass_fields__", {}).values():
            if field.metadata.get("least") is not None:
                bounds.setdefault(field.name, field.metadata["least"])
    for name, least in bounds.items():
        value = getattr(config, name)
        parts = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(part >= least for part in parts) or value == ():
            shown = ",".join(map(str, value)) or "empty" if isinstance(value, tuple) else value
            what = "each of its numbers" if isinstance(value, tuple) else "it"
            bound = "not be negative" if least == 0 else f"be at least {least}"
            raise ValueError(f"--{name} is {shown}; {what} must {bound}.")


@dataclasses.dataclass(kw_only=True)
class TrainingConfig:
    """What every training script understands. The help text of each field is its documentation."""

    output_dir: str = flag(
        REQUIRED, "folder of the run: checkpoints, log, validation images, final model", group="run"
    )
    resume: str | None = flag(
        None,
        "'latest' continues from the newest complete checkpoint of --output_dir (a new run if there is none); "
        "or the path of a checkpoint-N folder",
        group="run",
    )
    overwrite: bool = flag(False, "delete the run that --output_dir holds and start again", group="run")
    seed: int = flag(0, "every random draw is a function of it", group="run")
    max_train_steps: int = flag(1000, "number of optimizer steps", group="run", least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "autocast dtype of the forward passes; by default what `accelerate launch` was told", group="run"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, slower", group="run"
    )
    compile: bool = flag(
        False, "compile the repeated blocks of the models: faster on a GPU after a start of minutes", group="run"
    )
    sharding: Literal["none", "fsdp"] = flag(
        "none",
        "fsdp slices weights, gradients, averages and optimizer states over the processes (FSDP2), for models that do "
        "not fit on a GPU; an FSDP configuration of `accelerate launch` switches it on too, a DeepSpeed one ZeRO-2",
        group="run",
    )

    dataset: str = flag(
        "shapes",
        "'shapes' (built in), a folder of images, the Hub id of an image data set, or tar files to stream: their "
        "folder, path/{000..099}.tar, hf://datasets/USER/NAME/*.tar, https://...",
        group="data",
    )
    dataset_config_name: str | None = flag(None, "configuration of a Hub data set that has several", group="data")
    dataset_revision: str | None = flag(None, "branch, tag or commit of a Hub data set", group="data")
    resolution: int = flag(32, "side of the square training images in pixels", group="data", least=1)
    crop: Literal["center", "random", "adm"] = flag("center", "which square of an image is used", group="data")
    resize_ratio: float = flag(1.0, "resize the shorter side to this times --resolution before the crop", group="data")
    resample: Literal["lanczos", "bicubic", "box"] = flag("lanczos", "filter of that resize", group="data")
    flip: bool = flag(False, "mirror each image horizontally with probability 1/2", group="data")
    limit: int | None = flag(None, "use only the first N items of the data set", group="data")
    strict: bool = flag(False, "stop at an unreadable image instead of skipping and counting it", group="data")
    image_column: str | None = flag(None, "column with the images; by default the only one", group="data")
    caption_column: str | None = flag(
        None, "column with the text; by default 'caption' or 'text', and .txt in tar files", group="data"
    )
    label_column: str | None = flag(
        None, "column with the class; by default 'label' or the only one, and .cls in tar files", group="data"
    )
    num_classes: int | None = flag(
        None, "number of classes in tar files, unless classes.txt lies beside them", group="data"
    )
    shuffle_buffer: int = flag(
        1000, "samples of a stream to choose the next one from, per loading worker; 1 keeps their order", group="data"
    )
    validation_split: str = flag(
        "validation",
        "split or sub-folder with images that are not trained on; 'train' shows training images",
        group="data",
    )
    num_validation_images: int = flag(64, "images per validation", group="data", least=1)
    num_workers: int = flag(0, "data loading processes per training process", group="data", least=0)

    batch_size: int = flag(32, "images per process and micro-step", group="optimisation", least=1)
    gradient_accumulation_steps: int = flag(
        1,
        "micro-steps per optimizer step; the global batch is batch_size x gradient_accumulation_steps x processes",
        group="optimisation",
        least=1,
    )
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "muon"] = flag(
        "adamw",
        "adamw8bit needs torchao; adafactor keeps row and column statistics only and ignores --adam_*; muon "
        "orthogonalises the updates of hidden matrices and leaves the rest to AdamW",
        group="optimisation",
    )
    learning_rate: float = flag(1e-4, "peak learning rate", group="optimisation")
    adamw_ratio: float = flag(
        1.0,
        "with --optimizer muon: learning rate of what it leaves to AdamW (embeddings, codes, norms, outer layers) / "
        "--learning_rate",
        group="optimisation",
    )
    lr_schedule: Literal["constant", "cosine", "linear", "lin0"] = flag(
        "constant", "shape after the warm-up; lin0 is VAR's: hold for a twentieth, then linear", group="optimisation"
    )
    warmup_steps: int = flag(0, "steps of linear warm-up", group="optimisation", least=0)
    lr_warmup_start: float = flag(
        0.005, "first learning rate of the warm-up, as a fraction of the peak", group="optimisation"
    )
    lr_final: float = flag(
        0.0, "last learning rate of a decaying schedule, as a fraction of the peak", group="optimisation"
    )
    weight_decay: float = flag(0.01, "decoupled weight decay of matrices and convolutions", group="optimisation")
    weight_decay_end: float | None = flag(
        None,
        "weight decay at the last step, reached by a half cosine; by default it is constant",
        group="optimisation",
    )
    adam_beta1: float = flag(0.9, "decay of AdamW's first moment", group="optimisation")
    adam_beta2: float = flag(0.95, "decay of AdamW's second moment", group="optimisation")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", group="optimisation")
    max_grad_norm: float = flag(
        1.0, "gradients are scaled down to this norm; 0 switches clipping off", group="optimisation", least=0
    )
    max_skipped_steps: int = flag(
        20, "stop after this many consecutive steps whose loss or gradient is not finite", group="optimisation"
    )
    ema_decay: float = flag(
        0.999, "decay of the weight average that is validated and saved; 0 switches it off", group="optimisation"
    )
    ema_warmup: bool = flag(
        True, "use min(ema_decay, (1 + n) / (10 + n)) at step n, so that early weights fade", group="optimisation"
    )

    checkpointing_steps: int = flag(
        500, "write a checkpoint every N steps; 0 only when interrupted and at the end", group="output", least=0
    )
    checkpoints_total_limit: int | None = flag(
        2, "keep only the newest N checkpoints; 'none' keeps all", group="output"
    )
    validation_steps: int = flag(
        500, "validate every N steps and at the end; 0 only at the end", group="output", least=0
    )
    logging_steps: int = flag(
        10, "write a line of log.jsonl (means since the last line) every N steps", group="output", least=1
    )
    final_dtype: Literal["float32", "float16", "bfloat16"] = flag(
        "float32", "dtype of the weights in OUTPUT_DIR/final", group="output"
    )
    progress: bool = flag(True, "show a progress bar", group="output")
    report_to: str | None = flag(
        None,
        "also send log and pictures to these trackers, for example tensorboard or tensorboard,wandb",
        group="output",
    )
    peak_tflops: float | None = flag(
        None,
        "dense TFLOP/s that one device can reach, for the utilisation in the log; by default that of known GPUs",
        group="output",
    )

    push_to_hub: bool = flag(
        False, "upload the result to the Hub at the end (log in first: `hf auth login`)", group="hub"
    )
    push_checkpoints: bool = flag(
        False, "with --push_to_hub: also upload each checkpoint, in the background; the newest is kept", group="hub"
    )
    hub_model_id: str | None = flag(
        None, "repository USER/NAME; by default the name of --output_dir in your namespace", group="hub"
    )
    hub_private: bool = flag(False, "make a new repository private", group="hub")
    hub_revision: str | None = flag(None, "branch, created if it does not exist; by default main", group="hub")
    hub_license: str | None = flag(
        None, "licence of the weights for the model card, for example apache-2.0 or cc-by-nc-4.0", group="hub"
    )

    def __post_init__(self) -> None:
        check_least(self)
        if not self.adamw_ratio > 0:
            raise ValueError(f"--adamw_ratio is {self.adamw_ratio}; it must be positive.")
        if self.peak_tflops is not None and not self.peak_tflops > 0:
            raise ValueError(f"--peak_tflops is {self.peak_tflops}; it must be positive, or 'none'.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"--ema_decay is {self.ema_decay}; it must be in [0, 1), where 0 switches the EMA off.")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(
                f"--checkpoints_total_limit is {self.checkpoints_total_limit}; it must be at least 1, or 'none' to "
                "keep all."
            )
        if self.resume is not None and self.overwrite:
            raise ValueError("--resume continues a run and --overwrite deletes it; give only one of them.")
        if self.push_checkpoints and not self.push_to_hub:
            raise ValueError("--push_checkpoints adds to what --push_to_hub uploads: give --push_to_hub too.")


def _convert(name: str, annotation: Any, value: Any) -> Any:
    """``value`` (a string of the command line or a YAML value) as the type that the field declares."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        (annotation,) = (argument for argument in arguments if argument is not type(None))
        return _convert(name, annotation, value)
    if origin is Literal:
        # YAML reads a bare `no` as False and a bare 1 as a number.
        value = "no" if value is False and "no" in arguments else value
        value = str(value) if type(value) is int else value
        if value in arguments:
            return value
        raise ValueError(f"--{name} is {value!r}; choose one of {', '.join(map(str, arguments))}.")
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, Sequence):
            return tuple(_convert(name, arguments[0], part) for part in parts)
        raise ValueError(f"--{name} is {value!r}; expected a comma-separated list such as 1,2,3.")
    if annotation is bool:
        if isinstance(value, bool):
            return value
        raise ValueError(f"--{name} is {value!r}; expected true or false.")
    if annotation is str:
        if isinstance(value, str):
            return value
        raise ValueError(f"--{name} is {value!r}; expected text (quote it in YAML).")
    try:
        # Through text, because YAML 1.1 reads 1e-4 as text and because int(1.5) would lose the fraction.
        if not isinstance(value, bool):
            return annotation(str(value).strip())
    except ValueError:
        pass
    raise ValueError(f"--{name} is {value!r}; expected a value of type {annotation.__name__}.")


class _Switch(argparse.Action):
    """``--name`` and ``--no_name``."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def _default_text(field: dataclasses.Field) -> str:
    if field.default is REQUIRED:
        return "required"
    if isinstance(field.default, tuple):
        return "default: " + ",".join(map(str, field.default))
    if isinstance(field.default, bool):
        return "default: " + ("on" if field.default else "off")
    return f"default: {'none' if field.default is None else field.default}"


def _metavar(annotation: Any) -> str:
    arguments = [argument for argument in typing.get_args(annotation) if argument is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _metavar(arguments[0])
    if typing.get_origin(annotation) is Literal:
        return "{" + ",".join(arguments) + "}"
    if typing.get_origin(annotation) is tuple:
        return f"{arguments[0].__name__.upper()},..."
    return annotation.__name__.upper()


def _build_parser(config_class: type[TrainingConfig], description: str | None) -> argparse.ArgumentParser:
    hints = typing.get_type_hints(config_class)
    required = [field.name for field in dataclasses.fields(config_class) if field.default is REQUIRED]
    parser = argparse.ArgumentParser(
        # Not all flags: they would hide the message below them.
        usage=" ".join(["%(prog)s [--config FILE]", *(f"--{name} {_metavar(hints[name])}" for name in required)])
        + " [FLAGS; --help lists them]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with values for any of these flags")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of a wrong input")
    groups: dict[str, Any] = {"method": parser.add_argument_group("method")}
    for field in dataclasses.fields(config_class):
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        help_text = f"{field.metadata['help']} ({_default_text(field)})"
        # SUPPRESS leaves flags that were not given out of the namespace, so that they do not hide the file's values.
        common = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_text}
        if hints[field.name] is bool:
            groups[title].add_argument(f"--{field.name}", f"--no_{field.name}", action=_Switch, nargs=0, **common)
        else:
            groups[title].add_argument(f"--{field.name}", metavar=_metavar(hints[field.name]), **common)
    return parser


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The mapping of flag names to values that a YAML or JSON file holds."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"--config {path} is a folder; name a YAML or JSON file with values of flags.")
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is no text; expected a YAML or JSON file with values of flags.") from error
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--config {path} is not valid YAML: {_yaml_problem(error)}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {path} must map flag names to values, one `name: value` per line.")
    for name, value in values.items():
        # Checked before any message shows the value: aliases can make a small file stand for an endless text.
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(x, (dict, list)) for x in value)):
            raise ValueError(f"--config {path} has nested values for {name!r}; expected one value or a list of them.")
    return values


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, in one line; the messages of yaml show the text in several."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split()).rstrip(".")
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"


def make_config(config_class: type[ConfigT], values: dict[str, Any], *, source: str) -> ConfigT:
    """Build a config from loosely typed values; an unknown or missing name is a ``ValueError``."""
    hints = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name in values:
        if name not in fields:
            similar = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {similar[0]!r}?" if similar else f" Known keys: {', '.join(sorted(fields))}."
            raise ValueError(f"{source} sets {name!r}, which {config_class.__name__} does not know.{hint}")
    missing = [name for name, field in fields.items() if field.default is REQUIRED and name not in values]
    if missing:
        raise ValueError(
            f"Missing {', '.join('--' + name for name in missing)}; give it as a flag or in the --config file."
        )
    return config_class(**{name: _convert(name, hints[name], value) for name, value in values.items()})


def parse_config(
    config_class: type[ConfigT], arguments: Sequence[str] | None = None, *, description: str | None = None
) -> ConfigT:
    """Read the command line (``sys.argv`` by default) and the file that ``--config`` names.

    A wrong or unknown value ends the program with the usage line and a message, as argparse does.
    """
    return parse_command_line(config_class, arguments, description=description)[0]


def parse_command_line(
    config_class: type[ConfigT], arguments: Sequence[str] | None = None, *, description: str | None = None
) -> tuple[ConfigT, bool]:
    """What :func:`parse_config` returns, and whether ``--debug`` was given."""
    parser = _build_parser(config_class, description)
    given = vars(parser.parse_args(arguments))
    path, debug = given.pop("config"), given.pop("debug")
    try:
        values = read_config_file(path) if path is not None else {}
        return make_config(config_class, {**values, **given}, source=f"--config {path}"), debug
    except ValueError as error:
        parser.error(str(error))
