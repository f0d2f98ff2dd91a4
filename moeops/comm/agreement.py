"""Every rank of a group does something, or all of them raise. W ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from moeops.comm.groups import RankGroup, process_group
from moeops.comm.wires import guarded

T = TypeVar("T")


def everywhere(
    op: str, group: RankGroup | None, work: Callable[[], T], device: Any = None
) -> list[T]:
    """Do something on every rank of a group and tell all what came out; if it fails on one, all raise.

    Args:
        op: for error messages.
        group: the ranks; ``None`` for this one alone.
        work: called here; what it returns is pickled.
        device: where NCCL may put a few bytes; torch's current device if it is not a CUDA device.

    Returns:
        What each rank's call returned, by rank.

    Raises:
        RuntimeError: it failed on another rank, or a rank did not take part within the group's time-out; what was
        raised here, where it failed here.
    """
    if group is None:
        return [work()]
    failure: Exception | None = None
    value: Any = None
    try:
        value = work()
    except Exception as err:
        failure = err
    return _tell(op, group, value, failure, device)


@contextlib.contextmanager
def agreement(
    op: str, group: RankGroup | None, settings: dict[str, Any], device: Any = None
) -> Iterator[None]:
    """Run the block on every rank of a group; raise on all of them if it fails on one, or if settings differ.

    Args:
        op: for error messages.
        group: the ranks; nothing is compared for ``None``.
        settings: what must be equal on all ranks. The block may add to it.
        device: as for ``everywhere``.

    Raises:
        ValueError: a setting differs between ranks.  RuntimeError: as for ``everywhere``.
    """
    if group is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as err:
        failure = err
    for rank, theirs in enumerate(_tell(op, group, settings, failure, device)):
        for name, mine in settings.items():
            if theirs.get(name) != mine:
                raise ValueError(
                    f"{op}: {name} must be the same on every rank of group {group.name!r}, got {mine} on rank "
                    f"{group.rank} of {group.size} and {theirs.get(name)} on rank {rank}. Pass the same arguments "
                    "everywhere."
                )


def _tell(
    op: str, group: RankGroup, value: Any, failure: Exception | None, device: Any
) -> list[Any]:
    """Tell all ranks what came out here; return what came out on each, or raise if it failed on one."""
    error = None if failure is None else f"{type(failure).__name__}: {failure}"
    answers = guarded(op, group, _all_gather, group, (value, error), device)
    if failure is not None:
        raise failure
    for rank, (_, error) in enumerate(answers):
        if error is not None:
            raise RuntimeError(
                f"{op}: every rank of group {group.name!r} must succeed, got an error on rank {rank} of {group.size}: "
                f"{error}"
            )
    return [theirs for theirs, _ in answers]


def _all_gather(group: RankGroup, value: Any, device: Any) -> list[Any]:
    """Every rank's value, by rank."""
    from torch.distributed import all_gather_object, get_backend

    resolved = process_group(group.name)
    if get_backend(resolved) == "fake":  # torch's stand-in for a group, which sends nothing
        return [value] * group.size
    answers: list[Any] = [None] * group.size
    place = torch.device(device) if device is not None else torch.device("cpu")
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        all_gather_object(answers, value, group=resolved)
    return answers
