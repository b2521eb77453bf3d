"""Start a script in several processes (gloo, CPU), as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Of a child that imports hfgen and the tests' support package from this checkout."""
    folders = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def torchrun(script: Path, *arguments: str | Path, processes: int = 2) -> str:
    """Run ``script`` under torchrun and return its standard error; it must succeed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
        str(script), *map(str, arguments),
    ]  # fmt: skip
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr
