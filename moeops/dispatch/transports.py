"""How the chunks of a region travel: the transports. T tokens, K experts each, E experts, E_local on a rank, W ranks.

C capacity; with a hierarchy, M nodes of L ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeops import _checks
from moeops.comm.exchange import AllToAll, Splits
from moeops.comm.gathering import GATHERS
from moeops.comm.hierarchical import send_in_two_hops
from moeops.comm.wires import InFlight, TwoHops, Wire
from moeops.dispatch.degrees import cut_points
from moeops.dispatch.forms import own_ids, pack_choices
from moeops.dispatch.legs import Choices, Cut, Leg, Transport, cuts
from moeops.dispatch.plans import plan_of_buffers, plan_what_fits, rows_of_leg
from moeops.types import TokenPlan


class EvenTransport(Transport):
    """What arrives are blocks of equal length, each of which is cut alike.

    Attributes:
        num_blocks: how many arrive.
    """

    num_blocks: int

    def positions(self, degree: int, leg: Leg) -> Tensor:
        """Ranges of every block, in the order of blocks."""
        device = self.like.device
        blocks = torch.arange(self.num_blocks, device=device).unsqueeze(1)
        ranges = []
        for part in leg.cut.within(cut_points([degree])):
            whole = next(c for c in cuts(degree) if c.start <= part.start and part.end <= c.end)
            first, block_length = whole.bounds(self.length)
            begin, length = part.bounds(self.length)
            # Behind all blocks of the legs before, and in each block of this one behind what its leg has first.
            offset = self.num_blocks * first + begin - first
            ranges.append(offset + blocks * block_length + torch.arange(length, device=device))
        return torch.cat(ranges, 1).flatten()


class GatherTransport(EvenTransport):
    """All ranks' tokens go to all ranks, and the sums of what these made of them come back.

    ``tables`` are ids and weights of all ranks' tokens, ``[W * T, K]`` each. ``sizes`` are those of ``rows_of_leg``.
    """

    num_tables = 2

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.num_blocks = self.group.size


class PeerGatherTransport(GatherTransport):
    """The same by copy engines: see ``moeops.comm.peer``."""


class GatherLeg(Leg[GatherTransport]):
    """A part of every rank's tokens."""

    def wire(self) -> Wire:
        """An all-gather, and a reduce-scatter back."""
        name = "peer" if isinstance(self.transport, PeerGatherTransport) else "nccl"
        return GATHERS[name](self.transport.group)

    def part(self, rows: Tensor) -> Tensor:
        """Tokens of this rank."""
        return rows.narrow(0, self.start, self.length)

    def choices(self) -> Choices:
        """Those of all ranks' tokens, in the order of ranks."""
        ids, weights = self.transport.tables
        dtype = _checks.accumulate_dtype(self.transport.like.dtype)
        return Choices(self._part(ids), self._part(weights).to(dtype))

    def _part(self, every: Tensor) -> Tensor:
        by_rank = every.view(self.transport.num_blocks, self.transport.length, every.shape[1])
        return by_rank.narrow(1, self.start, self.length).flatten(0, 1)

    def plan(self, choices: Choices) -> TokenPlan:
        """Sort what is for experts of this rank, as far as there are rows."""
        group, num_expert = self.transport.group, self.transport.num_expert
        assert choices.ids is not None
        num_rows, may_lose = rows_of_leg(
            self.length, choices.ids.shape[1], group.size, num_expert, self.transport.sizes
        )
        ids = own_ids(choices.ids, group.rank, num_expert)
        if may_lose:
            return plan_what_fits(ids, num_expert, num_rows)
        return TokenPlan(*torch.ops.moeops.sort_tokens(ids, num_expert, num_rows))


GatherTransport.leg = GatherLeg


