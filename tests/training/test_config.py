from __future__ import annotations

import dataclasses
import json

import pytest

from hfgen.training import REQUIRED, TrainingConfig, flag, parse_config


@dataclasses.dataclass(kw_only=True)
class Config(TrainingConfig):
    depth: int = flag(REQUIRED, "number of blocks")
    sides: tuple[int, ...] = flag((1, 2), "sizes")
    rate: float | None = flag(None, "an optional number")


@pytest.fixture
def base(tmp_path):
    return ["--output_dir", str(tmp_path / "run")]


def _error(capsys, arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_flags_over_file_over_defaults(tmp_path, base):
    file = tmp_path / "recipe.yaml"
    # YAML 1.1 reads 1e-4 as text and a bare no as False.
    file.write_text("depth: 3\nlearning_rate: 1e-4\nsides: [1, 4]\nmixed_precision: no\nflip: true\nrate: none\n")
    config = parse_config(Config, [*base, "--config", str(file), "--depth", "5", "--no_progress"])
    assert (config.depth, config.learning_rate, config.sides) == (5, 1e-4, (1, 4))
    assert (config.mixed_precision, config.flip, config.rate) == ("no", True, None)
    assert config.progress is False and config.seed == 0


def test_lists_switches_and_none(base):
    config = parse_config(
        Config, [*base, "--depth=1", "--sides", "1,2,3", "--flip", "--checkpoints_total_limit", "none", "--rate", "2"]
    )
    assert (config.sides, config.flip, config.checkpoints_total_limit, config.rate) == ((1, 2, 3), True, None, 2.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "sets 'learning_rat'.*Did you mean 'learning_rate'"),
        ("zzz: 1", "sets 'zzz'.*Known keys: .*adam_beta1"),
        ("depth: 1.5", "--depth is 1.5; expected a value of type int"),
        ("depth: true", "--depth is True"),
        ("flip: maybe", "--flip is 'maybe'; expected true or false"),
        ("lr_schedule: cosin", "--lr_schedule is 'cosin'; choose one of constant, cosine"),
        ("sides: 3", "--sides is 3; expected a comma-separated list"),
        ("- 1", "must map flag names to values"),
        ("a: [", "is not valid YAML: .* in line 2, column 1"),
        ("# Title\n\nSome *text*: and `more`: here.", "is not valid YAML: .* in line 3"),
        ("Some text.", "must map flag names to values"),
        (b"\x89PNG\xff\x00", "is no text; expected a YAML or JSON file"),
        (None, "is a folder; name a YAML or JSON file"),
    ],
)
def test_errors_of_a_file_name_the_key(tmp_path, base, capsys, line, message):
    file = tmp_path / "recipe.yaml"
    if line is None:
        file.mkdir()
    else:
        file.write_bytes(line if isinstance(line, bytes) else f"{line}\n".encode())
    arguments = [*base, "--config", str(file)]
    if not str(line).startswith("depth"):
        arguments += ["--depth", "1"]
    error = " ".join(_error(capsys, arguments).split())
    import re

    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing --depth"),
        (["--depth", "x"], "--depth is 'x'"),
        (["--depth", "1", "--unknown", "2"], "--unknown"),
        (["--depth", "1", "--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
        (["--depth", "1", "--ema_decay", "1"], "--ema_decay is 1.0"),
        (["--depth", "1", "--peak_tflops", "0"], "--peak_tflops is 0.0; it must be positive"),
        (["--depth", "1", "--optimizer", "sgd"], "--optimizer is 'sgd'; choose one of adamw, adamw8bit, adafactor"),
        (["--depth", "1", "--resume", "latest", "--overwrite"], "give only one"),
        (["--depth", "1", "--config", "missing.yaml"], "there is no such file"),
        (["--dept", "1"], "--dept"),
    ],
)
def test_errors_of_the_command_line(base, capsys, arguments, message):
    assert message in _error(capsys, [*base, *arguments])


@dataclasses.dataclass(kw_only=True)
class Bounded(TrainingConfig):
    batch_size: int = flag(2, "with another default", group="optimisation")
    width: int | None = flag(None, "a size", least=2)
    sizes: tuple[int, ...] = flag((3, 1), "sizes", least=1)
    start: int = flag(0, "a step", least=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch_size is 0; it must be at least 1"),  # a bound of the base class
        ({"width": 1}, "--width is 1; it must be at least 2"),
        ({"sizes": (3, 0)}, "--sizes is 3,0; each of its numbers must be at least 1"),
        ({"sizes": ()}, "--sizes is empty; each of its numbers must be at least 1"),
        ({"start": -1}, "--start is -1; it must not be negative"),
        ({"max_grad_norm": float("nan")}, "--max_grad_norm is nan; it must not be negative"),
    ],
)
def test_values_have_a_least_one(values, message):
    Bounded(output_dir="x", width=2, sizes=(1,), start=0, max_grad_norm=0.0)
    with pytest.raises(ValueError, match=message):
        Bounded(output_dir="x", **values)


def test_the_record_of_a_run_is_a_config_file(tmp_path, base):
    config = parse_config(Config, [*base, "--depth", "2", "--sides", "1,5", "--rate", "0.5"])
    file = tmp_path / "training_config.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    assert parse_config(Config, ["--config", str(file)]) == config


def test_the_record_that_a_run_leaves_repeats_it(toy, tmp_path):
    """The file that the trainer writes, given to --config with another folder, is the same run bit for bit."""
    toy.fit(toy.config(tmp_path / "first", seed=3, optimizer="adafactor", weight_decay_end=0.2, max_grad_norm=0.5))
    record = tmp_path / "first" / "training_config.json"
    config = parse_config(TrainingConfig, ["--config", str(record), "--output_dir", str(tmp_path / "second")])
    toy.fit(config)
    assert toy.records(tmp_path / "first") == toy.records(tmp_path / "second")
    weights = [(tmp_path / name / "final" / "diffusion_pytorch_model.safetensors") for name in ("first", "second")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, ["--help"], description="What it does.")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text and field.metadata["help"].split("'")[0].strip() in text
    for shown in (
        "(default: 1,2)",
        "(required)",
        "(default: 0.0001)",
        "--no_flip",
        "(default: off)",
        "(default: none)",
    ):
        assert shown in text, shown
