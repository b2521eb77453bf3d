"""What setup.py states: every folder with code becomes a package, and the lists of requirements fit each other."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

import hfgen

ROOT = Path(__file__).resolve().parents[2]
MAPPED = {"hfgen": "hfgen", "pipelines": "hfgen.pipelines", "conversion": "hfgen.conversion"}


@pytest.fixture(scope="module")
def arguments():
    """What setup.py passes to setup()."""
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        patch.setattr(setuptools, "setup", found.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_every_folder_with_code_is_a_package(arguments):
    expected = set()
    for folder, package in MAPPED.items():
        for path in (ROOT / folder).rglob("*.py"):
            expected.add(".".join((package, *path.parent.relative_to(ROOT / folder).parts)))
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} is left out of the wheel"
    assert set(arguments["packages"]) == expected and len(arguments["packages"]) == len(expected)
    assert arguments["package_dir"] == {package: folder for folder, package in MAPPED.items()}


def test_metadata(arguments):
    assert arguments["version"] == hfgen.__version__
    assert arguments["entry_points"]["console_scripts"] == ["hfgen = hfgen.cli:main"]
    assert set(arguments["extras_require"]) == {"train", "eval", "lora", "adamw8bit", "deepspeed", "test"}


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_requirement_has_a_tested_version(arguments):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in constraints), "versions without local tag"
    required = sum(arguments["extras_require"].values(), arguments["install_requires"])
    assert requirement_names(required) <= requirement_names(constraints)


def test_imports_are_required(arguments):
    """The package imports nothing that only another package happens to bring along."""
    extras = [line for extra, lines in arguments["extras_require"].items() if extra != "test" for line in lines]
    distribution = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    allowed = requirement_names([*arguments["install_requires"], *extras])
    for folder in MAPPED:
        for path in (ROOT / folder).rglob("*.py"):
            for name in imports(path) - sys.stdlib_module_names - {"hfgen"}:
                assert distribution.get(name, name) in allowed, f"{path.relative_to(ROOT)} imports {name}"


def imports(path: Path) -> set[str]:
    """The top packages that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names
