"""One file holds a whole run: weights, optimizer, step, history, random state. Plain tensors, numbers and strings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lm.errors import UsageError

FORMAT = "moeops-train-lm-3"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds the old file or the new one, never half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint that was written with the same ``config``; runs no code from the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(
            f"--resume must find a checkpoint, got none at {path}. Check --out or start without --resume."
        ) from None
    except Exception as err:  # a damaged file fails in many ways: zip, pickle, EOF, OS
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise UsageError(
            f"--resume must find a readable checkpoint, got {path}: {reason}. Remove it or start without --resume."
        ) from err
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(
            f"--resume must find a checkpoint of train_lm.py ({FORMAT}), got {path}. Pass another --out."
        )
    for name, value in config.items():
        saved = state["config"].get(name)
        if saved != value:
            raise UsageError(
                f"--resume must go on with the checkpoint's configuration, got {name} = {value!r} where {path} has "
                f"{saved!r}. Pass the same options or another --out."
            )
    return state