class StaticTransport(EvenTransport):
    """Buffers ``[E, C, D]`` go to the ranks of their experts, and back; no tables, no sizes.

    With a hierarchy they pass the links inside the node first, and last on their way back.
    """

    num_tables = 0
    has_weights = False

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.length = self.like.shape[1]
        self.num_blocks = self.group.size * self.num_expert

    def join(self, parts: list[Tensor]) -> Tensor:
        """Buffers ``[E, C, ...]``."""
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class StaticLeg(Leg[StaticTransport]):
    """A part of the capacity."""

    def wire(self) -> Wire:
        """An exchange of equal parts."""
        splits = self._splits()
        return AllToAll(splits.input_splits, splits.output_splits, self.transport.group)

    def send(self, rows: Tensor) -> InFlight | TwoHops:
        """Begin to send the chunk's part of all buffers."""
        if self.transport.hierarchy is None:
            return super().send(rows)
        return send_in_two_hops(self.part(rows), self._splits(), self.transport.hierarchy)

    def turn(self, answers: Tensor) -> InFlight | TwoHops:
        """Begin to send answers back."""
        if self.transport.hierarchy is None:
            return super().turn(answers)
        return send_in_two_hops(answers, self._splits(), self.transport.hierarchy, back=True)

    def _splits(self) -> Splits:
        block, size = self.transport.num_expert * self.length, self.transport.group.size
        return Splits([block] * size, [block] * size, [block] * size, equal=True)

    def part(self, rows: Tensor) -> Tensor:
        """Rows of every buffer."""
        return rows.narrow(1, self.start, self.length).flatten(0, 1)

    def combine(self, arrived: Tensor) -> Tensor:
        """Rows as buffers."""
        return arrived.view(self.transport.num_blocks, self.length, *arrived.shape[1:])

    def choices(self) -> Choices:
        """One expert each, with weight 1: tokens are summed where they came from."""
        like = self.transport.like
        dtype = _checks.accumulate_dtype(like.dtype)
        num_rows = self.transport.num_blocks * self.length
        return Choices(None, torch.ones(num_rows, 1, dtype=dtype, device=like.device))

    def plan(self, choices: Choices) -> TokenPlan:
        """The transposition of ranks and experts."""
        transport = self.transport
        device = transport.like.device
        return plan_of_buffers(transport.group.size, transport.num_expert, self.length, device)


StaticTransport.leg = StaticLeg


class CellTransport(Transport):
    """What arrives depends on the tokens, and is counted by cell.

    Cells lie between the cut points of two degrees, and every degree that legs are asked for must have its own among
    these. ``sizes`` begin with the two.

    Attributes:
        points: where cells begin, and where the last one ends.
        arriving: the table of how many tokens come in each cell, ``[W, cells]``, from each rank in the order in which
            they arrive.
    """

    arriving: Tensor

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.points = cut_points(int(degree) for degree in self.sizes[:2])

    def cells(self, cut: Cut) -> range:
        """Cells of a chunk."""
        return range(self.points.index(cut.start), self.points.index(cut.end))

    def positions(self, degree: int, leg: Leg) -> Tensor:
        """The cells of a rank lie one behind the other in every leg that has them."""
        return self.places(self.arriving, degree, leg.cut, sum(leg.receives))  # type: ignore[attr-defined]  # by cell

    def places(self, counts: Tensor, degree: int, cut: Cut, num_rows: int) -> Tensor:
        """Where the rows of a chunk are among those of all legs of a degree, ``[num_rows]``.

        Args:
            counts: rows from each place in each cell, ``[places, cells]``; legs have them by place, then by cell.
            degree: of the legs.
            cut: the chunk.
            num_rows: how many they are.
        """
        counts = counts.long()
        # The cells as they arrive: first those of the first leg, by place.
        every = torch.cat([self._take(counts, part).flatten() for part in cuts(degree)])
        begins = every.cumsum(0) - every
        num_places = counts.shape[0]
        parts = begins.split([num_places * len(self.cells(part)) for part in cuts(degree)])
        begins = torch.cat([part.view(num_places, -1) for part in parts], 1)  # [places, cells]
        lengths, begins = self._take(counts, cut).flatten(), self._take(begins, cut)
        shifts = begins.flatten() - (lengths.cumsum(0) - lengths)
        shifts = torch.repeat_interleave(shifts, lengths, output_size=num_rows)
        return shifts + torch.arange(num_rows, device=shifts.device)

    def _take(self, table: Tensor, cut: Cut) -> Tensor:
        cells = self.cells(cut)
        return table.narrow(1, cells.start, len(cells))


