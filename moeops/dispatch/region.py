"""Dispatch, experts and combine as one region with chunks of its own in each direction. T tokens, K experts, R rows.

Autograd reverses what it recorded, so that a backward has the chunks of its forward. The region is one function to it:
the forward sends all its chunks before the first expert runs, and sends each back while the next one is computed; the
backward does the same with gradients, in as many chunks as it likes, and computes those of the experts' weights last,
while the tokens' travel. Experts are one op, whose gradient is two others, so that what the forward keeps of all rows
can be cut anew: rows, and their pre-activations by the place of their pair.

With a hierarchy of nodes a chunk passes two links, each of which carries another chunk meanwhile. Who sends on waits
for the first link, and holds up what is queued behind. So a chunk is sent on before its experts are due: one chunk
ahead, or all of them where the short link comes first; and on its way back behind the experts of the next one.

``torch.ops.moeops.ep_region`` is composite. Dynamo's graph shows it with both degrees, where a pass may set them;
graphs below autograd show torch's collectives and moeops' ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy
from moeops.comm.wires import InFlight, TwoHops
from moeops.dispatch.degrees import Degrees
from moeops.dispatch.forms import unpack_choices
from moeops.dispatch.legs import Choices, Leg, Transport
from moeops.dispatch.transports import TRANSPORTS
from moeops.ops._autocast import cast_for_autocast
from moeops.ops.activations import op_options
from moeops.ops.grouped_linear import is_transposed
from moeops.ops.moe_mlp import backward_data, backward_weights
from moeops.types import Glu, TokenPlan

_library = torch.library.Library("moeops", "FRAGMENT")
_library.define(
    "ep_region(Tensor x, Tensor? topk_weights, Tensor[] tables, SymInt[] sizes, Tensor w_up, Tensor w_down, "
    "Tensor? b_up, Tensor? b_down, str activation, float alpha, float? limit, float offset, bool interleaved, "
    "str transport, str group_name, int group_size, int rank, str inside_name, str across_name, int node_size, "
    "int num_expert, int r_fwd, int r_bwd) -> Tensor"
)


AnyFlight = InFlight | TwoHops


class _Spec(NamedTuple):
    """What a region is made of, beside tensors."""

    transport: str
    sizes: Sequence[int]
    group: RankGroup
    hierarchy: Hierarchy | None
    num_expert: int
    degrees: Degrees
    activation: dict[str, Any]

    def build(self, like: Tensor, tables: Sequence[Tensor]) -> Transport:
        kind = TRANSPORTS[self.transport]
        own = tables[: kind.num_tables]
        return kind(like, own, self.sizes, self.group, self.num_expert, self.hierarchy)


class _Block(NamedTuple):
    """The experts' weights."""

    w_up: Tensor
    w_down: Tensor
    b_up: Tensor | None
    b_down: Tensor | None


class _Work(NamedTuple):
    """What experts are given of a leg, and what they keep.

    Attributes:
        rows: ``[R, D]``.
        weights: ``[R, K]``.
        plan: of these rows.
        pre_activation: a row per row of the plan.
        ids: ``[R, K]``, where they travel with the rows and may have to be cut anew.
    """

    rows: Tensor
    weights: Tensor
    plan: TokenPlan
    pre_activation: Tensor
    ids: Tensor | None

    def tensors(self) -> list[Tensor]:
        every = [self.rows, self.weights, *self.plan, self.pre_activation]
        return every if self.ids is None else [*every, self.ids]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Work:
        rows, weights, *plan, pre_activation = tensors[:6]
        return cls(rows, weights, TokenPlan(*plan), pre_activation, *(tensors[6:] or (None,)))


