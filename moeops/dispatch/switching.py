"""The same parameters as expert parallel, data parallel or in between, chosen per call: Tutel's r.

W ranks hold E experts, E_local each, and stand in M = W / r nodes of r ranks. In a node, all E experts are there: rank
b of a node gets the weights of the M ranks with its place in their nodes, and tokens travel inside the node only. With
r = W tokens go to their experts, with r = 1 all experts come to the tokens.

Hwang et al. 2022, "Tutel: adaptive mixture-of-experts at scale", arXiv:2206.03382, section 3.1. T tokens, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeops import _checks
from moeops.comm.gathering import Gathering
from moeops.comm.groups import ALONE, RankGroup
from moeops.comm.hierarchical import Hierarchy
from moeops.dispatch.base import (
    Beside,
    Block,
    Dispatcher,
    DispatchOptions,
    ExpertRanks,
    Experts,
    RegionBlock,
    WrappingDispatcher,
)
from moeops.dispatch.options import ExchangeOptions, build_dispatcher
from moeops.dispatch.weights import ExpertWeights, SharingDispatcher, check_whole
from moeops.types import Routing, SlotRouting


class SwitchedDispatcher(WrappingDispatcher, SharingDispatcher):
    """Gather the weights of the ranks with this rank's place, and dispatch inside of this rank's node.

    Weights are gathered in every forward, begun before the gate works, and their gradients are scattered to the owners,
    where they are summed, in every backward: ``(M - 1) * E_local * P`` bytes each way for experts of ``P`` bytes. The
    gathered weights are kept from the forward to the backward.

    Args:
        inner: the dispatcher of the ranks of a node, for ``M * E_local`` experts on each.
        num_expert: ``E_local``.
        node_size: ``r``.
        across: the ``M`` ranks with this rank's place, more than one.

    Host sync: that of ``inner``; for experts that are separate modules one copy, to cut the rows.
    """

    option = "parallel_degrees"

    def __init__(
        self, inner: Dispatcher, num_expert: int, node_size: int, across: RankGroup
    ) -> None:
        super().__init__(inner)
        self.num_expert = num_expert
        self.node_size = node_size
        self.across = across

    def start(
        self, inp: Any, weights: Callable[[], ExpertWeights], table: Tensor | None
    ) -> dict[str, Any]:
        """Begin to gather weights, and what ``inner`` begins."""
        own = weights()
        check_whole(own.parameters)
        gathered = [
            Gathering(p if isinstance(p, Tensor) else torch.stack(list(p)), self.across)
            for p in own.parameters
        ]
        return {"held": _Held(own, gathered), **self.inner.start(inp, weights, table)}

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        held: _Held | None = None,
        *,
        beside: Beside | None = None,
        **early: Any,
    ) -> Any:
        """Dispatch inside the node, with the gathered weights.

        Args:
            routing: what the gate decided.
            inp: nest of ``[T, ...]``.
            experts: not used: the experts are those of the weights.
            block: given where the experts are one call on tokens, too.
            held: from ``start``.
            beside: work to do while tokens and weights are on their way.
            **early: what ``inner`` began.
        """
        assert held is not None
        own_block: Block | None = None
        if block is not None and held.own.block is not None:
            own_block = RegionBlock(held.block) if isinstance(block, RegionBlock) else held.block
        routing = renumber(routing, self.num_expert, self.node_size, self.across.size)
        return self.inner.run(routing, inp, held.run, own_block, beside=beside, **early)


class _Held:
    """Weights on their way, and how to run experts with them.

    Args:
        own: this rank's.
        gathered: each parameter's of all ranks across.
    """

    def __init__(self, own: ExpertWeights, gathered: list[Gathering]) -> None:
        self.own = own
        self._gathered = gathered
        self._weights: list[Tensor] | None = None

    def weights(self) -> list[Tensor]:
        """``[M * E_local, ...]`` of each parameter; waits for them the first time."""
        if self._weights is None:
            self._weights = [one.finish() for one in self._gathered]
        return self._weights

    def run(self, rows: Any, expert_offsets: Tensor, counts: list[int] | None) -> Any:
        """Run them on rows in expert order."""
        return self.own.run(self.weights(), rows, expert_offsets, counts)

    def block(self, x: Any, topk_weights: Tensor, plan: Any) -> Any:
        """Run them on tokens."""
        assert self.own.block is not None
        return self.own.block(self.weights())(x, topk_weights, plan)


def renumber(
    routing: Routing | SlotRouting, num_expert: int, node_size: int, num_nodes: int
) -> Routing | SlotRouting:
    """Count experts by who has them inside a node: first by place ``b``, then by owner's node, then on the owner.

    Args:
        routing: with experts counted by owner, ``b + r * node``.
        num_expert: ``E_local``.
        node_size: ``r``.
        num_nodes: ``M``.

    Example:
        >>> ids = torch.tensor([[0, 2, 4, 7, -1]])  # 4 ranks with 2 experts each
        >>> renumber(Routing(ids, torch.ones(1, 5)), 2, 2, 2).topk_ids.tolist()
        [[0, 4, 2, 7, -1]]
    """
    if isinstance(routing, SlotRouting):

        def move(weights: Tensor) -> Tensor:
            by_owner = weights.unflatten(1, (num_nodes, node_size, -1))
            return by_owner.transpose(1, 2).flatten(1)

        dispatch, combine, tokens_per_group = routing
        return SlotRouting(move(dispatch), move(combine), tokens_per_group)
    ids = routing.topk_ids
    owner = ids // num_expert
    moved = (owner % node_size * num_nodes + owner // node_size) * num_expert + ids % num_expert
    return routing._replace(topk_ids=torch.where(ids < 0, -1, moved))


def build_switches(
    options: DispatchOptions, ranks: ExpertRanks, degrees: Sequence[int | Hierarchy]
) -> dict[int, SwitchedDispatcher]:
    """Make the dispatchers that a layer may be switched to.

    Args:
        options: the layer's, checked for ``ranks``.
        ranks: that hold the layer's experts.
        degrees: ``r``: 1, ``W``, or a hierarchy with nodes of ``r`` of these ranks.

    Returns:
        By ``r``, all but ``W``, which is the layer's own dispatcher.

    Raises:
        ValueError: a degree is no divisor, or a hierarchy is of other ranks.  TypeError: one is neither.
        NotImplementedError: the options have another use for the ranks.
    """
    group = ranks.group or ALONE
    switches = {}
    for degree in degrees:
        inside, across = _node_of(ranks.op, group, degree)
        if across.size == 1:
            continue
        _refuse(options, ranks)
        num_expert = ranks.num_expert * across.size
        inner_ranks = ranks._replace(
            num_expert=num_expert, group=inside if inside.size > 1 else None
        )
        inner = build_dispatcher(options, inner_ranks)
        switches[inside.size] = SwitchedDispatcher(inner, ranks.num_expert, inside.size, across)
    return switches


def _node_of(op: str, group: RankGroup, degree: Any) -> tuple[RankGroup, RankGroup]:
    """The ranks inside this rank's node, and those with its place."""
    if isinstance(degree, Hierarchy):
        if degree.group.name != group.name:
            raise ValueError(
                f"{op}: parallel_degrees must hold hierarchies of the ranks that hold the experts, group "
                f"{group.name!r}, got one of group {degree.group.name!r}. Pass build_hierarchy(moe_group, r)."
            )
        inside = ALONE if degree.node_size == 1 else degree.inside
        return inside, ALONE if degree.num_nodes == 1 else degree.across
    if isinstance(degree, bool) or not isinstance(degree, int):
        raise TypeError(
            f"{op}: parallel_degrees must hold ints and hierarchies, got {_checks.describe(degree)}. Pass 1, or "
            "build_hierarchy(moe_group, r)."
        )
    if degree == group.size:
        return group, ALONE
    if degree == 1:
        return ALONE, group
    raise ValueError(
        f"{op}: parallel_degrees must be 1, the {group.size} ranks that hold the experts, or a hierarchy, got "
        f"{degree}. For a number in between pass build_hierarchy(moe_group, {degree}), whose groups layers share."
    )


def _refuse(options: DispatchOptions, ranks: ExpertRanks) -> None:
    """Weights or shards are elsewhere already, or the exchange is."""
    used = "expert_tensor_parallel_size" if ranks.num_shards > 1 else None
    if isinstance(options, ExchangeOptions):
        names = ("hierarchy", "replicas", "shadowing")
        used = next((name for name in names if getattr(options, name, None) is not None), used)
    if used is not None:
        raise NotImplementedError(
            f"{ranks.op}: parallel_degrees must be empty with {used}, got both. Choose one of them."
        )
