"""Settings files run nothing, and the package itself calls nothing that would run what a file says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hfgen.commands.convert import read_settings
from hfgen.training.config import TrainingConfig, make_config, read_config_file
from support.bounded import assert_refused

ROOT = Path(__file__).resolve().parents[2]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghij", "bcdefghijk")
)
SETTINGS = {
    "tag": "output_dir: !!python/object/apply:os.system ['touch executed']",
    "name": "output_dir: !!python/name:os.system",
    "nested": "output_dir: " + "[" * 500 + "]" * 500,
    "aliases": LAUGHS + "batch_size: *k\n",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_settings(tmp_path, name):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS[name])
    assert_refused(
        lambda: make_config(TrainingConfig, read_config_file(path), source="settings.yaml"),
        "settings.yaml",
        megabytes=500,
    )


@pytest.mark.parametrize("name", ["tag", "name", "nested"])
def test_settings_of_the_converter(tmp_path, name):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS[name])
    assert_refused(lambda: read_settings(path), "settings.yaml", megabytes=500)


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "dill.load",
    "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "tarfile.extractall", "shutil.unpack_archive",
}  # fmt: skip
# The one reader that runs a pickle, and only if the caller says so.
ON_REQUEST = {("conversion/checkpoints.py", "not allow_pickle")}


def _complaints(path: Path, root: Path = ROOT) -> list[str]:
    where = path.relative_to(root).as_posix()
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        line = f"{where}:{node.lineno}: {ast.unparse(node)[:80]}"
        if name in FORBIDDEN or name.endswith((".extractall", ".extract")):
            found.append(line)
        if name == "torch.load" and options.get("weights_only") != "True":
            if (where, options.get("weights_only")) not in ON_REQUEST:
                found.append(line)
        if name in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            found.append(line)
        if options.get("trust_remote_code", "False") == "True" or options.get("shell", "False") == "True":
            found.append(line)
    return found


def test_nothing_in_the_package_runs_what_a_file_says():
    paths = [
        path for folder in ("hfgen", "pipelines", "conversion", "examples") for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(paths) > 50
    found = [complaint for path in sorted(paths) for complaint in _complaints(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code", ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "eval(x)",
             "f(trust_remote_code=True)", "archive.extractall(p)"],
)  # fmt: skip
def test_the_search_finds_such_calls(tmp_path, code):
    (tmp_path / "module.py").write_text(code)
    assert len(_complaints(tmp_path / "module.py", tmp_path)) == 1
