"""The LoRA example end to end, with few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "finetune_lora.py"


@pytest.mark.slow
def test_example(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "12", "--layers", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(Qwen3MoeExperts): fused" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["losses"][-1] < results["losses"][0]
    assert results["after"] < results["before"]
    assert results["loaded"] == results["after"]
    assert results["merged"] == pytest.approx(results["after"], rel=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
