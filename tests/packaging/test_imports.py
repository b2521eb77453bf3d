"""Imports point one way, every module is reached as `hfgen....`, and no file knows the machine it was written on."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hfgen

ROOT = Path(__file__).resolve().parents[2]

# What each part of the package may import, besides itself; docs/architecture.md shows the same as a picture.
# A name covers the modules below it, and the most specific name decides.
BASE = {"hfgen.counters", "hfgen.models.modeling", "hfgen.models.untrusted", "hfgen.publishing"}
LAYERS = {"hfgen.models.layers"}
QUANTIZERS = LAYERS | {"hfgen.models.quantizers"}
MODELS = QUANTIZERS | {"hfgen.models.tokenizers", "hfgen.models.generators"}
SAMPLING = {"hfgen.schedulers", "hfgen.sampling"}
PIPELINES = MODELS | SAMPLING | {"hfgen.images", "hfgen.pipelines"}
TRAINING = PIPELINES | {"hfgen.conversion", "hfgen.losses", "hfgen.data", "hfgen.evaluation", "hfgen.training"}
TOP = TRAINING | {
    "hfgen",
    "hfgen.hub",
    "hfgen.auto",
    "hfgen.systems",
    "hfgen.cards",
    "hfgen.downloads",
    "hfgen.official",
}
ALLOWED = {
    "hfgen": {"hfgen.hub"},
    "hfgen.hub": set(),
    "hfgen.counters": set(),
    "hfgen.images": {"hfgen.data"},
    "hfgen.systems": set(),
    "hfgen.auto": {"hfgen", "hfgen.downloads"},
    "hfgen.cards": {"hfgen", "hfgen.systems"},
    "hfgen.publishing": {"hfgen", "hfgen.cards"},
    "hfgen.downloads": set(),
    "hfgen.official": TRAINING | {"hfgen", "hfgen.auto", "hfgen.cards", "hfgen.downloads", "hfgen.systems"},
    "hfgen.models": set(),
    "hfgen.models.modeling": set(),
    "hfgen.models.untrusted": set(),
    "hfgen.models.layers": set(),
    "hfgen.models.quantizers": LAYERS,
    "hfgen.models.tokenizers": QUANTIZERS,
    "hfgen.models.generators": QUANTIZERS,
    "hfgen.schedulers": SAMPLING,
    "hfgen.sampling": set(),
    "hfgen.pipelines": MODELS | SAMPLING | {"hfgen.images"},
    "hfgen.conversion": PIPELINES,
    "hfgen.losses": LAYERS,
    "hfgen.data": set(),
    "hfgen.evaluation": MODELS | {"hfgen.data", "hfgen.images"},
    "hfgen.training": TRAINING | {"hfgen", "hfgen.cards", "hfgen.downloads"},
    "hfgen.commands": TOP,
    "hfgen.cli": {"hfgen", "hfgen.commands"},
    "hfgen.__main__": {"hfgen.cli"},
}
# Imports inside a function that close a loop on purpose.
DEFERRED = {("hfgen.models.modeling", "hfgen.conversion")}


def sources() -> dict[str, Path]:
    """Module name -> file, for the package and the folders that setup.py maps into it."""
    modules = {}
    for prefix, folder in (("hfgen", "hfgen"), ("hfgen.pipelines", "pipelines"), ("hfgen.conversion", "conversion")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return modules


def imported_modules(module: str, path: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            base = package.rsplit(".", node.level - 1)[0] if node.level else None
            name = ".".join(part for part in (base, node.module) if part)
            # `from hfgen.models import layers` imports a module, `from hfgen.counters import generator` does not.
            names.update(f"{name}.{alias.name}" if f"{name}.{alias.name}" in MODULES else name for alias in node.names)
    return names


def owner(module: str, names) -> str | None:
    """The most specific of ``names`` that contains ``module``."""
    holders = [name for name in names if module == name or module.startswith(name + ".")]
    return max(holders, key=len, default=None)


def part_of(module: str) -> str:
    """The row of ``ALLOWED`` that a module belongs to; `hfgen` itself stands for hfgen/__init__.py alone."""
    part = owner(module, ALLOWED)
    assert part is not None and (part != "hfgen" or module == "hfgen"), (
        f"{module} belongs to no part of the package: add it to ALLOWED and to docs/architecture.md"
    )
    return part


MODULES = sources()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    part = part_of(module)
    for name in imported_modules(module, MODULES[module]):
        if name.partition(".")[0] != "hfgen":
            assert name.partition(".")[0] not in ("pipelines", "conversion", "zoo", "examples", "tests"), (
                f"{module} imports {name}, which is not a package once hfgen is installed"
            )
            continue
        target = part_of(name)
        assert target in ALLOWED[part] | BASE | {part} or (part, target) in DEFERRED, (
            f"{module} imports {name}, but {part} stands below {target}"
        )


def test_the_allowed_imports_have_no_circle():
    remaining = {part: (allowed | BASE) & ALLOWED.keys() - {part} for part, allowed in ALLOWED.items()}
    for part in BASE:
        remaining[part] = set()
    while remaining:
        free = [part for part, needs in remaining.items() if not needs & remaining.keys()]
        assert free, f"these parts need each other: {sorted(remaining)}"
        for part in free:
            del remaining[part]


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_the_installed_names(script):
    for name in imported_modules(script.stem, script):
        assert name.partition(".")[0] not in ("pipelines", "conversion", "zoo", "examples", "tests"), name


def test_every_module_imports_and_none_twice():
    code = (
        "import importlib, sys\n"
        f"for module in {sorted(set(MODULES) - {'hfgen.__main__'})!r}:\n"
        "    importlib.import_module(module)\n"
        "twice = [name for name in sys.modules if name.partition('.')[0] in ('pipelines', 'conversion', 'zoo')]\n"
        "sys.exit(f'loaded under a second name: {twice}' if twice else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_public_name_exists_where_it_says():
    for name in hfgen.__all__:
        value = getattr(hfgen, name)
        module = getattr(value, "__module__", None)
        if module is not None:
            assert getattr(importlib.import_module(module), name) is value


def test_import_hfgen_is_light():
    code = "import hfgen, sys; sys.exit(','.join(sys.modules.keys() & {'torch', 'diffusers', 'transformers'}) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, f"import hfgen loads {result.stderr}"


# Spelt in pieces, so that this file passes its own test.
HOMES = ("/work", "/root", "/tmp", r"/home/\w+", "/Users")
MACHINE_PATHS = re.compile("|".join(rf"(?<![\w.\])}}]){home}/" for home in HOMES))
FOLDERS = ("hfgen", "pipelines", "conversion", "examples", "benchmarks", "tests", "docs", "zoo", ".ci")
BINARY = {".safetensors", ".png", ".npz", ".pyc"}


def text_files() -> list[Path]:
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a file in a work tree
    for folder in FOLDERS:
        files.extend(path for path in (ROOT / folder).rglob("*") if path.is_file())
    return [path for path in files if path.suffix not in BINARY]


def test_no_file_contains_a_path_of_one_machine():
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_sources_are_ascii():
    found = [str(path.relative_to(ROOT)) for path in MODULES.values() if not path.read_text("utf-8").isascii()]
    assert not found
