"""Whose numbers are the default, and which group FastMoE's functions use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moeops.comm.groups import RankGroup, rank_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_compat = False
_group: ProcessGroup | None = None


def set_compat(compat: bool) -> None:
    """Set the default of every ``compat=``."""
    global _compat
    _compat = bool(compat)


def use_compat(compat: bool | None) -> bool:
    """What an argument ``compat`` means: ``None`` is what ``install`` was told."""
    return _compat if compat is None else bool(compat)


def set_group(group: ProcessGroup | None) -> None:
    """Set the group of the functions that take none."""
    global _group
    _group = group


def get_group() -> ProcessGroup | None:
    """The group of the functions that take none, the whole job if nobody has set one."""
    dist = torch.distributed
    if _group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return _group


def function_group(op: str, world_size: int) -> RankGroup | None:
    """The group for ``world_size`` ranks, ``None`` for one."""
    if world_size == 1:
        return None
    group = rank_group(get_group())
    if group is None or group.size != world_size:
        got: Any = "none" if group is None else f"one of {group.size}"
        raise ValueError(
            f"{op}: there must be a group of {world_size} ranks, got {got}. Call torch.distributed.init_process_group, "
            "and ensure_comm with the group that holds the experts."
        )
    return group
