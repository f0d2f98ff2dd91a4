"""Dispatch between ranks in buffers of fixed size. T tokens, K experts per token, N = T * K, W ranks, C capacity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks, _nests
from moeops._tracing import exporting
from moeops.comm.common_size import CommonSize, can_settle
from moeops.comm.exchange import Splits
from moeops.comm.groups import ALONE, RankGroup, describe_group
from moeops.comm.hierarchical import Hierarchy
from moeops.dispatch.base import (
    Beside,
    Block,
    Dispatcher,
    Experts,
    Flight,
    RegionBlock,
    as_rows,
    chunk_bounds,
    row_size,
)
from moeops.dispatch.degrees import Degrees, as_degrees, one_degree
from moeops.dispatch.hooks import StageHooks
from moeops.dispatch.local import LocalDispatcher, Record
from moeops.dispatch.plans import plan_of_buffers
from moeops.dispatch.region import Region, can_be_a_region, nodes_of_region
from moeops.dispatch.transports import StaticTransport
from moeops.ops.padding import pad_rows, unpad_rows
from moeops.types import Routing, SlotRouting


def check_row_capacity(op: str, capacity: Any) -> None:
    """``capacity`` is a positive number of rows or factor."""
    if isinstance(capacity, bool) or not isinstance(capacity, (int, float)):
        raise TypeError(
            f"{op}: capacity must be an int or a float for static dispatch, got {_checks.describe(capacity)}. Pass "
            "rows per expert and sending rank, or a factor on T * K / E."
        )
    if not 0 < capacity < math.inf:
        raise ValueError(
            f"{op}: capacity must be above 0 and finite, got {capacity}. Pass rows per expert and sending rank, or a "
            "factor on T * K / E."
        )


class _Sorted(NamedTuple):
    """Tokens in expert order, and what turns the buffers that come back into tokens.

    Attributes:
        rows: nest of ``[N, ...]``; of slots, which all experts have as many of, ``[E, S, ...]``.
        record: what brings rows in expert order back to their tokens.
        expert_offsets: ``[E + 1]``, of these rows; ``None`` for slots.
        num_rows: how many there are, those that do not fit included; of slots ``S``.
        wanted: ``C`` by this rank's own tokens.
    """

    rows: Any
    record: Record
    expert_offsets: Tensor | None
    num_rows: int
    wanted: int


# begin(rows, capacity): what is under way, and how it is cut.
_Begin = Callable[[_Sorted, int], tuple[list[Any], Any]]


class _Arrived:
    """In the place of a ``Flight`` whose rows are there."""

    def __init__(self, rows: Any) -> None:
        self.rows = self.sent = rows

    def finish(self) -> Any:
        """Return the rows."""
        return self.rows


class StaticDispatcher(Dispatcher):
    """Every rank sends every expert a buffer of ``capacity`` rows: sizes never depend on values.

    Nothing is copied to the host, and the layer can be captured in a CUDA graph. Pairs beyond an expert's capacity on
    their rank are dropped, last tokens first, and add nothing; slots without a pair hold zeros, and experts compute
    on them too.

    Chunks are parts of the capacity: see ``n_chunks`` of ``ExchangeOptions``. They do not change what is dropped.

    Args:
        num_expert: ``E_local``, the same on every rank.
        group: the ranks, ``None`` for one.
        capacity: ``C``: an int, rows per expert and sending rank; or a float, a factor on ``T * K / E``, rounded up. A
            gate that mixes tokens has its own number of slots, and no rows to drop. Where ``C`` depends on the tokens,
            ranks with different numbers of them exchange one ``C``, see ``CommonSize``; compiled code, whose sizes are
            fixed, raises ValueError where they differ, see ``CommonSize.require``, and in exported programs and CUDA
            graphs all ranks must have as many tokens.
        n_chunks: parts, at least 1, or a pair of these, forward and backward; the same on every rank. They differ where
            the experts are one call only, without hooks on rows and without a hierarchy of the form "leader". With one
            rank there is no backward of its own.
        hierarchy: how the ranks are arranged as nodes, the same on every rank; ``None`` for the flat exchange.

    Host sync: none while ``C`` stays what it is; where it is a factor one in the first forward, and one where a rank's
    own ``C`` changes.
    """

    takes_stage_hooks = True

    def __init__(
        self,
        num_expert: int,
        group: RankGroup | None,
        capacity: int | float,
        *,
        n_chunks: int | tuple[int, int] = 1,
        hierarchy: Hierarchy | None = None,
    ) -> None:
        check_row_capacity("StaticDispatcher", capacity)
        self.num_expert = num_expert
        self.group = group or ALONE
        self.capacity = capacity
        self._factor = Fraction(capacity).limit_denominator(10000).as_integer_ratio()
        self.degrees = as_degrees("StaticDispatcher", n_chunks)
        self.hierarchy = hierarchy
        self._common = None
        if self.group.size > 1:
            remedy = "Pad shorter batches, or pass an int as capacity."
            self._common = CommonSize("static dispatch", self.group, self._send_zeros, remedy)

    def set_degrees(self, degrees: Degrees) -> None:
        """Work in so many chunks from now on."""
        self.degrees = degrees

    def capacity_of(self, num_pairs: int) -> int:
        """``C`` for a number of token-expert pairs on this rank."""
        if isinstance(self.capacity, int):
            return self.capacity
        # In integers, which stay exact where the number is symbolic.
        num_experts = self.group.size * self.num_expert
        numerator, denominator = self._factor
        return -(-num_pairs * numerator // (denominator * num_experts))

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        *,
        beside: Beside | None = None,
    ) -> Any:
        """Send every part of the buffers, run the experts on each as it arrives, send it back, combine."""
        rows = self._sort(routing, inp)
        in_regions = self._works_in_regions and (beside is None or not self.degrees.are_one)
        if in_regions and isinstance(block, RegionBlock):
            return self._run_region(rows, block, beside)
        flights, parts = self._exchange(rows, self._begin)
        if beside is not None:
            beside()
        returned = []
        for flight, (_, length) in zip(flights, parts, strict=True):
            out = self._run_buffers(self._receive(flight, length), length, experts, block)
            returned.append(self._send(out, back=True))
        outs = [
            self._receive(flight, length)
            for flight, (_, length) in zip(returned, parts, strict=True)
        ]
        if len(outs) == 1:
            return self._drain(outs[0], rows)
        return self._drain(_nests.map_leaves(lambda *leaves: torch.cat(leaves, 1), *outs), rows)

    @property
    def _works_in_regions(self) -> bool:
        """There are other ranks, and nothing between the stages."""
        alone = self.group.size == 1 or not can_be_a_region(self.hierarchy)
        return not alone and not self.stage_hooks.on_rows

    def _run_region(self, rows: _Sorted, block: RegionBlock, beside: Beside | None) -> Any:
        """Send buffers, and leave the rest to the region."""
        flights, buffers = self._exchange(rows, self._begin_region)
        if beside is not None:
            beside()
        tables = [flight.sent for flight in flights]
        nodes = nodes_of_region(self.hierarchy)
        region = Region("static", tables, [], self.group, self.num_expert, self.degrees, nodes)
        return self._drain(block(buffers, None, region), rows)

    def _begin_region(self, rows: _Sorted, capacity: int) -> tuple[list[Any], Any]:
        """Begin to send buffers of a capacity, to which the region brings gradients; inside nodes they are there."""
        buffers = _nests.map_leaves(lambda leaf: self._pad(leaf, rows, capacity), rows.rows)
        ahead = buffers.detach()
        nodes = nodes_of_region(self.hierarchy)
        transport = StaticTransport(ahead, [], [], self.group, self.num_expert, nodes)
        flights = [leg.send(ahead) for leg in transport.legs(self.degrees.forward)]
        for flight in flights:
            flight.advance()
        return flights, buffers

    def _sort(self, routing: Routing | SlotRouting, inp: Any) -> _Sorted:
        """Bring tokens into expert order."""
        num_experts = self.group.size * self.num_expert
        rows, expert_offsets, record = LocalDispatcher(num_experts).dispatch(routing, inp)
        num_rows = _nests.leaves(rows)[0].shape[0]
        if not isinstance(routing, SlotRouting):
            wanted = self.capacity_of(routing.topk_ids.shape[0] * routing.topk_ids.shape[1])
            return _Sorted(rows, record, expert_offsets, num_rows, wanted)
        num_slots = num_rows // num_experts
        slots = _nests.map_leaves(
            lambda leaf: leaf.reshape(num_experts, num_slots, *leaf.shape[1:]), rows
        )
        return _Sorted(slots, record, None, num_slots, num_slots)

    def _exchange(self, rows: _Sorted, begin: _Begin) -> tuple[list[Any], Any]:
        """Begin to send buffers, as large as those of all ranks; return what ``begin`` does for that capacity."""
        common, leaf = self._common, _nests.leaves(rows.rows)[0]
        is_fixed = isinstance(self.capacity, int) and rows.expert_offsets is not None
        if common is None or is_fixed or exporting():
            return begin(rows, rows.wanted)
        if torch.compiler.is_compiling():
            return self._begin_with_fixed_size(rows, common, begin)
        if not can_settle(leaf, rows.wanted):
            return begin(rows, rows.wanted)
        # At least one row, which arrives only from ranks that have begun.
        flights, parts = begin(rows, common.begin(max(rows.wanted, 1), leaf.device))
        if not common.changed:
            return flights, parts
        arrived = [flight.finish() for flight in flights]
        again = common.settle(_nests.leaves(arrived[-1])[0])
        assert common.size is not None
        if again:
            return begin(rows, common.size)
        common.warn_of_surplus()
        if rows.expert_offsets is None and common.size < rows.wanted:
            raise ValueError(
                f"static dispatch: every rank of {describe_group(self.group)} must have as many tokens as the others "
                f"for a gate that mixes tokens, got {rows.wanted} slots per expert here and {common.size} on the "
                "others. Pad shorter batches."
            )
        return [_Arrived(part) for part in arrived], parts

    def _begin_with_fixed_size(
        self, rows: _Sorted, common: CommonSize, begin: _Begin
    ) -> tuple[list[Any], Any]:
        """Begin to send buffers whose size a compiler puts into its kernels; raise where ranks' sizes differ."""
        capacity, leaves = torch.sym_max(rows.wanted, 1), _nests.leaves(rows.rows)
        if rows.expert_offsets is not None:
            zero = common.require(leaves, capacity)
            return begin(rows._replace(expert_offsets=rows.expert_offsets + zero), capacity)
        zero = common.require([leaf.flatten(0, 1) for leaf in leaves], capacity)
        slots = _nests.map_leaves(lambda leaf: leaf + zero.to(leaf.dtype), rows.rows)
        return begin(rows._replace(rows=slots), capacity)

    def _send_zeros(self, capacity: int, like: Sequence[Tensor]) -> Tensor:
        """Exchange buffers of a capacity with nothing in them, in as many parts; return what arrived last."""
        num_experts = self.group.size * self.num_expert
        buffers = [leaf.new_zeros(num_experts, capacity, *leaf.shape[1:]) for leaf in like]
        parts = chunk_bounds(capacity, self.degrees.forward)
        flights = [self._send(_part(buffers, *part), hooks=StageHooks()) for part in parts]
        return [flight.finish() for flight in flights][-1][0]

    def _begin(self, rows: _Sorted, capacity: int) -> tuple[list[Any], list[tuple[int, int]]]:
        """Begin to send buffers of a capacity."""
        buffers = _nests.map_leaves(lambda leaf: self._pad(leaf, rows, capacity), rows.rows)
        one_rank = self.group.size == 1
        degrees = self.degrees
        n_chunks = degrees.forward if one_rank else one_degree("StaticDispatcher", degrees)
        parts = chunk_bounds(capacity, n_chunks)
        return [self._send(_part(buffers, start, length)) for start, length in parts], parts

    def _pad(self, leaf: Tensor, rows: _Sorted, capacity: int) -> Tensor:
        """A leaf of the rows in buffers ``[E, C, ...]``."""
        if rows.expert_offsets is not None:
            return _pad_leaf(leaf, rows.expert_offsets, capacity)
        if capacity <= rows.num_rows:
            return leaf[:, :capacity]
        more = leaf.new_zeros(leaf.shape[0], capacity - rows.num_rows, *leaf.shape[2:])
        return torch.cat((leaf, more), 1)

    def _drain(self, buffers: Any, rows: _Sorted) -> Any:
        """Take rows out of buffers ``[E, C, ...]``, and sum those of each token, weighted: ``[T, ...]``."""
        offsets, num_rows = rows.expert_offsets, rows.num_rows
        if offsets is None:
            out = _nests.map_leaves(lambda leaf: leaf[:, :num_rows].flatten(0, 1), buffers)
        else:
            out = _nests.map_leaves(lambda leaf: _unpad_leaf(leaf, offsets, num_rows), buffers)
        return LocalDispatcher(self.group.size * self.num_expert).combine(out, rows.record)

    def _send(self, buffers: Any, *, back: bool = False, hooks: StageHooks | None = None) -> Flight:
        """Begin to send buffers ``[E, C, ...]``, as many to each rank; with one rank they stay as they are."""
        size = self.group.size
        block = self.num_expert * _nests.leaves(buffers)[0].shape[1]
        num_middle = 0 if self.hierarchy is None else self.hierarchy.num_middle
        splits = Splits([block] * size, [block] * size, [block] * num_middle, equal=True)
        if self._travels_as_rows:
            buffers = _nests.map_leaves(lambda leaf: leaf.flatten(0, 1), buffers)
        hooks = self.stage_hooks if hooks is None else hooks
        return Flight(buffers, splits, self.group, self.hierarchy, back=back, hooks=hooks)

    @property
    def _travels_as_rows(self) -> bool:
        """Someone wants rows in dimension 0: an exchange, or a hook."""
        return self.group.size > 1 or bool(self.stage_hooks.on_rows)

    def _receive(self, flight: Flight, capacity: int) -> Any:
        """Wait for buffers ``[W * E_local, C, ...]``."""
        received = flight.finish()
        if not self._travels_as_rows:
            return received
        num_buffers = self.group.size * self.num_expert
        return _nests.map_leaves(
            lambda leaf: leaf.reshape(num_buffers, capacity, *leaf.shape[1:]), received
        )

    def _run_buffers(self, received, capacity, experts, block) -> Any:
        """Outputs for ``[W * E_local, C, ...]``, in the same places."""
        device = _nests.leaves(received)[0].device
        offsets = self._offsets(capacity, device)
        if block is None:
            rows = _nests.map_leaves(self._by_expert, received)
            out = experts(rows, offsets, [self.group.size * capacity] * self.num_expert)
            return _nests.map_leaves(lambda leaf: self._by_rank(leaf, capacity), out)
        # Each row a token with one expert, and the plan is known: the transposition of ranks and experts.
        size, num_expert = self.group.size, self.num_expert
        plan = plan_of_buffers(size, num_expert, capacity, device)
        rows = received.flatten(0, 1)
        dtype = _checks.accumulate_dtype(rows.dtype)
        ones = torch.ones(rows.shape[0], 1, dtype=dtype, device=device)
        out = block(rows, ones, plan)
        return out.view(size * num_expert, capacity, out.shape[1])

    def _offsets(self, capacity, device) -> Tensor:
        """Every expert has ``W * C`` rows."""
        ends = torch.arange(self.num_expert + 1, dtype=torch.int32, device=device)
        return ends * (self.group.size * capacity)

    def _by_expert(self, leaf: Tensor) -> Tensor:
        """``[W * E_local, C, ...]`` as rows in expert order, ``[E_local * W * C, ...]``."""
        ranks = leaf.unflatten(0, (self.group.size, self.num_expert))
        return ranks.transpose(0, 1).flatten(0, 2)

    def _by_rank(self, leaf: Tensor, capacity: int) -> Tensor:
        """The inverse of ``_by_expert``."""
        shape = (self.num_expert, self.group.size, capacity, *leaf.shape[1:])
        return leaf.reshape(shape).transpose(0, 1).flatten(0, 1)


