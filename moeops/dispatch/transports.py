"""How the chunks of a region travel. T tokens, K experts each, E experts, E_local on a rank, W ranks, C capacity.

A transport belongs to one pass through a region. It cuts the rows of this rank into chunks, and knows of each chunk, a
leg, how it gets to the experts, how it is sorted there, and how answers come back. What brings tokens to the experts
brings the gradients of their answers there as well, since the gradient of a sum over ranks goes to every rank that
added to it, and what brings answers back brings gradients of tokens back. So both passes go the same way, in chunks of
their own.

Nothing here is differentiable: ``moeops.dispatch.region`` calls it within an ``autograd.Function``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moeops import _checks
from moeops.comm.exchange import AllToAll
from moeops.comm.gathering import GATHERS
from moeops.comm.groups import RankGroup
from moeops.comm.wires import InFlight, Wire
from moeops.dispatch.degrees import at, cut_points
from moeops.dispatch.forms import own_ids, pack_choices
from moeops.dispatch.plans import plan_of_buffers, plan_what_fits, rows_of_leg
from moeops.types import TokenPlan


class Choices(NamedTuple):
    """What experts need to know of rows, beside the rows.

    Attributes:
        ids: ``[R, K]``, over all ranks; ``None`` where the place of a row says as much.
        weights: ``[R, K]``.
    """

    ids: Tensor | None
    weights: Tensor


class Cut(NamedTuple):
    """A chunk, as a part of the whole."""

    start: Fraction
    end: Fraction

    def bounds(self, total: int) -> tuple[int, int]:
        """First of its entries, and how many they are, of so many in all."""
        first = at(self.start, total)
        return first, at(self.end, total) - first

    def within(self, points: Sequence[Fraction]) -> list[Cut]:
        """Its parts between these points."""
        inner = [self.start, *(p for p in points if self.start < p < self.end), self.end]
        return [Cut(*pair) for pair in itertools.pairwise(inner)]


def cuts(degree: int) -> list[Cut]:
    """The chunks of a degree."""
    return [Cut(Fraction(i, degree), Fraction(i + 1, degree)) for i in range(degree)]


AnyTransport = TypeVar("AnyTransport", bound="Transport")


class Leg(Generic[AnyTransport]):
    """One chunk. R rows arrive at this rank.

    Args:
        transport: whose chunk it is.
        cut: which part of the rows.
        kept: ``kept`` of the same leg in the forward.

    Attributes:
        kept: tensors that were made when the leg was, for the backward.
    """

    def __init__(self, transport: AnyTransport, cut: Cut, kept: Sequence[Tensor] = ()) -> None:
        self.transport = transport
        self.cut = cut
        self.start, self.length = cut.bounds(transport.length)
        self.kept = kept

    def wire(self) -> Wire:
        """The collective that brings rows to the experts; the one of its gradients brings answers back."""
        raise NotImplementedError(
            f"{type(self).__name__}: wire must be written by the subclass, got none. Write it."
        )

    def part(self, rows: Tensor) -> Tensor:
        """The chunk's part of all rows of this rank, as it is sent."""
        raise NotImplementedError(
            f"{type(self).__name__}: part must be written by the subclass, got none. Write it."
        )

    def send(self, rows: Tensor) -> InFlight:
        """Begin to send the chunk's part of all rows of this rank to the experts."""
        return InFlight(self.part(rows), self.wire())

    def resume(self, rows: Tensor, begun: Tensor) -> InFlight:
        """The same, where that was begun before."""
        return InFlight(rows, self.wire(), begun)

    def turn(self, answers: Tensor) -> InFlight:
        """Begin to send answers ``[R, ...]`` to rows that arrived back."""
        return InFlight(answers, self.wire().turn())

    def combine(self, arrived: Tensor) -> Tensor:
        """Answers that came back, as the chunk's part of all rows."""
        return arrived

    def choices(self) -> Choices | None:
        """What is known of the rows that arrive; ``None`` where it travels with them."""
        return None

    def plan(self, choices: Choices) -> TokenPlan:
        """Sort the rows that arrived by this rank's experts."""
        raise NotImplementedError(
            f"{type(self).__name__}: plan must be written by the subclass, got none. Write it."
        )