def _run(
    spec: _Spec,
    x: Tensor,
    topk_weights: Tensor | None,
    block: _Block,
    tables: Sequence[Tensor],
    keep: bool,
) -> tuple[Tensor, list[Leg], list[_Work]]:
    """The forward: what comes out, and what a backward needs."""
    transport = spec.build(x, tables)
    legs = transport.legs(spec.degrees.forward)
    begun = tables[transport.num_tables :]
    packed = transport.packed_choices(topk_weights)
    flights: list[tuple[AnyFlight, AnyFlight | None]] = []
    for number, leg in enumerate(legs):
        flight = leg.resume(x, begun[number]) if begun else leg.send(x)
        flights.append((flight, None if packed is None else leg.send(packed)))
    works, returns = [], []
    for number, (leg, (flight, beside)) in enumerate(zip(legs, flights, strict=True)):
        _send_on([one for one, _ in flights], number, transport)
        rows = flight.finish().to(x.dtype)
        choices = leg.choices() if beside is None else Choices(*unpack_choices(beside.finish()))
        assert choices is not None
        plan = leg.plan(choices)
        y, pre_activation = torch.ops.moeops.moe_mlp(
            rows, *plan, choices.weights, *block, **spec.activation, keep_pre=keep
        )
        returns.append(leg.turn(y))
        _send_back_on(returns[:number])
        ids = choices.ids if beside is not None and not spec.degrees.are_equal else None
        works.append(_Work(rows, choices.weights, plan, pre_activation, ids))
    _send_back_on(returns)
    parts = [leg.combine(flight.finish()) for leg, flight in zip(legs, returns, strict=True)]
    return transport.join(parts), legs, works


def _send_on(flights: Sequence[AnyFlight], number: int, transport: Transport) -> None:
    """Over their second link, before the experts of a chunk: that one and those ahead of it."""
    ahead = len(flights) if transport.ahead is None else number + 1 + transport.ahead
    for flight in flights[:ahead]:
        flight.advance()


def _send_back_on(flights: Sequence[AnyFlight | None]) -> None:
    """Over their second link, once the first has had the time of the next chunk's experts; the last chunk at once."""
    for flight in flights:
        if flight is not None:
            flight.advance()


class _Recut:
    """What the legs of the forward keep, for legs of another degree."""

    def __init__(self, transport: Transport, works: list[_Work]) -> None:
        self.transport = transport
        self.degree = len(works)
        self.rows = _cat([work.rows for work in works])
        self.weights = _cat([work.weights for work in works])
        ids: list[Any] = [work.ids for work in works]
        self.ids = None if ids[0] is None else _cat(ids)
        self.pre_activation = _cat([work.pre_activation for work in works])
        ends, pair_rows = 0, []
        for work in works:
            pair_rows.append(work.plan.pair_to_row.long() + ends)
            ends = ends + work.pre_activation.shape[0]
        self.pair_rows = _cat(pair_rows)  # [R, K], of each pair in what all legs keep

    def work(self, leg: Leg) -> _Work:
        """What a leg's experts would have been given, and have kept."""
        positions = self.transport.positions(self.degree, leg)
        choices = leg.choices()
        if choices is None:
            assert self.ids is not None
            choices = Choices(
                self.ids.index_select(0, positions), self.weights.index_select(0, positions)
            )
        plan = leg.plan(choices)
        pairs = self.pair_rows.index_select(0, positions).flatten()
        # Rows without a pair may point anywhere: nobody reads them.
        rows = pairs.index_select(0, plan.row_to_pair).clamp(max=self.pre_activation.shape[0] - 1)
        return _Work(
            self.rows.index_select(0, positions),
            choices.weights,
            plan,
            self.pre_activation.index_select(0, rows),
            None,
        )


