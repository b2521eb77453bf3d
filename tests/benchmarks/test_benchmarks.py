"""The benchmarks run as documented; the sampling one stops with an error unless both paths draw equal tokens."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "sampling": ["--system", "var", "--batch", "2", "--threads", "1", "--repeats", "1"],
    "quality": ["var-shapes", "--images", "16", "--per_class", "1", "--guidance", "2"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_runs_and_writes_json(name, tmp_path):
    output = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *COMMANDS[name], "--json", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())
    if name == "sampling":
        assert rows[0]["ratio"] > 0 and rows[0]["max_pixel_difference"] < 1e-4
    else:
        assert rows["reconstruction"]["psnr"] > 28 and rows["generation"]["2"]["label"] > 0.5
