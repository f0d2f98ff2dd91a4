"""Dropless dispatch between ranks. T tokens, K experts per token, R rows received, W ranks, E_local experts each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _nests
from moeops.comm.exchange import Splits, exchange_counts
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy, hierarchical_counts
from moeops.dispatch.base import (
    Beside,
    Block,
    Dispatcher,
    Experts,
    Flight,
    RegionBlock,
    chunk_bounds,
)
from moeops.dispatch.counts import check_signatures, copy_to_host, count_cells, row_signature
from moeops.dispatch.degrees import Degrees, as_degrees, cut_fractions, one_degree
from moeops.dispatch.forms import ByPair, ByRank, Form, Load, owners_of
from moeops.dispatch.hooks import StageHooks
from moeops.dispatch.local import LocalDispatcher, Record
from moeops.dispatch.nodes import Layout, region_by_node
from moeops.dispatch.region import Region, can_be_a_region
from moeops.types import Routing, SlotRouting


class _Counts(NamedTuple):
    """How many rows of a chunk travel.

    Attributes:
        splits: on the host, by rank.
        received: ``[W, C]`` on the device, what each rank's ``Form`` counted of what comes from there.
        sizes: what the form wants of them on the host.
    """

    splits: Splits
    received: Tensor
    sizes: list[int]


class Chunk(NamedTuple):
    """What is known of a part of the work while it is on its way, until its answer is combined.

    Attributes:
        form: in which rows it travels.
        record: what brings the answers to this rank's own rows back to their tokens.
        counts: of rows on their way.
    """

    form: Form
    record: Record
    counts: _Counts


# A chunk, and its rows or its answer in flight.
Sent = tuple[Chunk, Flight]


class ExactDispatcher(Dispatcher):
    """Every token reaches its experts: the ranks exchange counts, then as many rows as there are.

    Where the experts are one call on tokens, a token travels once to each rank that has one of its experts, and comes
    back as their weighted sum; otherwise once per expert. Counts stay on the device but for one copy to the host per
    forward, which sizes the exchange; under a compiler the sizes are symbolic. Ranks may have different numbers of
    tokens, 0 included, in every forward.

    The tokens can be cut into ``n_chunks`` parts: all parts are sent before the first expert runs, and each goes back
    while the next one is computed; backward likewise. The counts of all parts travel together.

    Args:
        num_expert: ``E_local``, the same on every rank.
        group: the ranks, more than one; rank ``r`` holds experts ``r * E_local`` to ``(r + 1) * E_local``.
        n_chunks: parts, at least 1, or a pair of these, forward and backward; the same on every rank. They differ where
            the experts are one call only, without hooks on rows and without a hierarchy of the form "leader".
        hierarchy: how the ranks are arranged as nodes, the same on every rank; ``None`` for the flat exchange. In the
            form "2d" a token that travels by rank goes to each node once, and from there on inside of it.
        onward: the dispatcher that brings tokens which arrived to ``E_local`` experts; ``None`` where they are here.

    Raises:
        ValueError: on every rank, where one sends rows of another size or type than the others.
        NotImplementedError: chunks are asked for with a SlotRouting.
    Host sync: one copy per forward, of ``2 W * (n_chunks + 1) + n_chunks`` integers; for experts that are separate
    modules ``n_chunks * (E_local - 1)`` more, and with a hierarchy ``n_chunks * num_middle`` more. With a hierarchy in
    the form "2d" and experts that are one call with an activation of your own there is another copy per chunk.
    """

    takes_stage_hooks = True

    def __init__(
        self,
        num_expert: int,
        group: RankGroup,
        *,
        n_chunks: int | tuple[int, int] = 1,
        hierarchy: Hierarchy | None = None,
        onward: Dispatcher | None = None,
    ) -> None:
        self.num_expert = num_expert
        self.group = group
        self.hierarchy = hierarchy
        self._by_pair = ByPair(num_expert, group.size)
        self._by_rank = ByRank(
            num_expert, group.size, group.rank, onward or LocalDispatcher(num_expert)
        )
        self._by_node: ExactDispatcher | None = None
        self.set_degrees(as_degrees("ExactDispatcher", n_chunks))
        if hierarchy is not None and not hierarchy.is_flat and hierarchy.form == "2d":
            self._by_node = ExactDispatcher(
                num_expert * hierarchy.node_size,
                hierarchy.across,
                n_chunks=n_chunks,
                onward=ExactDispatcher(num_expert, hierarchy.inside),
            )

    def set_degrees(self, degrees: Degrees) -> None:
        """Work in so many chunks from now on."""
        self.degrees = degrees
        self._points = cut_fractions(degrees)
        if self._by_node is not None:
            self._by_node.set_degrees(degrees)

    def set_stage_hooks(self, hooks: StageHooks) -> None:
        """Call these on each chunk; of rows that go to nodes first, only on their way between nodes."""
        super().set_stage_hooks(hooks)
        if self._by_node is not None:
            self._by_node.set_stage_hooks(hooks)

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        *,
        beside: Beside | None = None,
    ) -> Any:
        """Send every chunk, do what is beside, run the experts on each as it arrives, send it back, combine."""
        # Between the stages of a region there is no place for other work, behind which a backward hides what travels.
        in_regions = self._works_in_regions and (beside is None or not self.degrees.are_equal)
        if in_regions and isinstance(block, RegionBlock) and isinstance(routing, Routing):
            if beside is not None:
                beside()
            if self._by_node is not None:
                assert self.hierarchy is not None
                own = (self.group, self.hierarchy, self.num_expert, self.degrees, self._points)
                region = region_by_node(Layout(*own), routing, inp)
                return block(inp, routing.topk_weights, region)
            return self._run_region(routing, inp, block)
        sent, _ = self.send(routing, inp, block)
        if beside is not None:
            beside()
        return self.join(self.run_and_send_back(sent, experts, block))

    @property
    def _works_in_regions(self) -> bool:
        """There is nothing between the stages."""
        return can_be_a_region(self.hierarchy) and not self.stage_hooks.on_rows

    def _run_region(self, routing: Routing, inp: Any, block: RegionBlock) -> Any:
        """Exchange counts of all chunks of both directions, and leave the rest to the region."""
        form, size, ids = self._by_rank, self.group.size, routing.topk_ids
        owners, firsts = owners_of(ids, self.num_expert)
        counted = [count_cells(ranks, size, self._points) for ranks in (firsts, owners)]
        counts, _ = self._host_counts(form, torch.stack(counted, 2), inp, None)
        sizes = [*self.degrees]
        sizes += [n for cell in counts for n in cell.splits.input_splits]
        sizes += [n for cell in counts for n in cell.splits.output_splits]
        sizes += [n for cell in counts for n in cell.sizes]
        received = torch.stack([cell.received[:, 0] for cell in counts], 1)  # [W, cells]
        tables = [ids, firsts, received]
        region = Region("exact", tables, sizes, self.group, self.num_expert, self.degrees)
        return block(inp, routing.topk_weights, region)

    def send(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        block: Block | None,
        extra: Tensor | None = None,
    ) -> tuple[list[Sent], list[int]]:
        """Begin to send every chunk; there is one copy to the host in here.

        Args:
            routing: as for ``run``.
            inp: as for ``run``.
            block: as for ``run``.
            extra: numbers of at least 0 that someone else needs on the host.

        Returns:
            The chunks, and the numbers of ``extra``.
        """
        by_rank = block is not None and isinstance(routing, Routing)
        if by_rank and self._by_node is not None:
            return self._by_node.send(routing, inp, block, extra)
        form = self._by_rank if by_rank else self._by_pair
        loads = self._loads(form, routing, inp)
        # By rank to which they go, and chunk.
        sends = torch.stack([load.counts for load in loads], 1)  # [W, n_chunks, C]
        counts, numbers = self._host_counts(form, sends, inp, extra)
        return [self._post(form, *pair) for pair in zip(loads, counts, strict=True)], numbers

    def run_and_send_back(
        self, sent: list[Sent], experts: Experts, block: Block | None
    ) -> list[Sent]:
        """Run the experts on each chunk as it arrives, and begin to send it back."""
        returned = []
        for chunk, flight in sent:
            received, sizes = chunk.counts.received, chunk.counts.sizes
            out = chunk.form.run(flight.finish(), received, sizes, experts, block)
            returned.append((chunk, flight.turn(out)))
        return returned

    def join(self, returned: list[Sent]) -> Any:
        """Wait for the chunks' answers, and combine."""
        outs = [chunk.form.combine(flight.finish(), chunk.record) for chunk, flight in returned]
        if len(outs) == 1:
            return outs[0]
        return _nests.map_leaves(lambda *leaves: torch.cat(leaves), *outs)

    def _loads(self, form: Form, routing: Routing | SlotRouting, inp: Any) -> list[Load]:
        """Cut the tokens into chunks, and sort each by where it goes; slots are mixed, in one chunk."""
        if isinstance(routing, Routing):
            n_chunks = one_degree("ExactDispatcher", self.degrees)
            return [form.load(*part) for part in _chunk_tokens(routing, inp, n_chunks)]
        if not self.degrees.are_one:
            raise NotImplementedError(
                f"ExactDispatcher: n_chunks must be 1 for a gate that mixes tokens, got {self.degrees}. A slot holds "
                "tokens of all chunks."
            )
        return [self._by_pair.load_slots(routing, inp)]

    def _host_counts(
        self, form: Form, sends: Tensor, inp: Any, extra: Tensor | None
    ) -> tuple[list[_Counts], list[int]]:
        """Exchange how many rows travel, and copy all that the host needs at once; see ``send``."""
        n_chunks = sends.shape[1]
        # Size and type of a row go with the counts, so that ranks that disagree all see it.
        leaves = _nests.leaves(inp)
        signature = row_signature(leaves)
        marks = torch.cat(
            [torch.full_like(sends[:, 0, :1], mark) for mark in signature], 1
        )  # [W, 2]
        answer, middle = self._exchange_counts(torch.cat((sends.flatten(1), marks), 1))
        # What this rank receives from whom, and what passes through it on its way between other ranks.
        receives = answer[:, :-2].view_as(sends)
        passing = middle[:, :-2].view(middle.shape[0], n_chunks, form.num_counts)
        sizes = torch.stack([form.sizes(receives[:, chunk]) for chunk in range(n_chunks)])
        extra = answer[:0] if extra is None else extra.to(answer.dtype)
        rows = [form.rows_of(counts) for counts in (sends, receives, passing)]
        parts = [*rows, answer[:, -2:], sizes, extra]
        send_rows, receive_rows, middle_rows, signatures, all_sizes, numbers = copy_to_host(parts)
        check_signatures(self.group, leaves, signatures)
        counts = []
        num_sizes = sizes.shape[1]
        for chunk in range(n_chunks):
            splits = Splits(
                send_rows[chunk::n_chunks],
                receive_rows[chunk::n_chunks],
                middle_rows[chunk::n_chunks],
            )
            own_sizes = all_sizes[chunk * num_sizes : (chunk + 1) * num_sizes]
            counts.append(_Counts(splits, receives[:, chunk], own_sizes))
        return counts, numbers

    def _post(self, form: Form, load: Load, counts: _Counts) -> Sent:
        """Copy tokens into rows and begin to send them."""
        rows, choices, record = form.post(load, sum(counts.splits.input_splits))
        flight = Flight(
            rows,
            counts.splits,
            self.group,
            self.hierarchy,
            beside=choices,
            hooks=self.stage_hooks,
        )
        return Chunk(form, record, counts), flight

    def _exchange_counts(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """The other ranks' counts, and those that pass through this rank on their way."""
        if self.hierarchy is None:
            return exchange_counts(counts, self.group), counts[:0]
        return hierarchical_counts(counts, self.hierarchy)


def _chunk_tokens(routing: Routing, inp: Any, n_chunks: int) -> list[tuple[Routing, Any]]:
    """Routing and input of each part of the tokens; parts may be empty."""
    if n_chunks == 1:
        return [(routing, inp)]
    parts = []
    ids, weights = routing.topk_ids, routing.topk_weights
    for start, length in chunk_bounds(ids.shape[0], n_chunks):
        part = _nests.map_leaves(lambda leaf, s=start, n=length: leaf.narrow(0, s, n), inp)
        choices = Routing(ids.narrow(0, start, length), weights.narrow(0, start, length))
        parts.append((choices, part))
    return parts
