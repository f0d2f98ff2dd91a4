"""Where train_lm.py is, what it writes, and how to stop it. conftest.py puts examples/ on the path."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import torch
from lm.checkpoint import is_saved

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


def stop_once_saved(command: list, out: Path) -> tuple[int, str, str]:
    """Start training and press Ctrl-C when there is a checkpoint: exit code, stdout and stderr."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    # Written first at step 20.
    while not is_saved(out / "moe-checkpoint") and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr
