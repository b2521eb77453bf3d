"""The modules of benchmarks/, which find each other only when one of them is run as a script."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark_modules(*names: str) -> dict[str, ModuleType]:
    """Modules by name."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.pop(0)
