"""FastMoE's helpers for groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def get_torch_default_comm() -> ProcessGroup:
    """The process group of the whole job.

    Raises:
        RuntimeError: torch.distributed is not initialised.
    """
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "get_torch_default_comm: torch.distributed must be initialised, got no default group. Call "
            "torch.distributed.init_process_group first."
        )
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def get_rank_0_in_comm(comm: ProcessGroup | None) -> int:
    """The global rank of a group's first rank."""
    return torch.distributed.get_global_rank(comm or get_torch_default_comm(), 0)
