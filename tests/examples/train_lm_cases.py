"""Where train_lm.py is, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from moeops.distributed import merge_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_lm.py"


def read_checkpoint(folder: Path) -> dict:
    """The whole model and optimizer, as one file would hold them, and what is saved beside them."""
    merged = folder.with_suffix(".merged")
    merge_checkpoint(folder, merged)
    state = torch.load(merged, weights_only=True)
    merged.unlink()
    return {**state["extra"], "model": state["model"], "optimizer": state["optimizer"]}


def read_metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())
