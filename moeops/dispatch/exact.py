"""Dropless dispatch between ranks. T tokens, K experts per token, R rows received, W ranks, E_local experts each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks, _nests
from moeops.comm.exchange import Splits, exchange_counts
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy, hierarchical_counts
from moeops.dispatch.base import (
    Block,
    Dispatcher,
    Experts,
    Flight,
    chunk_bounds,
    combine_leaf,
    permute_leaf,
    row_size,
)
from moeops.dispatch.local import Chosen, LocalDispatcher, Record
from moeops.ops.sorting import sort_tokens
from moeops.types import Routing, SlotRouting, TokenPlan


class _Load(NamedTuple):
    """A part of the work before it is sent.

    Attributes:
        tokens: nest of ``[T, ...]``; of a gate that mixes tokens, the rows of all slots.
        record: what brings the answer back; its plan has a row for every pair, dropped ones too.
        expert_offsets: ``[E + 1]``.
    """

    tokens: Any
    record: Record
    expert_offsets: Tensor


class _Counts(NamedTuple):
    """How many rows of a chunk travel.

    Attributes:
        splits: on the host, by rank.
        received: ``[W, E_local]`` on the device, from whom and for which expert.
        by_expert: their sums over the ranks on the host, where the experts want them.
    """

    splits: Splits
    received: Tensor
    by_expert: list[int] | None


class Chunk(NamedTuple):
    """What is known of a part of the work while it is on its way, until its answer is combined.

    Attributes:
        record: what brings this rank's own rows back to their tokens.
        splits: rows to and from each rank.
        plan: which of the rows that arrive is of which expert.
        counts: rows per expert, where the host knows them.
    """

    record: Record
    splits: Splits
    plan: TokenPlan
    counts: list[int] | None


# A chunk, and its rows or its answer in flight.
Sent = tuple[Chunk, Flight]


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
        sent, _ = self.send(routing, inp, block is None)
        return self.join(self.run_and_send_back(sent, experts, block))

    def send(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        need_counts: bool,
        extra: Tensor | None = None,
    ) -> tuple[list[Sent], list[int]]:
        """Begin to send every chunk; there is one copy to the host in here.

        Args:
            routing: as for ``run``.
            inp: as for ``run``.
            need_counts: the experts want their numbers of rows.
            extra: numbers of at least 0 that someone else needs on the host.

        Returns:
            The chunks, and the numbers of ``extra``.
        """
        loads = self._loads(routing, inp)
        counts, numbers = self._host_counts(loads, inp, need_counts, extra)
        return [self._post(load, count) for load, count in zip(loads, counts, strict=True)], numbers

    def run_and_send_back(
        self, sent: list[Sent], experts: Experts, block: Block | None
    ) -> list[Sent]:
        """Run the experts on each chunk as it arrives, and begin to send it back."""
        returned = []
        for chunk, flight in sent:
            out = _run_received(flight.finish(), chunk, experts, block)
            back = Flight(out, chunk.splits, self.group, self.hierarchy, back=True)
            returned.append((chunk, back))
        return returned

    def join(self, returned: list[Sent]) -> Any:
        """Wait for the chunks' answers, and combine."""
        local = LocalDispatcher(self.group.size * self.num_expert)
        outs = [local.combine(flight.finish(), chunk.record) for chunk, flight in returned]
        if len(outs) == 1:
            return outs[0]
        return _nests.map_leaves(lambda *leaves: torch.cat(leaves), *outs)

    def _loads(self, routing: Routing | SlotRouting, inp: Any) -> list[_Load]:
        """Cut the tokens into chunks, and sort each by expert; slots are mixed, in one chunk."""
        num_experts = self.group.size * self.num_expert
        if isinstance(routing, SlotRouting):
            if self.n_chunks > 1:
                raise NotImplementedError(
                    f"ExactDispatcher: n_chunks must be 1 for a gate that mixes tokens, got {self.n_chunks}. A slot "
                    "holds tokens of all chunks."
                )
            mixed, expert_offsets, record = LocalDispatcher(num_experts).dispatch(routing, inp)
            return [_Load(mixed, record, expert_offsets)]
        loads = []
        for ids, weights, part in _chunk_tokens(routing, inp, self.n_chunks):
            plan = sort_tokens(ids, num_experts)
            loads.append(_Load(part, Chosen(plan, weights), plan.expert_offsets))
        return loads

    def _host_counts(
        self, loads: list[_Load], inp: Any, need_counts: bool, extra: Tensor | None
    ) -> tuple[list[_Counts], list[int]]:
        """Exchange how many rows travel, and copy all that the host needs at once; see ``send``."""
        size, n_chunks = self.group.size, len(loads)
        # [W, n_chunks, E_local]: what this rank sends to whom.
        sends = torch.stack(
            [load.expert_offsets.diff().view(size, self.num_expert) for load in loads], 1
        )
        # Size and type of a row go with the counts, so that ranks that disagree all see it.
        leaves = _nests.leaves(inp)
        signature = _row_signature(leaves)
        marks = torch.cat(
            [torch.full_like(sends[:, 0, :1], mark) for mark in signature], 1
        )  # [W, 2]
        answer, middle = self._exchange_counts(torch.cat((sends.flatten(1), marks), 1))
        # What this rank receives from whom, and what passes through it on its way between other ranks.
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
        counts = []
        for chunk in range(n_chunks):
            splits = Splits(
                send_rows[chunk::n_chunks],
                receive_rows[chunk::n_chunks],
                middle_rows[chunk::n_chunks],
            )
            first = chunk * self.num_expert
            rows = expert_rows[first : first + self.num_expert] if need_counts else None
            counts.append(_Counts(splits, receives[:, chunk], rows))
        return counts, numbers

    def _post(self, load: _Load, counts: _Counts) -> Sent:
        """Copy tokens into rows and begin to send them; plan what to do with those that arrive."""
        rows, record = load.tokens, load.record
        if isinstance(record, Chosen):
            # The pairs that have an expert come first; dropped ones have no row from here on.
            num_rows = sum(counts.splits.input_splits)
            torch._check(num_rows <= record.plan.row_to_pair.shape[0])
            kept = record.plan._replace(row_to_pair=record.plan.row_to_pair.narrow(0, 0, num_rows))
            record = Chosen(kept, record.topk_weights)
            rows = _nests.map_leaves(lambda leaf: permute_leaf(leaf, kept), rows)
        flight = Flight(rows, counts.splits, self.group, self.hierarchy)
        return Chunk(record, counts.splits, _plan_received(counts), counts.by_expert), flight

    def _exchange_counts(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The other ranks' counts, and those that pass through this rank on their way."""
        if self.hierarchy is None:
            return exchange_counts(counts, self.group), counts[:0]
        return hierarchical_counts(counts, self.hierarchy)

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


def _plan_received(counts: _Counts) -> TokenPlan:
    """Sort rows that arrive by rank, and by expert within a rank, by expert: each is a token with one expert.

    The gate's ids stay with the sender. The counts say as much: rank after rank, so many rows of each expert.
    """
    num_ranks, num_expert = counts.received.shape
    experts = torch.arange(num_expert, dtype=torch.int32, device=counts.received.device)
    ids = torch.repeat_interleave(
        experts.repeat(num_ranks),
        counts.received.flatten(),
        output_size=sum(counts.splits.output_splits),
    )  # [R]
    return sort_tokens(ids.unsqueeze(1), num_expert)


def _run_received(rows: Any, chunk: Chunk, experts: Experts, block: Block | None) -> Any:
    """The experts' outputs for the rows of a chunk, in the order in which the rows came."""
    plan = chunk.plan
    if block is not None:
        first = _nests.leaves(rows)[0]
        dtype = _checks.accumulate_dtype(first.dtype)
        ones = torch.ones(first.shape[0], 1, dtype=dtype, device=first.device)
        return block(rows, ones, plan)
    rows = _nests.map_leaves(lambda leaf: permute_leaf(leaf, plan), rows)
    out = experts(rows, plan.expert_offsets, chunk.counts)
    return _nests.map_leaves(lambda leaf: combine_leaf(leaf, plan, None), out)


def _cut(values: list[int], lengths: list[int]) -> list[list[int]]:
    """Values in parts of these lengths."""
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


def _chunk_tokens(routing: Routing, inp: Any, n_chunks: int) -> list[tuple[Tensor, Tensor, Any]]:
    """Ids, weights and input of each part of the tokens; parts may be empty."""
    ids, weights = routing.topk_ids, routing.topk_weights
    if n_chunks == 1:
        return [(ids, weights, inp)]
    parts = []
    for start, length in chunk_bounds(ids.shape[0], n_chunks):
        part = _nests.map_leaves(lambda leaf, s=start, n=length: leaf.narrow(0, s, n), inp)
        parts.append((ids.narrow(0, start, length), weights.narrow(0, start, length), part))
    return parts


_SIGNED = (*_checks.FLOAT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _row_signature(leaves: list[Tensor]) -> tuple[int, int]:
    """Elements per row over all leaves, and their types as digits to base 16."""
    elements = code = 0
    for leaf in leaves:
        elements = elements + row_size(leaf.shape[1:])
        digit = _SIGNED.index(leaf.dtype) + 1 if leaf.dtype in _SIGNED else 15
        code = (code * 16 + digit) % 2**28
    return elements, code


def _describe_signature(elements: int, code: int) -> str:
    """The inverse of ``_row_signature`` as far as it goes."""
    digits = [int(digit, 16) for digit in f"{code:x}"]
    names = [_SIGNED[d - 1] if 0 < d <= len(_SIGNED) else "another type" for d in digits]
    return f"{elements} elements of {names}"
