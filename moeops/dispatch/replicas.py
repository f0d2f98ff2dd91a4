"""Experts that several ranks hold. T tokens, K experts per token, E experts, E_local on a rank, W ranks, S slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeops import _checks, _nests
from moeops.comm.groups import RankGroup
from moeops.dispatch.base import Beside, Block, Dispatcher, Experts, split_rows
from moeops.dispatch.weights import (
    ExpertWeights,
    Held,
    SharingDispatcher,
    send_experts,
    tie,
)
from moeops.ops.sorting import sort_tokens
from moeops.types import Routing, SlotRouting


@dataclass(frozen=True)
class Placement:
    """Which ranks hold which experts, in plain numbers. ``place_replicas`` makes it.

    A rank has ``S`` slots: its own ``E_local`` experts, then its replicas by number, then slots that hold nothing where
    another rank has more replicas. Slot ``s`` of rank ``r`` has number ``r * S + s``.

    Attributes:
        num_expert: ``E_local``.
        world_size: ``W``.
        replicas: expert and ranks that hold it beside its owner, by expert and rank.
    """

    num_expert: int
    world_size: int
    replicas: tuple[tuple[int, tuple[int, ...]], ...]

    def on_rank(self, rank: int) -> list[int]:
        """Experts of other ranks that a rank holds too."""
        return [expert for expert, ranks in self.replicas if rank in ranks]

    @property
    def num_slots(self) -> int:
        """``S``."""
        return self.num_expert + max(len(self.on_rank(rank)) for rank in range(self.world_size))

    def sends(self, rank: int) -> list[list[int]]:
        """Experts that a rank sends to each of all ranks, counted from its own first one."""
        first = rank * self.num_expert
        return [
            [e - first for e in self.on_rank(target) if first <= e < first + self.num_expert]
            for target in range(self.world_size)
        ]

    def table(self) -> Tensor:
        """Slots of each expert, its owner's first, -1 for no more: ``[E, copies]`` int64 on the host."""
        num_experts = self.world_size * self.num_expert
        copies = 1 + max((len(ranks) for _, ranks in self.replicas), default=0)
        table = torch.full((num_experts, copies), -1, dtype=torch.int64)
        number = torch.arange(num_experts)
        table[:, 0] = number + number // self.num_expert * (self.num_slots - self.num_expert)
        for expert, ranks in self.replicas:
            for copy, rank in enumerate(ranks):
                slot = self.num_expert + self.on_rank(rank).index(expert)
                table[expert, 1 + copy] = rank * self.num_slots + slot
        return table


def place_replicas(
    op: str, replicas: Any, num_expert: int, group: RankGroup | None
) -> Placement | None:
    """Check where a layer's experts shall have copies.

    Args:
        op: the layer's name, for error messages.
        replicas: expert to the ranks of the group that hold it beside its owner, or to one rank.
        num_expert: ``E_local``.
        group: the ranks that hold the experts; ``None`` for one rank.

    Returns:
        The placement; ``None`` if there is no replica.

    Raises:
        ValueError: an expert or a rank is not there, is named twice, or is the owner.  TypeError: it is no mapping of
        ints.
    """
    if replicas is None:
        return None
    if not isinstance(replicas, Mapping):
        raise TypeError(
            f"{op}: replicas must be a dict of expert to ranks, got {_checks.describe(replicas)}. Pass {{expert: "
            "(rank, ...)}}."
        )
    world_size = 1 if group is None else group.size
    num_experts = world_size * num_expert
    places = []
    for expert, given in replicas.items():
        ranks = tuple(given) if isinstance(given, Iterable) else (given,)
        for value in (expert, *ranks):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"{op}: replicas must name experts and ranks by ints, got {value!r} for expert {expert!r}. Pass "
                    "{expert: (rank, ...)}."
                )
        if not 0 <= expert < num_experts:
            raise ValueError(
                f"{op}: replicas must name experts from 0 to {num_experts - 1}, got {expert}. Count experts over all "
                "ranks."
            )
        owner = expert // num_expert
        for rank in ranks:
            if not 0 <= rank < world_size:
                raise ValueError(
                    f"{op}: replicas must name ranks of the group, from 0 to {world_size - 1}, got {rank} for expert "
                    f"{expert}. Count ranks within moe_group."
                )
            if rank == owner:
                raise ValueError(
                    f"{op}: replicas must not name an expert's owner, got rank {rank} for expert {expert}. It holds "
                    "the expert anyway; leave it out."
                )
        if len(set(ranks)) != len(ranks):
            raise ValueError(
                f"{op}: replicas must name a rank once, got {ranks} for expert {expert}. A rank holds one copy."
            )
        if ranks:
            places.append((expert, tuple(sorted(ranks))))
    return Placement(num_expert, world_size, tuple(sorted(places))) if places else None