class _Region(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, x, topk_weights, w_up, w_down, b_up, b_down, *tables):
        block = _Block(w_up, w_down, b_up, b_down)
        out, legs, works = _run(spec, x, topk_weights, block, tables, keep=True)
        ctx.spec = spec
        own = tables[: TRANSPORTS[spec.transport].num_tables]
        kept = [tuple(leg.kept) for leg in legs] if spec.degrees.are_equal else []
        groups = [own, tuple(block), *kept, *(work.tensors() for work in works)]
        ctx.lengths = [len(group) for group in groups]
        ctx.num_legs, ctx.num_tables = len(works), len(tables)
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = _Region._gradients(ctx, grad)
        if torch.is_grad_enabled():  # for a second backward pass
            grads = [g if g is None else _Once.apply(g.detach().requires_grad_()) for g in grads]
        return None, *grads, *[None] * ctx.num_tables

    @staticmethod
    @torch.no_grad()
    def _gradients(ctx, grad):
        spec = ctx.spec
        saved = iter(ctx.saved_tensors)
        tables, weights, *rest = ([next(saved) for _ in range(n)] for n in ctx.lengths)
        works = [_Work.of(tensors) for tensors in rest[-ctx.num_legs :]]
        transport, block = spec.build(grad, tables), _Block(*weights)
        if spec.degrees.are_equal:
            legs = transport.legs_again(rest[: ctx.num_legs])
        else:
            legs = transport.legs(spec.degrees.backward)
        flights = [leg.send(grad) for leg in legs]
        recut = None if spec.degrees.are_equal else _Recut(transport, works)
        needs = ctx.needs_input_grad[1:7]
        returns: list[tuple[AnyFlight | None, ...]] = []
        waiting: list[tuple[Tensor, _Work, list[Tensor]]] = []
        for number, (leg, flight) in enumerate(zip(legs, flights, strict=True)):
            _send_on(flights, number, transport)
            work = works[number] if recut is None else recut.work(leg)
            grad_y = flight.finish()
            inputs = (work.rows, *work.plan, work.weights, *block)
            grads = backward_data(grad_y, inputs, work.pre_activation, spec.activation, needs)
            returns.append(
                tuple(
                    leg.turn(grad) if need else None
                    for grad, need in zip(grads[:2], needs[:2], strict=True)
                )
            )
            waiting.append((grad_y, work, grads.kept))
            _send_back_on([flight for pair in returns[:number] for flight in pair])
        # What goes back travels meanwhile, over the long link.
        if transport.ahead is not None:
            _send_back_on(returns[-1])
        transposed = [is_transposed(weight) for weight in block[:2]]
        sums = _weight_gradients(waiting, needs[2:], transposed)
        _send_back_on(returns[-1])
        grad_x, grad_topk_weights = (
            _land(transport, legs, [pair[i] for pair in returns]) for i in range(2)
        )
        return [grad_x, grad_topk_weights, *sums]


class _Once(torch.autograd.Function):
    """A gradient as it is, which has none itself."""

    @staticmethod
    def forward(ctx, grad):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "ep_region: a gradient must be differentiated once only, got a second backward pass through it. Build the "
            "experts from modules, and pass n_chunks=1."
        )


def _weight_gradients(
    waiting: list[tuple[Tensor, _Work, list[Tensor]]],
    needs: Sequence[bool],
    transposed: Sequence[bool],
) -> list[Tensor | None]:
    """Sums over all legs of the gradients of the experts' weights, in the order of ``_Block``."""
    sums: list[Tensor | None] = [None] * 4
    for grad_y, work, kept in waiting:
        parts = backward_weights(
            grad_y, work.rows, work.plan, work.weights, kept, needs, transposed
        )
        sums = [
            part if so_far is None or part is None else so_far + part
            for so_far, part in zip(sums, parts, strict=True)
        ]
    return sums


