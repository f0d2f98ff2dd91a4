"""Which ranks work together. W ranks in a group, E experts in total, E_local experts on a rank."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from moeops import _checks
from moeops._imports import constant_when_traced

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

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


ALONE = RankGroup("", 1, 0)  # this rank, without torch.distributed


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
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a str


@constant_when_traced
def works_by(backend: str, name: str, device_type: str) -> bool:
    """Whether the group of this name works on such devices by this backend, such as "gloo"."""
    config = torch.distributed.get_backend_config(process_group(name))
    return f"{device_type}:{backend}" in config.split(",")


def timeout_of(group: RankGroup) -> timedelta | None:
    """Time after which the group gives a collective up; ``None`` for a backend without such an option."""
    resolved = process_group(group.name)
    try:
        return resolved._get_backend(resolved._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):
        return None


def describe_timeout(group: RankGroup) -> str:
    """``30 s`` for error messages."""
    timeout = timeout_of(group)
    return "an unknown time" if timeout is None else f"{timeout.total_seconds():g} s"


def moe_group_of(
    op: str,
    world_size: int,
    moe_group: ProcessGroup | RankGroup | None,
    device_mesh: DeviceMesh | None,
) -> RankGroup | None:
    """Find the ranks that hold a layer's experts.

    Args:
        op: the layer's name, for error messages.
        world_size: ``W``; with a mesh 1 means "as the mesh says".
        moe_group: the ranks; ``None`` means all of the job, if ``world_size`` is above 1.
        device_mesh: a mesh of one dimension, instead of ``moe_group``.

    Returns:
        The group, or ``None`` where every expert is on this rank.

    Raises:
        ValueError: the group is not of ``world_size`` ranks or does not hold this rank.  TypeError: it is no group.
        RuntimeError: torch.distributed is not initialised.
    """
    _checks.check_int(op, "world_size", world_size, 1, "Use 1 for one rank.")
    if device_mesh is not None:
        if moe_group is not None:
            raise ValueError(
                f"{op}: moe_group must be None where device_mesh is given, got both. Pass one of them."
            )
        if getattr(device_mesh, "ndim", None) != 1:
            raise ValueError(
                f"{op}: device_mesh must have 1 dimension, got {device_mesh!r}. Pass the one that holds the experts, "
                'such as mesh["ep"].'
            )
        if device_mesh.get_coordinate() is None:
            raise ValueError(
                f"{op}: device_mesh must hold this rank, got {device_mesh!r} on rank "
                f"{torch.distributed.get_rank()}. Build the layer on the mesh's ranks only."
            )
        moe_group = device_mesh.get_group()
        world_size = device_mesh.size() if world_size == 1 else world_size
    elif moe_group is None:
        if world_size == 1:
            return None
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{op}: world_size must be 1 before torch.distributed is initialised, got {world_size}. Call "
                "torch.distributed.init_process_group first, and start the program with torchrun."
            )
        moe_group = dist.group.WORLD
    try:
        group = rank_group(moe_group)
    except (ValueError, TypeError) as err:
        raise type(err)(f"{op}: moe_group does not fit: {err}") from err
    assert group is not None
    if group.size != world_size:
        raise ValueError(
            f"{op}: world_size must be the size of the group that holds the experts, got {world_size} and "
            f"{describe_group(group)}. Pass world_size={group.size}, or another moe_group."
        )
    return group if group.size > 1 else None


def slice_group_of(op: str, mp_group: Any, slice_group: Any) -> RankGroup | None:
    """Find the ranks that hold the same tokens, ``None`` for this rank alone; ``mp_group`` is the old name."""
    if mp_group is not None and slice_group is not None and mp_group is not slice_group:
        raise ValueError(
            f"{op}: mp_group must be None where slice_group is given, got both. It is slice_group's old name."
        )
    name = "mp_group" if slice_group is None else "slice_group"
    try:
        group = rank_group(mp_group if slice_group is None else slice_group)
    except (ValueError, TypeError) as err:
        raise type(err)(f"{op}: {name} does not fit: {err}") from err
    return group if group is not None and group.size > 1 else None


def expert_range(num_experts: int, group: ProcessGroup | RankGroup | None) -> range:
    """Say which of all experts this rank holds: equal shares, in the order of ranks.

    Args:
        num_experts: ``E``, a multiple of ``W``.
        group: the ranks that share the experts; ``None`` for this rank alone.

    Returns:
        The ids of this rank's experts; its length is the layer's ``num_expert``.

    Raises:
        ValueError: ``E`` is not a multiple of ``W``.  TypeError: it is not an int.

    Example:
        >>> expert_range(8, RankGroup("0", 4, 1))
        range(2, 4)
    """
    _checks.check_int("expert_range", "num_experts", num_experts, 1, "Pass all experts.")
    group = rank_group(group) or ALONE
    if num_experts % group.size != 0:
        raise ValueError(
            f"expert_range: num_experts must be a multiple of the {group.size} ranks of group {group.name!r}, got "
            f"{num_experts} on rank {group.rank}. Choose another number of experts or ranks."
        )
    share = num_experts // group.size
    return range(group.rank * share, (group.rank + 1) * share)
