"""Dispatch between ranks in buffers of fixed size. T tokens, K experts per token, N = T * K, W ranks, C capacity."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from moeops import _checks
from moeops.comm.exchange import Splits
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy, start_exchange
from moeops.dispatch.base import Block, Dispatcher, Experts
from moeops.dispatch.local import LocalDispatcher
from moeops.ops.padding import pad_rows, unpad_rows
from moeops.types import Routing, SlotRouting, TokenPlan


def check_capacity(op: str, capacity: Any) -> None:
    """``capacity`` is a positive number of rows or factor."""
    if isinstance(capacity, bool) or not isinstance(capacity, (int, float)):
        raise TypeError(
            f'{op}: capacity must be an int or a float for dispatch="static", got {_checks.describe(capacity)}. Pass '
            "rows per expert and sending rank, or a factor on T * K / E."
        )
    if not 0 < capacity < math.inf:
        raise ValueError(
            f"{op}: capacity must be above 0 and finite, got {capacity}. Pass rows per expert and sending rank, or a "
            "factor on T * K / E."
        )


def chunk_bounds(total: int, n_chunks: int) -> list[tuple[int, int]]:
    """Start and length of ``n_chunks`` parts of equal size, but for one."""
    starts = [total * index // n_chunks for index in range(n_chunks + 1)]
    return [(starts[index], starts[index + 1] - starts[index]) for index in range(n_chunks)]


class StaticDispatcher(Dispatcher):
    """Every rank sends every expert a buffer of ``capacity`` rows: sizes never depend on values.

    Nothing is copied to the host, and the layer can be captured in a CUDA graph. Pairs beyond an expert's capacity on
    their rank are dropped, last tokens first, and add nothing; slots without a pair hold zeros, and experts compute
    on them too.

    Chunks are parts of the capacity: see ``n_chunks`` of ``FMoE``. They do not change what is dropped.

    Args:
        num_expert: ``E_local``, the same on every rank.
        group: the ranks, ``None`` for one.
        capacity: ``C``: an int, rows per expert and sending rank; or a float, a factor on ``T * K / E``, rounded up,
            with which all ranks must have the same number of tokens (``MOEOPS_DEBUG_CHECKS=1`` checks that, outside of
            compiled code). A gate that mixes tokens has its own number of slots, and no rows to drop.
        n_chunks: parts, at least 1, the same on every rank.
        hierarchy: how the ranks are arranged as nodes, the same on every rank; ``None`` for the flat exchange.

    Host sync: none.
    """

    def __init__(
        self,
        num_expert: int,
        group: RankGroup | None,
        capacity: int | float,
        *,
        n_chunks: int = 1,
        hierarchy: Hierarchy | None = None,
    ) -> None:
        check_capacity("StaticDispatcher", capacity)
        self.num_expert = num_expert
        self.group = group or RankGroup("", 1, 0)
        self.capacity = capacity
        self._factor = Fraction(capacity).limit_denominator(10000).as_integer_ratio()
        self.n_chunks = n_chunks
        self.hierarchy = hierarchy

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
    ) -> Any:
        """Send every part of the buffers, run the experts on each as it arrives, send it back, combine."""
        buffers, finish = self._fill(routing, inp)
        first = _pytree.tree_leaves(buffers)[0]
        parts = chunk_bounds(first.shape[1], self.n_chunks)
        waits = [self._start(_part(buffers, start, length)) for start, length in parts]
        returns = []
        for wait, (_, length) in zip(waits, parts, strict=True):
            out = self._run_buffers(wait(), length, experts, block)
            returns.append(self._start(out, back=True))
        outs = [wait() for wait in returns]
        if len(outs) == 1:
            return finish(outs[0])
        return finish(_pytree.tree_map(lambda *leaves: torch.cat(leaves, 1), *outs))

    def dispatch(self, routing: Routing | SlotRouting, inp: Any) -> tuple[Any, Tensor, Any]:
        """Exchange the buffers, in one part; experts get ``W * C`` rows each."""
        buffers, finish = self._fill(routing, inp)
        received = self._start(buffers)()
        capacity = _pytree.tree_leaves(received)[0].shape[1]
        device = _pytree.tree_leaves(received)[0].device
        rows = _pytree.tree_map(self._by_expert, received)
        return rows, self._offsets(capacity, device), (finish, capacity)

    def combine(self, out: Any, record: Any) -> Any:
        """Send the buffers back and sum the rows of each token, weighted."""
        finish, capacity = record
        buffers = _pytree.tree_map(lambda leaf: self._by_rank(leaf, capacity), out)
        return finish(self._start(buffers, back=True)())

    def _fill(self, routing, inp) -> tuple[Any, Callable[[Any], Any]]:
        """Buffers ``[E, C, ...]``, and what turns the buffers that come back into tokens."""
        num_experts = self.group.size * self.num_expert
        local = LocalDispatcher(num_experts)
        rows, expert_offsets, record = local.dispatch(routing, inp)
        num_rows = _pytree.tree_leaves(rows)[0].shape[0]
        if isinstance(routing, SlotRouting):
            buffers = _pytree.tree_map(
                lambda leaf: leaf.reshape(num_experts, num_rows // num_experts, *leaf.shape[1:]),
                rows,
            )
            return buffers, lambda out: local.combine(
                _pytree.tree_map(lambda leaf: leaf.flatten(0, 1), out), record
            )
        capacity = self.capacity_of(routing.topk_ids.shape[0] * routing.topk_ids.shape[1])
        buffers = _pytree.tree_map(lambda leaf: _pad_leaf(leaf, expert_offsets, capacity), rows)

        def finish(out: Any) -> Any:
            kept = _pytree.tree_map(lambda leaf: _unpad_leaf(leaf, expert_offsets, num_rows), out)
            return local.combine(kept, record)

        return buffers, finish

    def _start(self, buffers: Any, *, back: bool = False) -> Callable[[], Any]:
        """Begin to send buffers ``[E, C, ...]``; the function returned waits for ``[W * E_local, C, ...]``."""
        size = self.group.size
        if size == 1:
            return lambda: buffers
        leaves, spec = _pytree.tree_flatten(buffers)
        shapes = [leaf.shape for leaf in leaves]
        block = self.num_expert * shapes[0][1]
        num_middle = 0 if self.hierarchy is None else self.hierarchy.num_middle
        splits = Splits([block] * size, [block] * size, [block] * num_middle, equal=True)
        exchanges = [
            start_exchange(leaf.flatten(0, 1), splits, self.group, self.hierarchy, back=back)
            for leaf in leaves
        ]

        def finish() -> Any:
            received = [
                exchange.finish().view(shape)
                for exchange, shape in zip(exchanges, shapes, strict=True)
            ]
            return _pytree.tree_unflatten(received, spec)

        return finish

    def _run_buffers(self, received, capacity, experts, block) -> Any:
        """Outputs for ``[W * E_local, C, ...]``, in the same places."""
        device = _pytree.tree_leaves(received)[0].device
        offsets = self._offsets(capacity, device)
        if block is None:
            rows = _pytree.tree_map(self._by_expert, received)
            out = experts(rows, offsets, [self.group.size * capacity] * self.num_expert)
            return _pytree.tree_map(lambda leaf: self._by_rank(leaf, capacity), out)
        # Each row a token with one expert, and the plan is known: the transposition of ranks and experts.
        size, num_expert = self.group.size, self.num_expert
        index = torch.arange(size * num_expert * capacity, dtype=torch.int32, device=device)
        plan = TokenPlan(
            index.view(size, num_expert, capacity).transpose(0, 1).reshape(-1),
            index.view(num_expert, size, capacity).transpose(0, 1).reshape(-1, 1),
            offsets,
        )
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
    return _pytree.tree_map(lambda leaf: leaf.narrow(1, start, length), buffers)


def _pad_leaf(leaf: Tensor, expert_offsets: Tensor, capacity: int) -> Tensor:
    """Rows ``[N, ...]`` in expert order into buffers ``[E, C, ...]``."""
    shape = (expert_offsets.shape[0] - 1, capacity, *leaf.shape[1:])
    if leaf.dtype in _checks.FLOAT_DTYPES:
        flat = leaf if leaf.dim() == 2 else leaf.reshape(leaf.shape[0], _size(leaf.shape[1:]))
        return pad_rows(flat, expert_offsets, capacity).view(shape)
    slot = torch.arange(capacity, device=leaf.device)
    index = expert_offsets[:-1, None] + slot  # [E, C]
    padding = leaf.new_zeros(1, *leaf.shape[1:])
    index = torch.where(index < expert_offsets[1:, None], index, leaf.shape[0])
    return torch.cat((leaf, padding)).index_select(0, index.flatten()).view(shape)


def _unpad_leaf(leaf: Tensor, expert_offsets: Tensor, num_rows: int) -> Tensor:
    """Buffers ``[E, C, ...]`` into rows ``[N, ...]``; a row that did not fit is zero."""
    flat = leaf if leaf.dim() == 3 else leaf.reshape(*leaf.shape[:2], _size(leaf.shape[2:]))
    return unpad_rows(flat, expert_offsets, num_rows).view(num_rows, *leaf.shape[2:])


def _size(shape: Any) -> int:
    """Elements of one row, spelt out for symbolic sizes and for no rows."""
    size = 1
    for length in shape:
        size *= length
    return size
