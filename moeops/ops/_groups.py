"""Groups of ranks as ops, graphs, ``deepcopy`` and pickle can hold them. W ranks in a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moeops.ops import _checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

if torch.distributed.is_available():
    # Registers the fakes and gradients of torch.ops._c10d_functional; it starts nothing.
    import torch.distributed._functional_collectives


class RankGroup(NamedTuple):
    """A process group in plain numbers: what ops, graphs, ``deepcopy`` and pickle can hold.

    Attributes:
        name: the group's name in torch.distributed, equal on all its ranks.
        size: ``W``.
        rank: this process's place in the group, from 0 to ``W - 1``.
    """

    name: str
    size: int
    rank: int


def rank_group(group: ProcessGroup | RankGroup | None) -> RankGroup | None:
    """Describe a process group in plain numbers. Call it where a layer or gate is built, and keep the result.

    Args:
        group: a process group that holds this rank, what this function returned for one, or ``None``.

    Returns:
        The group's RankGroup, ``None`` for ``None`` (this rank alone).

    Raises:
        TypeError: ``group`` is no process group.  ValueError: it does not hold this rank.

    Example:
        >>> rank_group(None) is None
        True
    """
    if group is None or isinstance(group, RankGroup):
        return group
    # Dynamo knows the methods of a process group, and hasattr of none.
    if not torch.compiler.is_compiling() and not hasattr(group, "group_name"):
        # new_group returns this int, and not a group, on ranks that are not in the list.
        if isinstance(group, int):
            raise ValueError(
                "rank_group: group must hold this rank, got GroupMember.NON_GROUP_MEMBER. Use it on its ranks only."
            )
        raise TypeError(
            f"rank_group: group must be a torch.distributed.ProcessGroup or None, got {_checks.describe(group)}. "
            "Pass what new_group or DeviceMesh.get_group returned."
        )
    return RankGroup(group.group_name, group.size(), group.rank())


def describe_group(group: RankGroup) -> str:
    """``group '0' (rank 1 of 4)`` for error messages."""
    return f"group {group.name!r} (rank {group.rank} of {group.size})"


def process_group(name: str) -> ProcessGroup:
    """Return the process group of this name."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def timeout_of(group: RankGroup) -> str:
    """Seconds after which the group gives a collective up, as text for error messages."""
    resolved = process_group(group.name)
    try:
        backend = resolved._get_backend(resolved._device_types[0])
        return f"{backend.options._timeout.total_seconds():g} s"
    except (AttributeError, IndexError, RuntimeError):  # a backend without such options
        return "an unknown time"
