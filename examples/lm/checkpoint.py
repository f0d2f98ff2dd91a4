"""A run in one folder, by ``moeops.distributed``: weights, optimizer, and beside them step, history and random state.

The library writes the whole model, whatever ranks held which experts, and cuts it again for the ranks that load it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.errors import UsageError
from moeops.distributed import read_extra

FORMAT = "moeops-train-lm-4"


def is_saved(path: Path) -> bool:
    """Whether a checkpoint was written to the end."""
    return (path / "checkpoint.json").is_file()


@contextlib.contextmanager
def resuming(path: Path) -> Iterator[None]:
    """Say what a checkpoint that cannot be read means for ``--resume``."""
    try:
        yield
    except FileNotFoundError:
        raise UsageError(
            f"--resume must find a checkpoint, got none at {path}. Check --out or start without --resume."
        ) from None
    except (ValueError, RuntimeError) as err:  # damaged, or another rank could not read it
        raise UsageError(
            f"--resume must find a readable checkpoint, got {path}: {str(err).splitlines()[0]} Remove it or start "
            "without --resume."
        ) from err


def read_state(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Read what is saved beside the tensors, if the checkpoint was written with the same ``config``."""
    with resuming(path):
        state = read_extra(path)
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
