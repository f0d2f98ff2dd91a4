"""Every rank of a group does something, or none has done it. W ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from moeops.comm.groups import RankGroup, describe_group, process_group


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
    from torch.distributed import all_gather_object, get_backend

    resolved = process_group(group.name)
    if get_backend(resolved) == "fake":  # torch's stand-in for a group, which sends nothing
        return [value] * group.size
    answers: list[Any] = [None] * group.size
    place = torch.device(device) if device is not None else torch.device("cpu")
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        all_gather_object(answers, value, group=resolved)
    return answers
