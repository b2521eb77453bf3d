"""What the documents show can be pasted: Python runs, commands parse, links and pictures lead somewhere."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from hfgen.cli import build_parser
from hfgen.training import parse_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *sorted((ROOT / "zoo").glob("*/README.md"))]
README = DOCUMENTS[0].read_text(encoding="utf-8")
NETWORK = "<!-- needs the network -->\n"
BLOCK = re.compile(rf"({NETWORK})?```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = [(bool(network), language, code) for network, language, code in BLOCK.findall(README)]
OFFLINE_PYTHON = [code for network, language, code in BLOCKS if language == "python" and not network]
ALL_BLOCKS = [block for document in DOCUMENTS for block in BLOCK.findall(document.read_text(encoding="utf-8"))]
PYTHON = [code for _, language, code in ALL_BLOCKS if language == "python"]
LINES = {
    line.strip()
    for _, language, code in ALL_BLOCKS
    if language == "sh"
    for line in code.replace("\\\n", " ").splitlines()
}
COMMANDS = sorted(shlex.split(line, comments=True) for line in LINES if line)
LAUNCHERS = {"accelerate", "torchrun", "python"}


def test_the_readme_has_examples():
    assert len(BLOCKS) >= 8 and len(OFFLINE_PYTHON) >= 2
    assert {command[0] for command in COMMANDS} >= {"make", "hfgen", "accelerate"}
    assert not [page.name for page in PAGES if f"(docs/{page.name})" not in README]


@pytest.mark.parametrize("code", PYTHON)
def test_python_compiles_and_imports_what_exists(code):
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "hfgen":
            exec(compile(ast.Module([node], []), "document", "exec"), {})


@pytest.mark.parametrize("code", OFFLINE_PYTHON)
def test_python_runs(code, tmp_path, monkeypatch):
    (tmp_path / "zoo").symlink_to(ROOT / "zoo")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    pictures = list(tmp_path.glob("*.png"))
    assert pictures and all(path.stat().st_size > 100 for path in pictures)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_known(command):
    if command[0] == "hfgen":
        build_parser().parse_args(command[1:])
    elif command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif command[0] in LAUNCHERS:
        script = next(ROOT / word for word in command if word.endswith(".py"))
        flags = command[command.index(str(script.relative_to(ROOT))) + 1 :]
        assert script.is_file() and all((ROOT / word).is_file() for word in command if word.endswith(".yaml"))
        if "..." in flags or script.parent.name == "benchmarks":
            return
        spec = importlib.util.spec_from_file_location(script.stem, script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        parse_config(module.Config, flags)
    elif command[0].startswith("."):
        assert all((ROOT / word).exists() for word in command if "/" in word and not word.startswith(".venv"))
    else:
        assert command[0] == "hf", command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        assert not path or (document.parent / path).exists(), f"{document.name} links to {path}"
        if anchor:
            page = (document.parent / path if path else document).read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], f"no heading {anchor}"
