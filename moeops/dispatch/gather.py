"""Every rank sees all tokens, and adds what its experts make of them. T tokens, K experts each, W ranks, R rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeops import _checks, _nests
from moeops._tracing import exporting
from moeops.comm.common_size import CommonSize
from moeops.comm.gathering import (
    GATHERS,
    Gathering,
    check_equal_rows,
    reduce_scatter_rows,
)
from moeops.comm.groups import RankGroup
from moeops.comm.peer import open_peer_memory
from moeops.comm.wires import InFlight
from moeops.cost.schedule import LayerSizes
from moeops.dispatch.base import (
    Beside,
    Block,
    ChunkedOptions,
    Dispatcher,
    ExpertRanks,
    Experts,
    RegionBlock,
    chunk_bounds,
    combine_leaf,
    permute_leaf,
)
from moeops.dispatch.degrees import Degrees, as_degrees
from moeops.dispatch.forms import own_ids, pack_choices, unpack_choices
from moeops.dispatch.local import LocalDispatcher
from moeops.dispatch.lost_pairs import LostPairs, raise_for_lost_pairs
from moeops.dispatch.plans import (
    gathered_rows,
    gathered_rows_of_pairs,
    plan_what_fits,
    rows_of_leg,
)
from moeops.dispatch.region import Region
from moeops.dispatch.scaled_inputs import scale_inputs, sum_copies
from moeops.ops.sorting import count_tokens, sort_tokens
from moeops.types import Routing, SlotRouting, TokenPlan

# Of T * K, above 2 ranks: what balanced loads need, and half as much again.
DEFAULT_ROWS = 1.5


@dataclass(frozen=True, kw_only=True)
class Gather(ChunkedOptions):
    """Bring all tokens to all ranks, and the sums of their experts' outputs back: all-gather and reduce-scatter.

    Every token leaves its rank once per other rank, whatever ``K`` is, and sizes do not depend on values: nothing is
    copied to the host. Every rank must have the same number of tokens in a forward; see ``CommonSize.require``.

    Attributes:
        rows: what a rank's experts have room for, a factor on ``T * K``, the pairs of a rank's tokens; ``None`` for
            room for all pairs that can come with 2 ranks, and 1.5 with more. Pairs without a row are an error in the
            next forward, on all ranks.
        max_tokens: an upper bound of ``T``, the same on every rank: tokens are padded to it, and ranks may then have
            different numbers of them. ``None`` sends no padding.
        n_chunks: see ``ChunkedOptions``; for experts that are one call. With ``rows`` every part has its share of them.
        transport: what brings tokens there and sums back: "nccl", the group's own backend, or "peer", copy engines that
            read the other ranks' memory and leave the GPU's processors to experts, for ranks on one machine with NCCL.

    Example:
        >>> Gather(rows=1.25)
        Gather(n_chunks=1, rows=1.25, max_tokens=None, transport='nccl')
    """

    rows: float | None = None
    max_tokens: int | None = None
    transport: str = "nccl"

    def check(self, ranks: ExpertRanks) -> None:
        """Raise ValueError or TypeError for a wrong option."""
        op, rows = ranks.op, self.rows
        super().check(ranks)
        if self.transport not in GATHERS:
            raise ValueError(
                f"{op}: transport must be one of {tuple(GATHERS)}, got {self.transport!r}. Pick one of them."
            )
        if self.max_tokens is not None:
            _checks.check_int(op, "max_tokens", self.max_tokens, 0, "Use None for no padding.")
        if rows is None:
            return
        if isinstance(rows, bool) or not isinstance(rows, (int, float)):
            raise TypeError(
                f"{op}: rows must be a float or None for gather dispatch, got {_checks.describe(rows)}. Pass a factor "
                "on T * K."
            )
        if not 0 < rows < math.inf:
            raise ValueError(
                f"{op}: rows must be above 0 and finite, got {rows}. Pass a factor on T * K."
            )

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        """Make the dispatcher; with one rank nothing is sent, and it is the local one."""
        if ranks.group is None or ranks.group.size == 1:
            return LocalDispatcher(ranks.num_expert)
        return GatherDispatcher(
            ranks.num_expert,
            ranks.group,
            rows=self.rows,
            max_tokens=self.max_tokens,
            n_chunks=self.degrees(ranks.op),
            transport=self.transport,
        )

    def connect(self, ranks: ExpertRanks) -> None:
        """Let ranks see each other's memory, where they read it."""
        if self.transport == "peer" and ranks.group is not None and ranks.group.size > 1:
            open_peer_memory(ranks.op, ranks.group)

    def layer_sizes(self, ranks: ExpertRanks, num_tokens: int | None) -> LayerSizes | None:
        """Sizes of the layer for a cost model."""
        return self._sizes("gather", ranks, num_tokens or self.max_tokens)


