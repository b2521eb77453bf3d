"""Checks the files in the wheel and in the source distribution: python .ci/check_distribution.py dist"""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folder of the repository -> folder of the package.
FOLDERS = {"hfgen": "hfgen", "pipelines": "hfgen/pipelines", "conversion": "hfgen/conversion"}
SOURCE_FILES = {
    "setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "CONTRIBUTING.md", "LICENSE",
    "docs/architecture.md", "examples/demo.py", "tests/conftest.py",
}  # fmt: skip


def sources(rename: dict[str, str]) -> set[str]:
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in rename.items()
        for path in (ROOT / folder).rglob("*.py")
    }


def fail_unless_equal(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        sys.exit(f"{what}: missing {sorted(expected - found)}, unexpected {sorted(found - expected)}")


def main() -> None:
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith(".dist-info/entry_points.txt"))
        if "hfgen = hfgen.cli:main" not in archive.read(entry_points).decode():
            sys.exit(f"{wheel.name}: the command hfgen is missing")
    if not any(name.endswith("/LICENSE") for name in names):
        sys.exit(f"{wheel.name}: LICENSE is missing")
    fail_unless_equal(wheel.name, {name for name in names if ".dist-info/" not in name}, sources(FOLDERS))

    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = SOURCE_FILES | sources({folder: folder for folder in FOLDERS})
    if not expected <= names:
        sys.exit(f"{sdist.name}: missing {sorted(expected - names)}")
    if unwanted := [name for name in names if name.startswith((".venv", ".git/", "dist", "runs", "outputs"))]:
        sys.exit(f"{sdist.name}: unexpected {sorted(unwanted)[:10]}")
    print(f"{wheel.name} and {sdist.name} hold what they should")


if __name__ == "__main__":
    main()