def route_to_holders(routing: Routing, table: Tensor, num_slots: int, rank: int) -> Routing:
    """Choose for every pair one of the ranks that hold its expert.

    A pair stays on its rank if that holds the expert. The others of an expert go to all its holders in turn, in token
    order, starting at another holder on each rank.

    Args:
        routing: what the gate decided.
        table: what ``Placement.table`` returned, on the routing's device.
        num_slots: ``S``.
        rank: this rank.

    Returns:
        The same for slots: ids from 0 to ``W * S``, int64.

    Example:
        >>> table = Placement(1, 3, ((0, (1,)),)).table()
        >>> table.tolist()
        [[0, 3], [2, -1], [4, -1]]
        >>> routing = Routing(torch.tensor([[0], [0], [1], [0]]), torch.ones(4, 1))
        >>> [route_to_holders(routing, table, 2, rank).topk_ids.flatten().tolist() for rank in range(3)]
        [[0, 0, 2, 0], [3, 3, 2, 3], [0, 3, 2, 0]]
    """
    ids = routing.topk_ids.long()
    plan = sort_tokens(ids, table.shape[0])
    kept = ids.clamp(min=0)
    turn = (
        plan.pair_to_row - plan.expert_offsets[kept] + rank
    )  # [T, K], number among the pairs of its expert
    num_holders = (table >= 0).sum(1)  # [E]
    spread = table[kept, turn % num_holders[kept]]
    here = torch.where(table // num_slots == rank, table, -1).amax(1)[kept]
    slots = torch.where(here >= 0, here, spread)
    return routing._replace(topk_ids=torch.where(ids < 0, -1, slots))


class ReplicaDispatcher(SharingDispatcher):
    """Experts have copies on other ranks, given when the layer is built: their tokens are spread over them.

    To the dispatcher inside, every rank has ``S`` experts, so rows are exchanged, dropped and chunked as it does. The
    weights of replicas travel once per forward, while the gate and the experts of this rank work, and their gradients
    once per backward: ``P`` bytes per replica and way, for experts of ``P`` bytes, and memory for the replicas' weights
    from the forward to the backward. All sizes of this are known when the layer is built.

    Args:
        inner: a dispatcher for ``S`` experts per rank.
        placement: which ranks hold which experts.
        group: the ranks, more than one.

    Raises:
        NotImplementedError: a gate mixes tokens.
    Host sync: that of ``inner``, for experts that are separate modules.
    """

    option = "replicas"

    def __init__(self, inner: Dispatcher, placement: Placement, group: RankGroup) -> None:
        self.inner = inner
        self.placement = placement
        self.group = group
        self.num_slots = placement.num_slots
        self.num_replicas = len(placement.on_rank(group.rank))
        self._sends = placement.sends(group.rank)
        self._num_received = [
            len(placement.sends(source)[group.rank]) for source in range(group.size)
        ]

    def table(self) -> Tensor:
        """Slots of each expert: see ``Placement.table``."""
        return self.placement.table()

    def start(
        self, inp: Any, weights: Callable[[], ExpertWeights], table: Tensor | None
    ) -> dict[str, Any]:
        """Begin to send and receive replicas."""
        own = weights()
        experts = [expert for sends in self._sends for expert in sends]
        splits = [len(sends) for sends in self._sends]
        held = send_experts(own.parameters, experts, splits, self._num_received, self.group)
        return {"weights": own, "held": held, "table": table}

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        weights: ExpertWeights | None = None,
        held: Held | None = None,
        table: Tensor | None = None,
        *,
        beside: Beside | None = None,
    ) -> Any:
        """Dispatch to slots, run this rank's experts and replicas, combine.

        Args:
            routing: what the gate decided.
            inp: nest of ``[T, ...]``.
            experts: this rank's own.
            block: not used: rows of experts and of replicas are computed apart.
            weights: from ``start``.
            held: from ``start``.
            table: from ``start``.
            beside: work to do while tokens and replicas are on their way.
        """
        assert weights is not None
        assert held is not None
        assert table is not None
        if isinstance(routing, SlotRouting):
            held.finish()  # or it would stay in flight
            raise NotImplementedError(
                "FMoE: replicas must be None for a gate that mixes tokens, whose slots belong to one expert each, got "
                f"{self.placement.replicas}. Pass replicas=None, or another gate."
            )
        slots = route_to_holders(routing, table, self.num_slots, self.group.rank)

        def run_slots(rows: Any, expert_offsets: Tensor, counts: list[int] | None) -> Any:
            assert counts is not None
            return self._run_slots(rows, expert_offsets, counts, experts, weights, held)

        return self.inner.run(slots, inp, run_slots, beside=beside)

    def _run_slots(self, rows, expert_offsets, counts, experts, weights, held) -> Any:
        """Outputs of rows in the order of slots. This rank's own come first: replicas may be on their way still."""
        own, num_held = self.placement.num_expert, self.num_replicas
        own_offsets = expert_offsets.narrow(0, 0, own + 1)
        if num_held == 0:
            out = experts(rows, own_offsets, counts[:own])
            return tie(out, held.finish())
        leaves, spec = _nests.flatten(rows)
        own_rows = sum(counts[:own])
        torch._check(own_rows <= leaves[0].shape[0])
        splits = [own_rows, leaves[0].shape[0] - own_rows]
        parts = [split_rows(leaf, splits) for leaf in leaves]
        first, second = (
            _nests.unflatten([part[index] for part in parts], spec) for index in range(2)
        )
        out = experts(first, own_offsets, counts[:own])
        offsets = expert_offsets.narrow(0, own, num_held + 1)
        replicas_out = weights.run(
            held.finish(), second, offsets - offsets[:1], counts[own : own + num_held]
        )
        return _nests.map_leaves(lambda *both: torch.cat(both), out, replicas_out)