class GatherDispatcher(Dispatcher):
    """Ranks gather all tokens with their choices, run their own experts on them, and add up what came out.

    To a rank's experts, all tokens are there and other ranks' experts are dropped slots: rows come in the order of
    expert, sending rank and token. There are two collectives on the way there, one for each leaf of the input, begun
    before the gate works, and one for ids and weights together; and one on the way back. Sums over the ranks are in
    the type of the output, in the backend's order, so that results may differ from the exact dispatcher's by a rounding
    per rank.

    Args:
        num_expert: ``E_local``, the same on every rank.
        group: the ranks, more than one; rank ``r`` holds experts ``r * E_local`` to ``(r + 1) * E_local``.
        rows, max_tokens, n_chunks, transport: see ``Gather``. Ids and weights always travel by the group's backend.

    Raises:
        ValueError: there are more tokens than ``max_tokens``, or, without it, not as many as on the other ranks; with
        ``MOEOPS_DEBUG_CHECKS=1``, outside of compiled code, ranks have different shapes or types of tokens.
        NotImplementedError: a gate mixes tokens.
        RuntimeError: on every rank, where the forward before had pairs without a row.
    Host sync: none but in the first forward and where the number of tokens changes; experts that are separate modules
    want one copy per forward, as on one rank.
    """

    takes_scaled_inputs = True
    takes_stage_hooks = True
    adds_on_the_way = True

    def __init__(
        self,
        num_expert: int,
        group: RankGroup,
        *,
        rows: float | None = None,
        max_tokens: int | None = None,
        n_chunks: int | tuple[int, int] = 1,
        transport: str = "nccl",
    ) -> None:
        size = group.size
        self.num_expert = num_expert
        self.group = group
        self.max_tokens = max_tokens
        self.transport = transport
        self.degrees = as_degrees("GatherDispatcher", n_chunks)
        factor = (size if size == 2 else DEFAULT_ROWS) if rows is None else rows
        share = min(Fraction(factor).limit_denominator(10000), Fraction(size))
        self._share = share.as_integer_ratio()  # of T * K
        self._lost = LostPairs()
        remedy = 'Pad shorter batches, pass Gather(max_tokens=...), or use dispatch="exact".'
        self._common = CommonSize("gather dispatch", group, self._gather_zeros, remedy)

    def rows_for(
        self, num_tokens: int, top_k: int, num_pairs: int | None = None
    ) -> tuple[int, bool]:
        """Say how many rows this rank's experts work on.

        Args:
            num_tokens: ``T`` of each rank.
            top_k: ``K``.
            num_pairs: upper bound of a rank's pairs that are not dropped, ``None`` for ``T * K``.

        Returns:
            ``R``, and whether more pairs can come.
        """
        if num_pairs is None:
            return gathered_rows(num_tokens, top_k, self.group.size, self.num_expert, self._share)
        return gathered_rows_of_pairs(num_pairs, self.group.size, self._share)

    def set_degrees(self, degrees: Degrees) -> None:
        """Work in so many chunks from now on."""
        self.degrees = degrees

    def start(self, inp: Any, weights: Callable[[], Any], table: Tensor | None) -> dict[str, Any]:
        """Begin to gather tokens: what is sent does not depend on the gate."""
        return self._start(inp)

    def _start(self, inp: Any) -> dict[str, Any]:
        leaves, spec = _nests.flatten(self.stage_hooks.call("before_dispatch", inp))
        num_tokens = leaves[0].shape[0]
        if self.max_tokens is not None:
            leaves = [_pad(leaf, self._padding(num_tokens)) for leaf in leaves]
        elif not exporting():
            zero = self._common.require(leaves, num_tokens)
            if torch.compiler.is_compiling():  # which may move the check behind what it is for
                leaves = [leaf + zero.to(leaf.dtype) for leaf in leaves]
        if _checks.debug_checks() and not torch.compiler.is_compiling():
            check_equal_rows("GatherDispatcher", leaves, self.group)
        if not self.degrees.are_one and not self.stage_hooks.on_rows:
            # The region brings their gradients.
            ahead, parts = (
                leaves[0].detach(),
                chunk_bounds(leaves[0].shape[0], self.degrees.forward),
            )
            wire = GATHERS[self.transport]
            begun = [InFlight(ahead.narrow(0, *part), wire(self.group)) for part in parts]
            return {"gathered": begun, "leaves": leaves, "spec": spec}
        gathered = [Gathering(leaf, self.group, self.transport) for leaf in leaves]
        return {"gathered": gathered, "leaves": leaves, "spec": spec}

    def _gather_zeros(self, num_tokens: int, like: Sequence[Tensor]) -> Tensor:
        """Gather so many tokens with nothing in them, in as many chunks; return what arrived last."""
        for leaf in like:
            zeros = leaf.new_zeros(num_tokens, *leaf.shape[1:])
            for part in chunk_bounds(num_tokens, self.degrees.forward):
                arrived = Gathering(zeros.narrow(0, *part), self.group).finish()
        return arrived

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        gathered: Sequence[Gathering | InFlight] | None = None,
        leaves: list[Tensor] | None = None,
        spec: Any = None,
        *,
        beside: Beside | None = None,
    ) -> Any:
        """Gather choices, run this rank's experts on all tokens, add up over the ranks.

        Args:
            routing: what the gate decided, with ``scale_inputs`` or without.
            inp: nest of ``[T, ...]``.
            experts: this rank's own.
            block: the same as one call.
            gathered: from ``start``.
            leaves: from ``start``.
            spec: from ``start``.
            beside: work to do while tokens and choices are on their way.
        """
        if gathered is None:
            early = self._start(inp)
            gathered, leaves, spec = early["gathered"], early["leaves"], early["spec"]
        assert leaves is not None
        if isinstance(routing, SlotRouting):
            _land(gathered)
            raise NotImplementedError(
                "GatherDispatcher: the gate must choose experts, got one that mixes tokens, whose slots belong to one "
                'expert each. Pass dispatch="exact".'
            )
        # In one chunk, a backward hides what travels behind the weights' gradients in a region, else behind other work.
        if (
            isinstance(block, RegionBlock)
            and not routing.scale_inputs
            and not self.stage_hooks.on_rows
            and (beside is None or not self.degrees.are_one)
        ):
            return self._run_region(routing, block, gathered, leaves[0], beside)
        if not self.degrees.are_one:
            _land(gathered)
            raise NotImplementedError(
                "GatherDispatcher: n_chunks must be 1 where experts are modules or have an activation of your own, "
                f"where weights scale inputs, and where hooks see rows, got {self.degrees}. Pass n_chunks=1, or "
                'dispatch="exact".'
            )
        num_tokens, top_k = routing.topk_ids.shape
        num_pairs = routing.num_rows if self.max_tokens is None else None
        num_rows, may_lose = self.rows_for(self._length(num_tokens), top_k, num_pairs)
        choices = self._send_choices(routing)
        if beside is not None:
            beside()
        ids, weights = unpack_choices(choices.finish())
        tokens = _nests.unflatten([gathering.finish() for gathering in gathered], spec)
        tokens = self.stage_hooks.call("after_dispatch", tokens)
        own = own_ids(ids, self.group.rank, self.num_expert)
        everyone = Routing(own, weights, None, routing.scale_inputs)
        plain, copies = scale_inputs(everyone, tokens)
        assert isinstance(plain, Routing)
        if may_lose:
            plan = self._plan_what_fits(plain.topk_ids, ids, num_rows)
        else:
            plan = sort_tokens(plain.topk_ids, self.num_expert, num_rows)
        if block is not None:
            out = block(copies, plain.topk_weights, plan)
        else:
            rows = _nests.map_leaves(lambda leaf: permute_leaf(leaf, plan), copies)
            out = experts(rows, plan.expert_offsets, None)
            out = _nests.map_leaves(lambda leaf: combine_leaf(leaf, plan, plain.topk_weights), out)
        out = sum_copies(everyone, out)
        out = self.stage_hooks.call("before_combine", out)
        out = _nests.map_leaves(
            lambda leaf: reduce_scatter_rows(leaf, self.group, self.transport), out
        )
        out = self.stage_hooks.call("after_combine", out)
        if self.max_tokens is None:
            return out
        return _nests.map_leaves(lambda leaf: leaf.narrow(0, 0, num_tokens), out)

    def _run_region(
        self,
        routing: Routing,
        block: RegionBlock,
        gathered: Sequence[Gathering | InFlight],
        x: Tensor,
        beside: Beside | None,
    ) -> Tensor:
        """Gather choices, and leave the rest to the region; ``x`` is what ``gathered`` are chunks of."""
        num_tokens = routing.topk_ids.shape[0]
        num_pairs = routing.num_rows if self.max_tokens is None else None
        sizes = [*self._share, -1 if num_pairs is None else num_pairs]
        topk_weights = self._padded(routing.topk_weights, 0)
        choices = self._send_choices(Routing(routing.topk_ids, routing.topk_weights.detach()))
        if beside is not None:
            beside()
        ids, weights = unpack_choices(choices.finish())
        try:
            ids = self._report_lost_pairs(ids, sizes)
        except RuntimeError:
            _land(gathered)
            raise
        tables = [ids, weights, *(gathering.sent for gathering in gathered)]
        name = "gather by peer" if self.transport == "peer" else "gather"
        region = Region(name, tables, sizes, self.group, self.num_expert, self.degrees)
        out = block(x, topk_weights, region)
        return out if self.max_tokens is None else out.narrow(0, 0, num_tokens)

    def _report_lost_pairs(self, ids: Tensor, sizes: Sequence[int]) -> Tensor:
        """Report what finds no row in the chunks of either direction, on any rank; return the ids."""
        size, top_k = self.group.size, ids.shape[1]
        length = ids.shape[0] // size
        by_rank = torch.where(ids < 0, -1, ids // self.num_expert).view(size, length, top_k)
        lost = ids.new_zeros(1, dtype=torch.int64)
        for degree in self.degrees[:1] if self.degrees.are_equal else self.degrees:
            for start, num_tokens in chunk_bounds(length, degree):
                rows, may_lose = rows_of_leg(num_tokens, top_k, size, self.num_expert, sizes)
                if not may_lose:
                    return ids
                owners = by_rank.narrow(1, start, num_tokens).flatten(0, 1)
                lost = lost + self._surplus(owners, rows)
        return self._lost.report(ids, lost)

    def _surplus(self, owners: Tensor, num_rows: int) -> Tensor:
        """Pairs beyond so many rows of each rank, ``[1]``; ``owners [T, K]`` are ranks, -1 for none."""
        surplus = (count_tokens(owners, self.group.size).long() - num_rows).clamp(min=0)
        return surplus.sum(0, keepdim=True)

    def raise_for_lost_pairs(self) -> None:
        """Raise RuntimeError if the last forward had pairs without a row; waits for it.

        A forward raises for the one before by itself, eager or compiled. A replayed CUDA graph cannot: call this after
        the replay, on every rank.
        """
        raise_for_lost_pairs(self._lost.name)

    def _length(self, num_tokens: int) -> int:
        """Tokens that a rank sends."""
        return num_tokens if self.max_tokens is None else self.max_tokens

    def _padding(self, num_tokens: int) -> int:
        """Rows behind the tokens up to ``max_tokens``."""
        assert self.max_tokens is not None
        if torch.compiler.is_compiling():
            torch._check(num_tokens <= self.max_tokens)
        elif num_tokens > self.max_tokens:
            raise ValueError(
                f"GatherDispatcher: max_tokens must be at least the tokens of a rank, got {self.max_tokens} and "
                f"{num_tokens} tokens on rank {self.group.rank} of {self.group.size}. Raise it on all ranks."
            )
        return self.max_tokens - num_tokens

    def _send_choices(self, routing: Routing) -> Gathering:
        """Begin to gather all ranks' ids, counted over all ranks, and weights, ``[W * T, K]`` each, at once."""
        ids = self._padded(routing.topk_ids, -1)
        weights = self._padded(routing.topk_weights, 0)
        return Gathering(pack_choices(ids, weights), self.group)

    def _padded(self, leaf: Tensor, value: int) -> Tensor:
        """Entries ``[T, ...]``, and this value up to ``max_tokens``."""
        if self.max_tokens is None:
            return leaf
        return _pad(leaf, self._padding(leaf.shape[0]), value)

    def _plan_what_fits(self, local_ids: Tensor, ids: Tensor, num_rows: int) -> TokenPlan:
        """Sort pairs by expert; those beyond ``num_rows`` are dropped, the last expert's first, and reported.

        Args:
            local_ids: of this rank's experts, -1 elsewhere.
            ids: the same pairs' ids over all ranks, from which every rank knows what each of them loses.
            num_rows: ``R``, of every rank.
        """
        plan = plan_what_fits(local_ids, self.num_expert, num_rows)
        owners = torch.where(ids < 0, -1, ids // self.num_expert)
        lost = self._surplus(owners, num_rows)
        return plan._replace(expert_offsets=self._lost.report(plan.expert_offsets, lost))


def _land(gathered: Sequence[Gathering | InFlight]) -> None:
    """Wait for what has no use any more, or it would stay in flight."""
    for gathering in gathered:
        gathering.finish()


def _pad(leaf: Tensor, padding: int, value: int = 0) -> Tensor:
    """Add rows behind ``[T, ...]``."""
    return F.pad(leaf, (*(0, 0) * (leaf.dim() - 1), 0, padding), value=value)