class Transport:
    """Base of the transports.

    Args:
        like: rows that are to be sent, or gradients of answers.
        tables: tensors without a gradient that the transport is made of.
        sizes: numbers that it is made of.
        group: the ranks, more than one.
        num_expert: ``E_local``.

    Attributes:
        leg: the kind of its legs.
        num_tables: how many tables it is made of.
        has_weights: rows are tokens, whose weights have a gradient.
        length: what is cut: tokens of this rank, or the capacity.
    """

    leg: type[Leg]
    num_tables: int
    has_weights = True
    length: int

    def __init__(
        self,
        like: Tensor,
        tables: Sequence[Tensor],
        sizes: Sequence[int],
        group: RankGroup,
        num_expert: int,
    ) -> None:
        self.like = like
        self.tables = tables
        self.sizes = sizes
        self.group = group
        self.num_expert = num_expert
        self.length = like.shape[0]

    def legs(self, degree: int) -> list[Leg]:
        """All rows in so many chunks."""
        return [self.leg(self, cut) for cut in cuts(degree)]

    def legs_again(self, kept: Sequence[Sequence[Tensor]]) -> list[Leg]:
        """The legs of the forward, by what these kept."""
        return [self.leg(self, cut, own) for cut, own in zip(cuts(len(kept)), kept, strict=True)]

    def packed_choices(self, weights: Tensor | None) -> Tensor | None:
        """Choices in the form in which they travel, in the forward; ``None`` where they do not."""
        return None

    def positions(self, degree: int, leg: Leg) -> Tensor:
        """Where the rows that arrive with a leg are among those of all legs of another degree, in order: ``[R]``."""
        raise NotImplementedError(
            f"{type(self).__name__}: positions must be written by the subclass, got none. Write it."
        )

    def join(self, parts: list[Tensor]) -> Tensor:
        """What all legs have combined, as one tensor."""
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    """Buffers ``[E, C, D]`` go to the ranks of their experts, and back; no tables, no sizes."""

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
        group = self.transport.group
        splits = [self.transport.num_expert * self.length] * group.size
        return AllToAll(splits, splits, group)

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


class ExactTransport(Transport):
    """Every token goes once to each rank that has one of its experts, and the ranks' sums come back.

    ``tables`` are this rank's ids ``[T, K]``; its tokens' ranks, each once, ``[T, K]``, -1 for none; and how many
    tokens come from each rank in each cell, ``[W, cells]``. Cells lie between the cut points of two degrees, and every
    degree that legs are asked for must have its own among these. ``sizes`` are the two; then, by cell, tokens to each
    rank, tokens from each rank, and this rank's pairs.
    """

    num_tables = 3

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.points = cut_points(int(degree) for degree in self.sizes[:2])
        numbers, size = list(self.sizes[2:]), self.group.size
        num_cells = len(self.points) - 1
        self.sends = _by_cell(numbers[: num_cells * size], size)
        self.receives = _by_cell(numbers[num_cells * size : 2 * num_cells * size], size)
        self.pairs = numbers[2 * num_cells * size :]

    def cells(self, cut: Cut) -> range:
        """Cells of a chunk."""
        return range(self.points.index(cut.start), self.points.index(cut.end))

    def packed_choices(self, weights: Tensor | None) -> Tensor:
        """Ids and weights, which travel beside the tokens."""
        assert weights is not None
        return pack_choices(self.tables[0], weights)

    def positions(self, degree: int, leg: Leg) -> Tensor:
        """The cells of a rank lie one behind the other in every leg that has them."""
        received = self.tables[2].long()
        # The cells as they arrive: first those of the first leg, by rank.
        arriving = torch.cat([self._take(received, cut).flatten() for cut in cuts(degree)])
        begins = arriving.cumsum(0) - arriving
        parts = begins.split([self.group.size * len(self.cells(cut)) for cut in cuts(degree)])
        begins = torch.cat([part.view(self.group.size, -1) for part in parts], 1)  # [W, cells]
        lengths, begins = self._take(received, leg.cut).flatten(), self._take(begins, leg.cut)
        shifts = begins.flatten() - (lengths.cumsum(0) - lengths)
        num_rows = sum(leg.receives)  # type: ignore[attr-defined]  # of this transport
        shifts = torch.repeat_interleave(shifts, lengths, output_size=num_rows)
        return shifts + torch.arange(num_rows, device=shifts.device)

    def _take(self, table: Tensor, cut: Cut) -> Tensor:
        cells = self.cells(cut)
        return table.narrow(1, cells.start, len(cells))


def _by_cell(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


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
        owners = self.transport.tables[1].narrow(0, self.start, self.length)
        plan = TokenPlan(*torch.ops.moeops.sort_tokens(owners, self.transport.group.size))
        num_rows = sum(self.sends)
        # What has a place to go to comes first; what is dropped has no row.
        torch._check(num_rows <= owners.shape[0] * owners.shape[1])
        return plan._replace(row_to_pair=plan.row_to_pair.narrow(0, 0, num_rows))

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
        group, num_expert = self.transport.group, self.transport.num_expert
        assert choices.ids is not None
        ids = own_ids(choices.ids, group.rank, num_expert)
        torch._check(self.num_pairs <= ids.shape[0] * ids.shape[1])
        return TokenPlan(*torch.ops.moeops.sort_tokens(ids, num_expert, self.num_pairs))


ExactTransport.leg = ExactLeg


def _sums(by_cell: list[list[int]], cells: range) -> list[int]:
    """Numbers of each rank, over cells."""
    return [sum(column) for column in zip(*(by_cell[cell] for cell in cells), strict=True)]


TRANSPORTS: dict[str, type[Transport]] = {
    "exact": ExactTransport,
    "gather": GatherTransport,
    "gather by peer": PeerGatherTransport,
    "static": StaticTransport,
}
