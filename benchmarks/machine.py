"""What a number was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """Machine, driver, versions, threads and commit; ``commit`` is for a checkout without git."""
    info: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("moeops", "transformers", "triton"):
        info[package] = _version(package)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_memory_mb": properties.total_memory >> 20,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_mb": properties.L2_cache_size >> 20,
            "cuda": torch.version.cuda,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return info


def _run(*command: str) -> str | None:
    """First line a command prints, None where it cannot run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip()


def _commit() -> str | None:
    commit = _run("git", "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit + ("-dirty" if _run("git", "status", "--porcelain", "-uno") else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