def _land(
    transport: Transport, legs: list[Leg], flights: Sequence[AnyFlight | None]
) -> Tensor | None:
    """What came back for all rows of this rank, if it was sent."""
    parts = [
        leg.combine(flight.finish())
        for leg, flight in zip(legs, flights, strict=True)
        if flight is not None
    ]
    return transport.join(parts) if parts else None


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ep_region(
    x,
    topk_weights,
    tables,
    sizes,
    w_up,
    w_down,
    b_up,
    b_down,
    activation,
    alpha,
    limit,
    offset,
    interleaved,
    transport,
    group_name,
    group_size,
    rank,
    inside_name,
    across_name,
    node_size,
    num_expert,
    r_fwd,
    r_bwd,
):
    # The rank is an argument, so that no rank takes another one's code from a cache.
    group = RankGroup(group_name, group_size, rank)
    hierarchy = None
    if node_size:
        node, place = divmod(rank, node_size)
        inside = RankGroup(inside_name, node_size, place)
        hierarchy = Hierarchy(group, inside, RankGroup(across_name, group_size // node_size, node))
    degrees = Degrees(r_fwd, r_bwd)
    options = {
        "activation": activation,
        "alpha": alpha,
        "limit": limit,
        "offset": offset,
        "interleaved": interleaved,
    }
    spec = _Spec(transport, sizes, group, hierarchy, num_expert, degrees, options)
    block = _Block(w_up, w_down, b_up, b_down)
    wanted = (x, topk_weights, *block)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted):
        return _Region.apply(spec, *wanted, *tables)
    return _run(spec, x, topk_weights, block, tables, keep=False)[0]


_library.impl("ep_region", _ep_region, "CompositeImplicitAutograd")


def can_be_a_region(hierarchy: Hierarchy | None) -> bool:
    """The form "leader", whose ranks do not all have a link between nodes, passes no region."""
    return hierarchy is None or hierarchy.is_flat or hierarchy.form == "2d"


def nodes_of_region(hierarchy: Hierarchy | None) -> Hierarchy | None:
    """The arrangement, if there are two links."""
    return None if hierarchy is None or hierarchy.is_flat else hierarchy


@dataclass(eq=False)  # not frozen, see ``RegionBlock``
class Region:
    """A region on its way to the experts, which a dispatcher hands to them in the place of a plan.

    No tuple, so that what casts the tensors among a module's arguments, as FSDP does, does not see those in here.

    Attributes:
        transport: a name of ``TRANSPORTS``.
        tables: as the transport wants them; then, if they are under way, the chunks of the forward.
        sizes: as the transport wants them.
        group: the ranks, more than one.
        num_expert: ``E_local``.
        degrees: chunks in each direction.
        hierarchy: how the ranks are arranged as nodes, in the form "2d"; ``None`` for the flat exchange.
    """

    transport: str
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    group: RankGroup
    num_expert: int
    degrees: Degrees
    hierarchy: Hierarchy | None = None

    def run(
        self,
        x: Tensor,
        topk_weights: Tensor | None,
        w_up: Tensor,
        w_down: Tensor,
        *,
        b_up: Tensor | None,
        b_down: Tensor | None,
        activation: str | Glu,
    ) -> Tensor:
        """Dispatch rows of this rank, run the experts of all ranks on them, combine.

        Args:
            x: tokens ``[T, D]``, or buffers ``[E, C, D]``.
            topk_weights: ``[T, K]``; ``None`` for buffers.
            w_up: this rank's experts, as for ``moe_mlp``.
            w_down: the same.
            b_up: the same.
            b_down: the same.
            activation: the same.

        Returns:
            Sums ``[T, D_out]``, or buffers ``[E, C, D_out]``.

        Gradients: ``x``, ``topk_weights``, weights and biases, once.  Host sync: none.
        """
        x, w_up, w_down, b_up, b_down = cast_for_autocast(x, w_up, w_down, b_up, b_down)
        if topk_weights is not None:
            topk_weights = topk_weights.to(_checks.accumulate_dtype(x.dtype))
        nodes = ("", "", 0)
        if self.hierarchy is not None:
            inside, across = self.hierarchy.inside, self.hierarchy.across
            nodes = (inside.name, across.name, inside.size)
        run: Any = torch.ops.moeops.ep_region if torch.compiler.is_compiling() else _ep_region
        return run(
            x,
            topk_weights,
            list(self.tables),
            list(self.sizes),
            w_up,
            w_down,
            b_up,
            b_down,
            *op_options(activation).values(),
            self.transport,
            *self.group,
            *nodes,
            self.num_expert,
            *self.degrees,
        )
