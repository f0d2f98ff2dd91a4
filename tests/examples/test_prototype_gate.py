"""The prototyping example end to end, with few steps."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

try:
    importlib.metadata.version("numba")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("numba is not installed: pip install 'moeops[numba]'", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "prototype_gate.py"


def test_example(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "12", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu: 16 samples in float32, float64, bfloat16, values agree" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["gate"].split(" (")[0] for r in results] == ["near ties", "naive", "switch"]
    for r in results:
        assert len(r["losses"]) == 12
        assert r["losses"][-1] < r["losses"][0]
    cost = [r["experts_per_token"] for r in results]
    assert cost[1:] == [2.0, 1.0]
    assert 1.0 <= cost[0] <= 2.0
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    assert (tmp_path / "prototype_gate.png").read_bytes().startswith(b"\x89PNG")


def test_bad_option(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2
    assert "--steps must be at least 2, got 1" in done.stderr
