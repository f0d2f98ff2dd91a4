"""Dropless dispatch between ranks. T tokens, K experts per token, R rows received, W ranks, E_local experts each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from moeops import _checks
from moeops.comm.exchange import Exchange, Splits, exchange_counts
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import (
    HierarchicalExchange,
    Hierarchy,
    hierarchical_counts,
    start_exchange,
)
from moeops.dispatch.base import Block, Dispatcher, Experts, combine_leaf, permute_leaf
from moeops.dispatch.local import LocalDispatcher
from moeops.dispatch.static import chunk_bounds
from moeops.ops.sorting import sort_tokens
from moeops.types import Routing, SlotRouting, TokenPlan


class _Load(NamedTuple):
    """Rows that a rank sends, in the order of all experts, and what turns the answer into tokens."""

    rows: Any
    combine: Callable[[Any], Any]


# A chunk on its way back, and what waits for it.
Return = tuple[_Load, Callable[[], Any]]


class ExactDispatcher(Dispatcher):
    """Every row reaches its expert: the ranks exchange counts, then as many rows as there are.

    Counts stay on the device but for one copy to the host per forward, which sizes the exchange; under a compiler the
    sizes are symbolic. Ranks may have different numbers of tokens, 0 included, in every forward.

    The tokens can be cut into ``n_chunks`` parts: all parts are sent before the first expert runs, and each goes back
    while the next one is computed; backward likewise. The counts of all parts travel together.

    Args:
        num_expert: ``E_local``, the same on every rank.
        group: the ranks, more than one; rank ``r`` holds experts ``r * E_local`` to ``(r + 1) * E_local``.
        n_chunks: parts, at least 1, the same on every rank.
        hierarchy: how the ranks are arranged as nodes, the same on every rank; ``None`` for the flat exchange.

    Raises:
        ValueError: on every rank, where one sends rows of another size or type than the others.
        NotImplementedError: chunks are asked for with a SlotRouting.
    Host sync: one copy per forward, of ``2 W * (n_chunks + 1)`` integers, ``n_chunks * E_local`` more for experts
    that are separate modules, and ``n_chunks * num_middle`` more with a hierarchy.
    """

    def __init__(
        self,
        num_expert: int,
        group: RankGroup,
        *,
        n_chunks: int = 1,
        hierarchy: Hierarchy | None = None,
    ) -> None:
        self.num_expert = num_expert
        self.group = group
        self.n_chunks = n_chunks
        self.hierarchy = hierarchy

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
    ) -> Any:
        """Send every chunk, run the experts on each as it arrives, send it back, combine."""
        trips, _ = self.send(routing, inp, block is None)
        return self.join(self.run_and_send_back(trips, experts, block))

    def run_and_send_back(
        self, trips: list[_Trip], experts: Experts, block: Block | None
    ) -> list[Return]:
        """Run the experts on each chunk as it arrives, and begin to send it back."""
        return [self._send_back(trip, _run_received(trip, experts, block)) for trip in trips]

    def join(self, returns: list[Return]) -> Any:
        """Wait for the chunks, and combine."""
        return _join([load.combine(answer()) for load, answer in returns])

    def dispatch(self, routing: Routing | SlotRouting, inp: Any) -> tuple[Any, Tensor, Any]:
        """Send rows to their experts' ranks, and sort what arrives by expert. In one part."""
        whole = ExactDispatcher(self.num_expert, self.group, hierarchy=self.hierarchy)
        (trip,), _ = whole.send(routing, inp, False)
        rows = _pytree.tree_map(lambda leaf: permute_leaf(leaf, trip.plan), trip.receive())
        return rows, trip.plan.expert_offsets, trip

    def combine(self, out: Any, record: Any) -> Any:
        """Send rows back and sum those of each token, weighted."""
        rows = _pytree.tree_map(lambda leaf: combine_leaf(leaf, record.plan, None), out)
        load, answer = self._send_back(record, rows)
        return load.combine(answer())

    def send(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        need_counts: bool,
        extra: Tensor | None = None,
    ) -> tuple[list[_Trip], list[int]]:
        """Begin to send every chunk; there is one copy to the host in here.

        Args:
            routing: as for ``run``.
            inp: as for ``run``.
            need_counts: the experts want their numbers of rows.
            extra: numbers of at least 0 that someone else needs on the host.

        Returns:
            The chunks, and the numbers of ``extra``.
        """
        size, num_experts = self.group.size, self.group.size * self.num_expert
        loads: list[Callable[[int], _Load]] = []
        offsets = []
        if isinstance(routing, SlotRouting):
            if self.n_chunks > 1:
                raise NotImplementedError(
                    f"ExactDispatcher: n_chunks must be 1 for a gate that mixes tokens, got {self.n_chunks}. A slot "
                    "holds tokens of all chunks."
                )
            local = LocalDispatcher(num_experts)
            mixed, expert_offsets, record = local.dispatch(routing, inp)
            loads.append(lambda _: _Load(mixed, lambda out: local.combine(out, record)))
            offsets.append(expert_offsets)
        else:
            for ids, weights, part in _chunk_tokens(routing, inp, self.n_chunks):
                plan = sort_tokens(ids, num_experts)
                loads.append(_loader(plan, weights, part))
                offsets.append(plan.expert_offsets)
        # [W, n_chunks, E_local]: what this rank sends to whom, and what it receives from whom.
        sends = torch.stack([o.diff().view(size, self.num_expert) for o in offsets], 1)
        leaves = _pytree.tree_leaves(inp)
        signature = _signature(leaves)
        marks = torch.cat(
            [torch.full_like(sends[:, 0, :1], mark) for mark in signature], 1
        )  # [W, 2]
        n_chunks = len(loads)
        answer, middle = self._exchange_counts(torch.cat((sends.flatten(1), marks), 1))
        receives = answer[:, :-2].view_as(sends)
        passing = middle[:, :-2].view(middle.shape[0], n_chunks, self.num_expert)
        by_expert = receives.sum(0) if need_counts else receives[:0]
        extra = answer[:0] if extra is None else extra.to(answer.dtype)
        parts = [sends.sum(2), receives.sum(2), passing.sum(2), answer[:, -2:], by_expert, extra]
        host = torch.cat([part.flatten() for part in parts]).cpu().tolist()
        for count in host:
            torch._check(count >= 0)
        send_rows, receive_rows, middle_rows, signatures, expert_rows, numbers = _cut(
            host, [part.numel() for part in parts]
        )
        self._check_signatures(signature, leaves, signatures)
        trips = []
        for chunk, load in enumerate(loads):
            splits = Splits(
                send_rows[chunk::n_chunks],
                receive_rows[chunk::n_chunks],
                middle_rows[chunk::n_chunks],
            )
            first = chunk * self.num_expert
            counts = expert_rows[first : first + self.num_expert] if need_counts else None
            ready = load(sum(splits.input_splits))
            exchanges, spec = self._exchange(ready.rows, splits)
            trips.append(_Trip(ready, exchanges, spec, splits, receives[:, chunk], counts))
        return trips, numbers

    def _exchange_counts(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The other ranks' counts, and those that pass through this rank on their way."""
        if self.hierarchy is None:
            return exchange_counts(counts, self.group), counts[:0]
        return hierarchical_counts(counts, self.hierarchy)

    def _exchange(
        self, rows: Any, splits: Splits, *, back: bool = False
    ) -> tuple[list[Exchange | HierarchicalExchange], Any]:
        """Begin to send every leaf."""
        leaves, spec = _pytree.tree_flatten(rows)
        started = [
            start_exchange(leaf, splits, self.group, self.hierarchy, back=back) for leaf in leaves
        ]
        return started, spec

    def _send_back(self, trip: _Trip, out: Any) -> Return:
        """Begin to send outputs back; the function returned waits for this rank's."""
        exchanges, spec = self._exchange(out, trip.splits, back=True)

        def answer() -> Any:
            return _pytree.tree_unflatten([exchange.finish() for exchange in exchanges], spec)

        return trip.load, answer

    def _check_signatures(
        self, mine: tuple[int, int], leaves: list[Tensor], signatures: list[int]
    ) -> None:
        """All ranks send rows of one size and type: every rank sees all of them, so every rank fails or none."""
        for rank in range(self.group.size):
            theirs = signatures[2 * rank : 2 * rank + 2]
            if torch.compiler.is_compiling():
                torch._check(theirs[0] == mine[0])
                torch._check(theirs[1] == mine[1])
            elif tuple(theirs) != mine:
                raise ValueError(
                    "ExactDispatcher: moe_inp must have rows of the same size and dtype on every rank of group "
                    f"{self.group.name!r}, got {mine[0]} elements of {[leaf.dtype for leaf in leaves]} on rank "
                    f"{self.group.rank} of {self.group.size} and {_describe_signature(*theirs)} on rank {rank}. Check "
                    "the layer's input on these ranks."
                )


class _Trip:
    """One chunk on its way to the experts, and what it takes to go back."""

    def __init__(self, load, exchanges, spec, splits, received, counts):
        self.load: _Load = load
        self.exchanges: list[Exchange | HierarchicalExchange] = exchanges
        self.spec = spec
        self.splits: Splits = splits
        self.counts: list[int] | None = counts
        # [R, 1]: the rows arrive by rank, and by expert within a rank.
        num_expert = received.shape[1]
        experts = torch.arange(num_expert, dtype=torch.int32, device=received.device)
        ids = torch.repeat_interleave(
            experts.repeat(received.shape[0]),
            received.flatten(),
            output_size=sum(splits.output_splits),
        )
        self.plan = sort_tokens(ids.unsqueeze(1), num_expert)

    def receive(self) -> Any:
        """Wait for the rows, nest of ``[R, ...]``."""
        leaves = [exchange.finish() for exchange in self.exchanges]
        return _pytree.tree_unflatten(leaves, self.spec)


def _run_received(trip: _Trip, experts: Experts, block: Block | None) -> Any:
    """The experts' outputs for the rows of a chunk, in the order in which the rows came."""
    rows = trip.receive()
    if block is not None:
        first = _pytree.tree_leaves(rows)[0]
        dtype = _checks.accumulate_dtype(first.dtype)
        ones = torch.ones(first.shape[0], 1, dtype=dtype, device=first.device)
        return block(rows, ones, trip.plan)
    rows = _pytree.tree_map(lambda leaf: permute_leaf(leaf, trip.plan), rows)
    out = experts(rows, trip.plan.expert_offsets, trip.counts)
    return _pytree.tree_map(lambda leaf: combine_leaf(leaf, trip.plan, None), out)


def _cut(values: list[int], lengths: list[int]) -> list[list[int]]:
    """Values in parts of these lengths."""
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


def _loader(plan: TokenPlan, weights: Tensor, inp: Any) -> Callable[[int], _Load]:
    """What copies tokens into rows once their number is known; dropped pairs have none."""

    def load(num_rows: int) -> _Load:
        torch._check(num_rows <= plan.row_to_pair.shape[0])
        kept = plan._replace(row_to_pair=plan.row_to_pair.narrow(0, 0, num_rows))
        rows = _pytree.tree_map(lambda leaf: permute_leaf(leaf, kept), inp)
        return _Load(
            rows,
            lambda out: _pytree.tree_map(lambda leaf: combine_leaf(leaf, kept, weights), out),
        )

    return load


def _chunk_tokens(routing: Routing, inp: Any, n_chunks: int) -> list[tuple[Tensor, Tensor, Any]]:
    """Ids, weights and input of each part of the tokens; parts may be empty."""
    ids, weights = routing.topk_ids, routing.topk_weights
    if n_chunks == 1:
        return [(ids, weights, inp)]
    parts = []
    for start, length in chunk_bounds(ids.shape[0], n_chunks):
        part = _pytree.tree_map(lambda t, s=start, n=length: t.narrow(0, s, n), (ids, weights, inp))
        parts.append(part)
    return parts


def _join(parts: list[Any]) -> Any:
    """The chunks' results, nests of ``[T / n_chunks, ...]``, as one."""
    if len(parts) == 1:
        return parts[0]
    return _pytree.tree_map(lambda *leaves: torch.cat(leaves), *parts)


_SIGNED = (*_checks.FLOAT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _signature(leaves: list[Tensor]) -> tuple[int, int]:
    """Elements per row over all leaves, and their types as digits to base 16."""
    elements = code = 0
    for leaf in leaves:
        row = 1
        for length in leaf.shape[1:]:
            row *= length
        elements = elements + row
        digit = _SIGNED.index(leaf.dtype) + 1 if leaf.dtype in _SIGNED else 15
        code = (code * 16 + digit) % 2**28
    return elements, code


def _describe_signature(elements: int, code: int) -> str:
    """The inverse of ``_signature`` as far as it goes."""
    digits = [int(digit, 16) for digit in f"{code:x}"]
    names = [_SIGNED[d - 1] if 0 < d <= len(_SIGNED) else "another type" for d in digits]
    return f"{elements} elements of {names}"
