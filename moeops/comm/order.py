"""Ranks compare the order of collectives in a graph before they run it for the first time. W ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeops.comm.groups import RankGroup, describe_group, process_group, rank_group, timeout_of

if TYPE_CHECKING:
    from torch.distributed import Store

_library = torch.library.Library("moeops", "FRAGMENT")
# It writes into ``mark``, of which it says nothing: a graph may neither drop it nor run it twice.
_library.define(
    "check_order_(Tensor(a!) mark, str[] group_names, str[] collectives) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)

# What a group's ranks have found equal, and how often they have compared, by the group's name: the same on all of them.
_equal: dict[str, set[tuple[str, ...]]] = {}
_rounds: dict[str, int] = {}


def _check_order(mark: Tensor, group_names: list[str], collectives: list[str]) -> None:
    mine = tuple(collectives)
    for name in group_names:
        equal = _equal.setdefault(name, set())
        if mine not in equal:
            group = rank_group(process_group(name))
            assert group is not None
            # A new number each time: what was written in a round that failed may still be there.
            number = _rounds[name] = _rounds.get(name, 0) + 1
            _compare(group, number, mine)
            equal.add(mine)


# Python on every device: it runs on the host.
_library.impl("check_order_", _check_order, "CompositeExplicitAutograd")


@torch.library.register_fake("moeops::check_order_")
def _check_order_fake(mark, group_names, collectives):
    return None


def _compare(group: RankGroup, number: int, mine: tuple[str, ...]) -> None:
    """Compare a graph's collectives with those of the other ranks, by the job's store: no collective may be needed."""
    resolved = process_group(group.name)
    if group.size == 1 or torch.distributed.get_backend(resolved) == "fake":
        return
    store = _store(group)
    store.set(f"{number}/{group.rank}", "\n".join(mine))
    for rank in range(group.size):
        theirs = tuple(_read(store, group, number, rank).split("\n"))
        if theirs != mine:
            raise RuntimeError(_mismatch(group, rank, mine, theirs))


def _store(group: RankGroup) -> Store:
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    return PrefixStore(f"moeops/order/{group.name}", _get_default_store())


def _read(store: Store, group: RankGroup, number: int, rank: int) -> str:
    key = f"{number}/{rank}"
    timeout = timeout_of(group)
    try:
        store.wait([key]) if timeout is None else store.wait([key], timeout)
    except RuntimeError as err:
        raise RuntimeError(
            f"check_order: every rank of {describe_group(group)} must run compiled code with new collectives at the "
            f"same time, got nothing from rank {rank} within the time-out: {err}. The rank has ended, or runs other "
            "code: compile the same model with the same options on every rank."
        ) from err
    return store.get(key).decode()


def _mismatch(group: RankGroup, rank: int, mine: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    pairs = list(zip(mine, theirs, strict=False))
    place = next((i for i, (own, other) in enumerate(pairs) if own != other), len(pairs))
    own, other = (order[place] if place < len(order) else "none" for order in (mine, theirs))
    return (
        "check_order: compiled code must hold the same collectives in the same order on every rank of "
        f"{describe_group(group)}, got {own!r} as number {place + 1} of {len(mine)} here and {other!r} of "
        f"{len(theirs)} on rank {rank}. Compile the same model with the same options, from inputs of the same kind, on "
        "every rank."
    )