class ExactTransport(CellTransport):
    """Every token goes once to each rank that has one of its experts, and the ranks' sums come back.

    ``tables`` are this rank's ids ``[T, K]``; its tokens' ranks, each once, ``[T, K]``, -1 for none; and how many
    tokens come from each rank in each cell, ``[W, cells]``. ``sizes`` are the two degrees; then, by cell, tokens to
    each rank, tokens from each rank, and this rank's pairs.
    """

    num_tables = 3

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.arriving = self.tables[2]
        size, num_cells = self.group.size, len(self.points) - 1
        self.sends, self.receives, pairs = _by_cell(self.sizes[2:], num_cells, (size, size, 1))
        self.pairs = [numbers[0] for numbers in pairs]

    def packed_choices(self, weights: Tensor | None) -> Tensor:
        """Ids and weights, which travel beside the tokens."""
        assert weights is not None
        return pack_choices(self.tables[0], weights)


def _by_cell(
    numbers: Sequence[int], num_cells: int, lengths: Sequence[int]
) -> list[list[list[int]]]:
    """Tables of numbers, of these lengths in each cell, one behind the other."""
    tables, start = [], 0
    for length in lengths:
        ends = range(start, start + num_cells * length, length)
        tables.append([list(numbers[i : i + length]) for i in ends])
        start += num_cells * length
    return tables


class ExactLeg(Leg[ExactTransport]):
    """A part of this rank's tokens."""

    def __init__(self, transport: ExactTransport, cut: Cut, kept: Sequence[Tensor] = ()) -> None:
        super().__init__(transport, cut, kept)
        cells = transport.cells(cut)
        self.sends = _sums(transport.sends, cells)
        self.receives = _sums(transport.receives, cells)
        self.num_pairs = sum(transport.pairs[cell] for cell in cells)
        self.kept = kept or self._sort_by_rank()
        self.by_rank = TokenPlan(*self.kept)

    def _sort_by_rank(self) -> TokenPlan:
        ranks = self.transport.tables[1].narrow(0, self.start, self.length)
        return sort_by_target(ranks, self.transport.group.size, sum(self.sends))

    def wire(self) -> Wire:
        """An exchange of what there is."""
        return AllToAll(self.sends, self.receives, self.transport.group)

    def part(self, rows: Tensor) -> Tensor:
        """Rows of tokens, copied into the order of ranks."""
        return torch.ops.moeops.permute_tokens(
            rows.narrow(0, self.start, self.length), *self.by_rank
        )

    def combine(self, arrived: Tensor) -> Tensor:
        """Add up what the ranks made of each token."""
        return torch.ops.moeops.unpermute_tokens(arrived, *self.by_rank, None)

    def plan(self, choices: Choices) -> TokenPlan:
        """Sort the pairs that are of this rank's experts."""
        return _sort_own_pairs(self.transport, choices, self.num_pairs)


ExactTransport.leg = ExactLeg


def _sums(by_cell: list[list[int]], cells: range) -> list[int]:
    """Numbers of each rank, over cells."""
    return [sum(column) for column in zip(*(by_cell[cell] for cell in cells), strict=True)]


def sort_by_target(targets: Tensor, num_targets: int, num_rows: int) -> TokenPlan:
    """Sort rows by where each goes, ``[T, K]`` with -1 for nowhere: a plan of the ``num_rows`` that go somewhere."""
    plan = TokenPlan(*torch.ops.moeops.sort_tokens(targets, num_targets))
    # What has a place to go to comes first; what is dropped has no row.
    torch._check(num_rows <= targets.shape[0] * targets.shape[1])
    return plan._replace(row_to_pair=plan.row_to_pair.narrow(0, 0, num_rows))


def _sort_own_pairs(transport: Transport, choices: Choices, num_pairs: int) -> TokenPlan:
    assert choices.ids is not None
    ids = own_ids(choices.ids, transport.group.rank, transport.num_expert)
    torch._check(num_pairs <= ids.shape[0] * ids.shape[1])
    return TokenPlan(*torch.ops.moeops.sort_tokens(ids, transport.num_expert, num_pairs))


