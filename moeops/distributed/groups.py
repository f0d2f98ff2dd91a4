"""Which ranks work together. W ranks in a group, E experts in total, E_local experts on a rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from moeops.ops import _checks
from moeops.ops._groups import RankGroup, describe_group, rank_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["RankGroup", "agreement", "expert_group", "expert_range", "rank_group", "slice_group_of"]


def expert_group(
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
    group = rank_group(group) or RankGroup("", 1, 0)
    if num_experts % group.size != 0:
        raise ValueError(
            f"expert_range: num_experts must be a multiple of the {group.size} ranks of group {group.name!r}, got "
            f"{num_experts} on rank {group.rank}. Choose another number of experts or ranks."
        )
    share = num_experts // group.size
    return range(group.rank * share, (group.rank + 1) * share)


@contextlib.contextmanager
def agreement(
    op: str, group: RankGroup | None, settings: dict[str, Any], device: Any = None
) -> Iterator[None]:
    """Run the block on every rank of a group; raise on all of them if it fails on one, or if settings differ.

    Args:
        op: the layer's name, for error messages.
        group: the ranks; nothing is compared for ``None``.
        settings: what must be equal on all ranks. The block may add to it.
        device: where NCCL may put a few bytes; torch's current device if it is not a CUDA device.

    Raises:
        ValueError: a setting differs between ranks.  RuntimeError: the block failed on another rank.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as err:
        if group is None:
            raise
        failure = err
    if group is None:
        return
    answers = _all_gather(group, (settings, None if failure is None else str(failure)), device)
    if failure is not None:
        raise failure
    for rank, (theirs, error) in enumerate(answers):
        if error is not None:
            raise RuntimeError(
                f"{op}: every rank of {describe_group(group)} must build the layer, got an error on rank {rank}: "
                f"{error}"
            )
        for name, mine in settings.items():
            if theirs.get(name) != mine:
                raise ValueError(
                    f"{op}: {name} must be the same on every rank of group {group.name!r}, got {mine} on rank "
                    f"{group.rank} of {group.size} and {theirs.get(name)} on rank {rank}. Build the layer with the "
                    "same arguments everywhere."
                )


def _all_gather(group: RankGroup, value: Any, device: Any) -> list[Any]:
    """Every rank's value, by rank."""
    from torch.distributed import all_gather_object, distributed_c10d, get_backend

    process_group = distributed_c10d._resolve_process_group(group.name)  # type: ignore[arg-type]
    if get_backend(process_group) == "fake":  # torch's stand-in for a group, which sends nothing
        return [value] * group.size
    answers: list[Any] = [None] * group.size
    place = torch.device(device) if device is not None else torch.device("cpu")
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        all_gather_object(answers, value, group=process_group)
    return answers
