"""What transports of a region have in common: chunks, and how each travels. T tokens, R rows, K experts each.

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

from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy
from moeops.comm.wires import InFlight, TwoHops, Wire
from moeops.dispatch.degrees import at
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

    def send(self, rows: Tensor) -> InFlight | TwoHops:
        """Begin to send the chunk's part of all rows of this rank to the experts."""
        return InFlight(self.part(rows), self.wire())

    def resume(self, rows: Tensor, begun: Tensor) -> InFlight | TwoHops:
        """The same, where that was begun before, and advanced."""
        return InFlight(rows, self.wire(), begun)

    def turn(self, answers: Tensor) -> InFlight | TwoHops:
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
        hierarchy: how they are arranged as nodes, in the form "2d"; ``None`` for the flat exchange.

    Attributes:
        leg: the kind of its legs.
        num_tables: how many tables it is made of.
        has_weights: rows are tokens, whose weights have a gradient.
        length: what is cut: tokens of this rank, or the capacity.
        ahead: of legs that pass two links, how many are sent on before the experts run on the one before them; ``None``
            for all of them, where the first link is the short one.
    """

    leg: type[Leg]
    num_tables: int
    has_weights = True
    length: int
    ahead: int | None = None

    def __init__(
        self,
        like: Tensor,
        tables: Sequence[Tensor],
        sizes: Sequence[int],
        group: RankGroup,
        num_expert: int,
        hierarchy: Hierarchy | None = None,
    ) -> None:
        self.like = like
        self.tables = tables
        self.sizes = sizes
        self.group = group
        self.num_expert = num_expert
        self.hierarchy = hierarchy
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
