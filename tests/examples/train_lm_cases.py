"""Where train_lm.py is, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_lm.py"


def read_metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())
