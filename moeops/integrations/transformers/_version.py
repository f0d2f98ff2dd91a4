"""Which transformers this integration works with."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

OLDEST = (5, 8)  # the first to accept names that transformers itself does not know


def require_transformers() -> None:
    """Raise ImportError with what to install, unless transformers is there and new enough."""
    wanted = ".".join(map(str, OLDEST))
    command = 'Install it with pip install "moeops[transformers]".'
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            "moeops.integrations.transformers: transformers must be installed, "
            f"{wanted} or newer, got none. {command}"
        ) from None
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"moeops.integrations.transformers: transformers must be {wanted} or newer, got {installed}, which "
            f"takes no experts implementation of another project. {command}"
        )


def has_expert_parallel() -> bool:
    """Whether this transformers takes an implementation of expert parallelism from another project."""
    module = importlib.util.find_spec("transformers.distributed.expert_parallel")
    return module is not None and torch.distributed.is_available()