class NodesTransport(CellTransport):
    """Every token goes once to each node with one of its experts, and on to its ranks there; sums come back likewise.

    Between nodes it goes to the rank that has the place of its own rank there, which sends it on inside the node, and
    adds up what the node's ranks made of it.

    ``tables`` are this rank's tokens' nodes, each once, ``[T, K]``, -1 for none; how many tokens come from each node in
    each cell, ``[M, cells]``; of the tokens that pass through this rank, by node, the ranks inside, each once,
    ``[P, K]``; how many come to the experts in each cell, ``[W, cells]``, by the place in the node of the rank that
    they come from, then by its node; ids and weights of these, ``[R, K]`` each. ``sizes`` are the two degrees; then, by
    cell, tokens to each node, from each node, to each rank inside, from each rank inside, and this rank's pairs.
    """

    num_tables = 6
    ahead = 1

    def __init__(self, *args) -> None:
        super().__init__(*args)
        assert self.hierarchy is not None
        self.arriving = self.tables[3]
        size, nodes = self.hierarchy.node_size, self.hierarchy.num_nodes
        num_cells = len(self.points) - 1
        lengths = (nodes, nodes, size, size, 1)
        *self.counts, pairs = _by_cell(self.sizes[2:], num_cells, lengths)
        self.pairs = [numbers[0] for numbers in pairs]


class NodesLeg(Leg[NodesTransport]):
    """A part of this rank's tokens, and of those that pass through it."""

    def __init__(self, transport: NodesTransport, cut: Cut, kept: Sequence[Tensor] = ()) -> None:
        super().__init__(transport, cut, kept)
        assert transport.hierarchy is not None
        inside, across = transport.hierarchy.inside, transport.hierarchy.across
        cells = transport.cells(cut)
        sends, self.passing, onward, self.receives = (_sums(t, cells) for t in transport.counts)
        self.num_pairs = sum(transport.pairs[cell] for cell in cells)
        self.kept = kept or self._sort(sum(sends), sum(onward))
        self.by_node, self.by_place = TokenPlan(*self.kept[:3]), TokenPlan(*self.kept[3:])
        self.between = AllToAll(sends, self.passing, across)
        self.inside = AllToAll(onward, self.receives, inside)

    def _sort(self, num_sent: int, num_onward: int) -> tuple[Tensor, ...]:
        """Plans of what goes to nodes, and of what goes on from here."""
        transport = self.transport
        nodes, passing, places = transport.tables[:3]
        assert transport.hierarchy is not None
        by_node = sort_by_target(
            nodes.narrow(0, self.start, self.length), transport.hierarchy.num_nodes, num_sent
        )
        own = self._take(passing, places, sum(self.passing))
        return *by_node, *sort_by_target(own, transport.hierarchy.node_size, num_onward)

    def _take(self, counts: Tensor, table: Tensor, num_rows: int) -> Tensor:
        """The leg's rows of a table that has those of all legs."""
        if self.cut == cuts(1)[0]:
            return table
        return table.index_select(0, self.transport.places(counts, 1, self.cut, num_rows))

    def send(self, rows: Tensor) -> TwoHops:
        """Begin to send the chunk's part of all tokens, copied into the order of nodes."""
        permute = torch.ops.moeops.permute_tokens
        sent = permute(rows.narrow(0, self.start, self.length), *self.by_node)
        return TwoHops(sent, self.between, lambda x: permute(x, *self.by_place), self.inside)

    def turn(self, answers: Tensor) -> TwoHops:
        """Begin to send answers back; the ranks of a node are added up on the way."""

        def add_up(arrived: Tensor) -> Tensor:
            return torch.ops.moeops.unpermute_tokens(arrived, *self.by_place, None)

        return TwoHops(answers, self.inside.turn(), add_up, self.between.turn())

    def combine(self, arrived: Tensor) -> Tensor:
        """Add up what the nodes made of each token."""
        return torch.ops.moeops.unpermute_tokens(arrived, *self.by_node, None)

    def choices(self) -> Choices:
        """Those of the tokens that arrive."""
        *_, arriving, ids, weights = self.transport.tables
        num_rows = sum(self.receives)
        dtype = _checks.accumulate_dtype(self.transport.like.dtype)
        return Choices(
            self._take(arriving, ids, num_rows), self._take(arriving, weights, num_rows).to(dtype)
        )

    def plan(self, choices: Choices) -> TokenPlan:
        """Sort the pairs that are of this rank's experts."""
        return _sort_own_pairs(self.transport, choices, self.num_pairs)


NodesTransport.leg = NodesLeg


TRANSPORTS: dict[str, type[Transport]] = {
    "exact": ExactTransport,
    "gather": GatherTransport,
    "gather by peer": PeerGatherTransport,
    "nodes": NodesTransport,
    "static": StaticTransport,
}