def _part(buffers: Any, start: int, length: int) -> Any:
    """``[E, C, ...]`` cut along the capacity."""
    return _nests.map_leaves(lambda leaf: leaf.narrow(1, start, length), buffers)


def _pad_leaf(leaf: Tensor, expert_offsets: Tensor, capacity: int) -> Tensor:
    """Rows ``[N, ...]`` in expert order into buffers ``[E, C, ...]``."""
    shape = (expert_offsets.shape[0] - 1, capacity, *leaf.shape[1:])
    if leaf.dtype in _checks.FLOAT_DTYPES:
        return pad_rows(as_rows(leaf), expert_offsets, capacity).view(shape)
    slot = torch.arange(capacity, device=leaf.device)
    index = expert_offsets[:-1, None] + slot  # [E, C]
    padding = leaf.new_zeros(1, *leaf.shape[1:])
    index = torch.where(index < expert_offsets[1:, None], index, leaf.shape[0])
    return torch.cat((leaf, padding)).index_select(0, index.flatten()).view(shape)


def _unpad_leaf(leaf: Tensor, expert_offsets: Tensor, num_rows: int) -> Tensor:
    """Buffers ``[E, C, ...]`` into rows ``[N, ...]``; a row that did not fit is zero."""
    flat = leaf if leaf.dim() == 3 else leaf.reshape(*leaf.shape[:2], row_size(leaf.shape[2:]))
    return unpad_rows(flat, expert_offsets, num_rows).view(num_rows, *leaf.shape[2:])
