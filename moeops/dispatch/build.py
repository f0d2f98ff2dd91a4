"""The dispatcher that a layer asks for. E_local experts on a rank, W ranks, P ranks that hold one expert together."""

from __future__ import annotations

from typing import Any

from moeops import _checks
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy, check_hierarchy
from moeops.dispatch.base import Dispatcher
from moeops.dispatch.exact import ExactDispatcher
from moeops.dispatch.local import LocalDispatcher
from moeops.dispatch.replicas import Placement, ReplicaDispatcher
from moeops.dispatch.shadowing import ShadowDispatcher, ShadowPolicy
from moeops.dispatch.shards import ShardedDispatcher
from moeops.dispatch.static import StaticDispatcher, check_capacity

DISPATCHES = ("exact", "static")


def build_dispatcher(
    op: str,
    dispatch: str,
    num_expert: int,
    group: RankGroup | None,
    *,
    capacity: int | float | None = None,
    n_chunks: int = 1,
    hierarchy: Hierarchy | None = None,
    expert_tensor_parallel_size: int = 1,
) -> Dispatcher:
    """Build the dispatcher that a layer asks for by name. With one rank, "exact" is the local one.

    Args:
        op: the layer's name, for error messages.
        dispatch: one of ``DISPATCHES``.
        num_expert: ``E_local``.
        group: the ranks that hold the experts; ``None`` for one rank.
        capacity: for "static", see ``StaticDispatcher``.
        n_chunks: parts of the work in flight at a time.
        hierarchy: how the group's ranks are arranged as nodes; ``None`` for the flat exchange.
        expert_tensor_parallel_size: ``P``, ranks that hold one expert together; a divisor of the group's size.
    """
    if expert_tensor_parallel_size > 1:
        assert group is not None
        inner = build_dispatcher(
            op,
            dispatch,
            num_expert,
            group,
            capacity=capacity,
            n_chunks=n_chunks,
            hierarchy=hierarchy,
        )
        expert_ranks = group.size // expert_tensor_parallel_size
        return ShardedDispatcher(inner, num_expert, expert_ranks, expert_tensor_parallel_size)
    if dispatch not in DISPATCHES:
        raise ValueError(
            f"{op}: dispatch must be one of {DISPATCHES}, got {dispatch!r}. Pick one of them."
        )
    _checks.check_int(op, "n_chunks", n_chunks, 1, "Use 1 for no overlap.")
    check_hierarchy(op, hierarchy, group)
    if dispatch == "static":
        check_capacity(op, capacity)
        return StaticDispatcher(
            num_expert,
            group,
            capacity,  # type: ignore[arg-type]
            n_chunks=n_chunks,
            hierarchy=hierarchy,
        )
    if capacity is not None:
        raise ValueError(
            f'{op}: capacity must be None for dispatch="exact", which drops nothing, got {capacity!r}. Use '
            'dispatch="static", or a gate with a capacity.'
        )
    if group is None or group.size == 1:
        return LocalDispatcher(num_expert)
    return ExactDispatcher(num_expert, group, n_chunks=n_chunks, hierarchy=hierarchy)


def build_sharing_dispatcher(
    op: str,
    dispatch: str,
    num_expert: int,
    group: RankGroup | None,
    *,
    shadowing: ShadowPolicy | None,
    placement: Placement | None,
    expert_tensor_parallel_size: int = 1,
    **options: Any,
) -> Dispatcher:
    """Build the dispatcher of a layer whose experts' weights may travel; without any of that, the plain one.

    Args:
        op: the layer's name, for error messages.
        dispatch: as for ``build_dispatcher``.
        num_expert: ``E_local``.
        group: the ranks that hold the experts; ``None`` for one rank.
        shadowing: when experts travel to all ranks.
        placement: experts that other ranks hold too.
        expert_tensor_parallel_size: as for ``build_dispatcher``.
        **options: for ``build_dispatcher``.
    """
    _checks_of_options(op, shadowing, placement, expert_tensor_parallel_size)
    if group is None or (shadowing is None and placement is None):
        return build_dispatcher(
            op,
            dispatch,
            num_expert,
            group,
            expert_tensor_parallel_size=expert_tensor_parallel_size,
            **options,
        )
    if placement is not None:
        slots, capacity = placement.num_slots, options.pop("capacity", None)
        if isinstance(capacity, float):
            capacity *= slots / num_expert  # a share of the experts, not of the slots
        inner = build_dispatcher(op, dispatch, slots, group, capacity=capacity, **options)
        return ReplicaDispatcher(inner, placement, group)
    assert shadowing is not None
    inner = build_dispatcher(op, dispatch, num_expert, group, **options)
    if not isinstance(inner, ExactDispatcher):
        raise NotImplementedError(
            f"{op}: shadowing must be None for dispatch={dispatch!r}, whose buffers have the same size whatever stays "
            'on a rank, so that nothing would be saved. Use dispatch="exact".'
        )
    return ShadowDispatcher(inner, shadowing)


def _checks_of_options(op: str, shadowing: Any, placement: Any, num_shards: int) -> None:
    if shadowing is not None and not isinstance(shadowing, ShadowPolicy):
        raise TypeError(
            f"{op}: shadowing must be a ShadowPolicy or None, got {_checks.describe(shadowing)}. Pass "
            "moeops.distributed.ShadowPolicy(...), or ShadowPolicy.from_cost_model(...)."
        )
    if shadowing is not None and placement is not None:
        raise NotImplementedError(
            f"{op}: replicas must be None with shadowing, got both. Choose one of them."
        )
    name = "replicas" if shadowing is None else "shadowing"
    if num_shards > 1 and (shadowing is not None or placement is not None):
        raise NotImplementedError(
            f"{op}: {name} must be None with expert_tensor_parallel_size={num_shards}: a rank has no use for another "
            "rank's shard. Choose one of them."
        )
