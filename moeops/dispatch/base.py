"""What all dispatchers share. T tokens, K experts per token, R rows, E experts, E_local on a rank, W ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeops import _checks, _nests
from moeops.comm.exchange import Splits
from moeops.comm.groups import RankGroup
from moeops.comm.hierarchical import Hierarchy, start_exchange
from moeops.cost.schedule import LayerSizes, MlpSizes, Schedule
from moeops.dispatch.degrees import AutoChunks, Degrees, NumChunks, as_auto, as_degrees
from moeops.dispatch.hooks import StageHooks
from moeops.ops.permute import permute_tokens, unpermute_tokens
from moeops.types import Routing, SlotRouting, TokenPlan

# experts(rows, expert_offsets, rows_per_expert): the last are the offsets' differences where the host knows them.
Experts = Callable[[Any, Tensor, list[int] | None], Any]
Block = Callable[[Any, Tensor, TokenPlan], Any]
Beside = Callable[[], None]


@dataclasses.dataclass(
    eq=False
)  # not frozen: torch 2.11's Dynamo cannot make such a record within a graph
class RegionBlock:
    """A block that also takes a ``Region`` in the place of a plan, and then runs the experts of all ranks."""

    run: Callable[[Any, Any, Any], Any]

    def __call__(self, x: Any, topk_weights: Any, plan: Any) -> Any:
        """Run tokens through their experts."""
        return self.run(x, topk_weights, plan)


class Dispatcher:
    """Base of all dispatchers: how tokens get to the experts that a gate chose, and their outputs back.

    A dispatcher knows nothing of gates and experts. It reads a ``Routing`` (never with ``scale_inputs``: a layer has
    applied that before) or a ``SlotRouting``, and hands rows in expert order to the experts on this rank. Inputs and
    outputs are nests of tensors, tokens or rows in dimension 0 of every leaf.

    A layer calls ``run``, and a subclass writes it; one without rows for slots raises NotImplementedError for a
    ``SlotRouting``. Where all rows are there before the experts run and no schedule is needed, there is a shorter way:
    write ``dispatch`` and ``combine``, from which the base makes ``run``.

    Attributes:
        takes_scaled_inputs: ``run`` reads a ``Routing`` with ``scale_inputs``, too.
        takes_stage_hooks: ``run`` calls those of ``stage_hooks`` that are for rows.
        adds_on_the_way: ranks' rows, or their gradients, are added up by what carries them.
        stage_hooks: what the layer was given.
        degrees: chunks of each direction.
        built_from: the record, as ``kept``, and the ranks, where a layer has built it.
        schedule: what a cost model said, where one has chosen the degrees.
    """

    takes_scaled_inputs = False
    takes_stage_hooks = False
    adds_on_the_way = False
    stage_hooks = StageHooks()
    degrees = Degrees()
    built_from: tuple[DispatchOptions, ExpertRanks] | None = None
    schedule: Schedule | None = None

    def start(self, inp: Any, weights: Callable[[], Any], table: Tensor | None) -> dict[str, Any]:
        """Begin what can begin before the gate; return what ``run`` needs beside its other arguments.

        Args:
            inp: nest of ``[T, ...]``.
            weights: returns this rank's experts as tensors that can travel, an ``ExpertWeights``.
            table: what ``table`` returned, on the device.
        """
        return {}

    def set_stage_hooks(self, hooks: StageHooks) -> None:
        """Call these from now on.

        Raises:
            NotImplementedError: there are hooks on rows, and this dispatcher does not call them.
        """
        if hooks.on_rows and not self.takes_stage_hooks:
            raise NotImplementedError(
                f"{type(self).__name__}: {hooks.on_rows[0]} must be None where not all rows pass one way, got a hook. "
                "Use Exact, Static or Gather without replicas and shadowing, or before_moe_start and before_moe_end."
            )
        if self.adds_on_the_way and any(
            getattr(getattr(hooks, name), "makes_bits", False) for name in hooks.on_rows
        ):
            raise NotImplementedError(
                f"{type(self).__name__}: hooks must not encode rows as bits where rows or their gradients are added "
                "up on their way, got some that do. Use Exact or Static with codec_hooks."
            )
        self.stage_hooks = hooks

    def set_degrees(self, degrees: Degrees) -> None:
        """Work in so many chunks from now on, on all ranks alike."""
        if not degrees.are_one:
            raise NotImplementedError(
                f"{type(self).__name__}: n_chunks must be 1, got {degrees}. Use Exact, Static or Gather."
            )

    def table(self) -> Tensor | None:
        """Numbers on the host that the dispatcher wants on the device in every forward: a layer keeps them there."""
        return None

    def run(
        self,
        routing: Routing | SlotRouting,
        inp: Any,
        experts: Experts,
        block: Block | None = None,
        *,
        beside: Beside | None = None,
    ) -> Any:
        """Bring tokens to their experts, run the experts on this rank, and bring the outputs back.

        Args:
            routing: what the gate decided.
            inp: nest of ``[T, ...]``.
            experts: called with the rows, ``expert_offsets`` and, if the host knows them, the rows per expert;
                returns a nest of ``[R, ...]``.
            block: the same experts as one call ``block(x, topk_weights, plan)`` that moves the tokens itself, for
                dispatchers that leave them on this rank.
            beside: work that waits for nothing, called once, when tokens are on their way and before anyone waits for
                them.

        Returns:
            Nest of ``[T, ...]``, weighted and summed over each token's experts.
        """
        rows, expert_offsets, record = self.dispatch(routing, inp)
        if beside is not None:
            beside()
        return self.combine(experts(rows, expert_offsets, None), record)

    def dispatch(self, routing: Routing | SlotRouting, inp: Any) -> tuple[Any, Tensor, Any]:
        """Bring tokens to experts; with ``combine``, the short way to ``run``.

        Args:
            routing: what the gate decided.
            inp: nest of ``[T, ...]``.

        Returns:
            Nest of rows ``[R, ...]`` in expert order; expert_offsets ``[E_local + 1]`` int32, rows past the last
            offset are padding; and the record of tensors that ``combine`` needs.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: run must be written by the subclass, got none. Write it, or dispatch and combine."
        )

    def combine(self, out: Any, record: Any) -> Any:
        """Bring the experts' outputs, a nest of ``[R, ...]``, back: nest of ``[T, ...]``, weighted and summed."""
        raise NotImplementedError(
            f"{type(self).__name__}: run must be written by the subclass, got none. Write it, or dispatch and combine."
        )


class WrappingDispatcher(Dispatcher):
    """Base of dispatchers that change what is sent where, and leave the sending, hooks and chunks to another one.

    Args:
        inner: that other one.
    """

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner
        self.takes_scaled_inputs = inner.takes_scaled_inputs

    @property
    def degrees(self) -> Degrees:  # type: ignore[override]  # read only: set_degrees sets it
        """Those of ``inner``."""
        return self.inner.degrees

    def set_stage_hooks(self, hooks: StageHooks) -> None:
        """Call these where ``inner`` does."""
        self.inner.set_stage_hooks(hooks)

    def set_degrees(self, degrees: Degrees) -> None:
        """Have ``inner`` work in so many chunks."""
        self.inner.set_degrees(degrees)


class ExpertRanks(NamedTuple):
    """The ranks that hold a layer's experts, as a dispatcher is built for them.

    Attributes:
        op: the layer's name, for error messages.
        num_expert: ``E_local``.
        group: the ranks; ``None`` for one.
        num_shards: ``P``, neighbouring ranks that hold one expert together; a divisor of the group's size.
        top_k: ``K``, 0 where the gate has none.
    """

    op: str
    num_expert: int
    group: RankGroup | None = None
    num_shards: int = 1
    top_k: int = 0


@dataclasses.dataclass(frozen=True)
class DispatchOptions:
    """Base of the records that a layer takes as ``dispatch=``: every option of a dispatcher is a field of its record.

    A record is made anywhere, and its values are read in the layer: there an error on one rank is an error on all.
    A new record is a frozen dataclass in the file of its dispatcher, and an entry of ``DISPATCHES`` in
    ``moeops.dispatch.options``.

    Attributes:
        mlps: sizes of experts that are MLPs, which the layer fills in.
    """

    mlps: MlpSizes | None = dataclasses.field(default=None, kw_only=True, repr=False, compare=False)

    def check(self, ranks: ExpertRanks) -> None:
        """Raise where an option is wrong, or does not fit the layer's ranks; ``ranks.op`` begins the message."""

    def choose(self, ranks: ExpertRanks) -> tuple[DispatchOptions, str]:
        """Return the record to build, and in words why it is another one; for checked options."""
        return self, ""

    def build(self, ranks: ExpertRanks) -> Dispatcher:
        """Make the dispatcher, for checked options. With shards, each counts as an expert of its rank here."""
        raise NotImplementedError(
            f"{type(self).__name__}: build must be written by the subclass, got none. Write it."
        )

    def connect(self, ranks: ExpertRanks) -> None:
        """Do what ranks do together before a dispatcher can work; all of them call it, behind ``build``."""

    def settings(self, ranks: ExpertRanks) -> dict[str, Any]:
        """Say what must be equal on all ranks, by option: values that can be pickled and compared."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        return {"dispatch": type(self).__name__, **values}

    def for_mlps(
        self, d_model: int, d_hidden: int, num_projections: int, dtype: torch.dtype
    ) -> DispatchOptions:
        """Fill in what depends on the size of experts that are MLPs; ``d_hidden`` is that of a whole expert."""
        name = str(dtype).removeprefix("torch.")
        return dataclasses.replace(self, mlps=MlpSizes(d_model, d_hidden, num_projections, name))

    def kept(self) -> DispatchOptions:
        """The record as a dispatcher keeps it: nothing that could not be pickled with a layer."""
        return self

    def auto_chunks(self, op: str) -> AutoChunks | None:
        """What chooses ``n_chunks``, where a cost model does."""
        return None

    def layer_sizes(self, ranks: ExpertRanks, num_tokens: int | None) -> LayerSizes | None:
        """Sizes of the layer for a cost model; ``None`` where it has no stages that a model knows.

        Raises:
            ValueError: they depend on the number of tokens, and that is ``None``.
        """
        return None


class Flight:
    """A nest of rows on its way to other ranks: construction sends it, ``finish`` waits for what they sent.

    Args:
        rows: nest of ``[R, ...]``.
        splits: rows to and from each rank on the way there.
        group: the ranks; with one, nothing is sent.
        hierarchy: how they are arranged as nodes; ``None`` for the flat exchange.
        beside: one tensor ``[R, ...]`` more that travels, between ranks.
        back: take rows back to where an exchange with these splits brought them from.
        hooks: to call on the rows before they leave and when they are there; not on what is beside them.
    """

    def __init__(
        self,
        rows: Any,
        splits: Splits,
        group: RankGroup,
        hierarchy: Hierarchy | None,
        *,
        beside: Tensor | None = None,
        back: bool = False,
        hooks: StageHooks,
    ) -> None:
        self._hooks = hooks
        self._arrival = "after_combine" if back else "after_dispatch"
        rows = hooks.call("before_combine" if back else "before_dispatch", rows)
        leaves, self._spec = _nests.flatten(rows)
        self._has_beside = beside is not None
        if beside is not None:
            leaves = [*leaves, beside]
        self._way = (splits, group, hierarchy)
        self._rows = rows if group.size == 1 else None
        self._exchanges = [
            start_exchange(leaf, splits, group, hierarchy, back=back)
            for leaf in leaves
            if group.size > 1
        ]

    def turn(self, rows: Any) -> Flight:
        """Begin to send answers to rows that arrived back to where these came from."""
        return Flight(rows, *self._way, back=True, hooks=self._hooks)

    def finish(self) -> Any:
        """Return the rows that arrived, a nest of ``[sum of the splits, ...]``; with ``beside`` both of them."""
        if self._rows is not None:
            return self._hooks.call(self._arrival, self._rows)
        received = [exchange.finish() for exchange in self._exchanges]
        if self._has_beside:
            return self._arrived(received[:-1]), received[-1]
        return self._arrived(received)

    def _arrived(self, leaves: list[Tensor]) -> Any:
        return self._hooks.call(self._arrival, _nests.unflatten(leaves, self._spec))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkedOptions(DispatchOptions):
    """Base of the records of dispatchers that work in chunks.

    Attributes:
        n_chunks: parts of the work: all are sent before the first expert runs, and each goes back while the next is
            computed. A pair ``(forward, backward)`` gives the backward parts of its own, for experts that are one call.
            "auto" lets a cost model choose, ``AutoChunks`` says which, for ``FMoETransformerMLP``.
    """

    n_chunks: NumChunks = 1

    def degrees(self, op: str) -> Degrees:
        """Chunks in each direction; one where a cost model is yet to choose."""
        return Degrees() if self.auto_chunks(op) is not None else as_degrees(op, self.n_chunks)

    def auto_chunks(self, op: str) -> AutoChunks | None:
        """What chooses ``n_chunks``, where a cost model does."""
        return as_auto(op, self.n_chunks)

    def check(self, ranks: ExpertRanks) -> None:
        """Raise where ``n_chunks`` is wrong, or nothing is known by which to choose."""
        self.degrees(ranks.op)
        auto = self.auto_chunks(ranks.op)
        if auto is None:
            return
        auto.check(ranks.op)
        if self.mlps is None:
            raise NotImplementedError(
                f"{ranks.op}: n_chunks must be a number for experts that are modules, whose cost no model knows, got "
                f"{self.n_chunks!r}. Pass a number, or use FMoETransformerMLP."
            )
        self.layer_sizes(ranks, auto.num_tokens)

    def settings(self, ranks: ExpertRanks) -> dict[str, Any]:
        """The fields; of a cost model nothing, because rank 0's decides."""
        auto = self.auto_chunks(ranks.op)
        n_chunks: Any = self.n_chunks
        if auto is not None:
            measures = auto.cost_model is None
            n_chunks = ("auto", auto.num_tokens, self.mlps, "measured" if measures else "given")
        return {**super().settings(ranks), "n_chunks": n_chunks}

    def _sizes(
        self, kind: str, ranks: ExpertRanks, num_tokens: int | None, capacity: int = 0
    ) -> LayerSizes | None:
        """The layer as a cost model knows it."""
        if self.mlps is None or ranks.group is None or ranks.group.size == 1:
            return None
        if num_tokens is None:
            raise ValueError(
                f"{ranks.op}: num_tokens must be given for a cost model, got None. Pass the tokens of a rank, as in "
                "n_chunks=AutoChunks(cost_model=..., num_tokens=8192)."
            )
        mlps = self.mlps._replace(d_hidden=self.mlps.d_hidden // ranks.num_shards)
        top_k = ranks.top_k * ranks.num_shards
        return LayerSizes(
            kind,
            mlps,
            num_tokens,
            top_k,
            ranks.group.size,
            ranks.num_expert,
            capacity,
            self.node_size(),
        )

    def node_size(self) -> int:
        """Ranks of a node where rows go to nodes and on inside of them; 0 for the flat exchange."""
        return 0


def chunk_bounds(total: int, n_chunks: int) -> list[tuple[int, int]]:
    """Start and length of ``n_chunks`` parts; lengths differ by one at most."""
    starts = [total * index // n_chunks for index in range(n_chunks + 1)]
    return [(starts[index], starts[index + 1] - starts[index]) for index in range(n_chunks)]


def split_rows(leaf: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Cut rows ``[R, ...]`` among their experts, who may do with them what they like, such as write into them.

    Nothing is copied, but autograd takes the parts for tensors of their own: it would refuse to write into one of
    several views that ``Tensor.split`` returned. That is sound where the rows themselves have no other reader, which
    holds for rows made for experts: every dispatcher makes them anew, and no op saves its output.
    """
    return torch.unsafe_split_with_sizes(leaf, lengths)


def permute_leaf(leaf: Tensor, plan: TokenPlan) -> Tensor:
    """Copy a leaf ``[T, ...]`` into expert order ``[R, ...]``."""
    if leaf.dtype in _checks.FLOAT_DTYPES:
        return permute_tokens(as_rows(leaf), plan).reshape(-1, *leaf.shape[1:])
    # Ids, positions, flags: nothing to differentiate, and no kernel needed.
    return leaf.index_select(0, plan.row_to_pair // plan.pair_to_row.shape[1])


def combine_leaf(leaf: Tensor, plan: TokenPlan, topk_weights: Tensor | None) -> Tensor:
    """Sum an output leaf ``[R, ...]`` over each token's pairs: ``[T, ...]``."""
    y = unpermute_tokens(as_rows(leaf), plan, topk_weights)
    return y.reshape(y.shape[0], *leaf.shape[1:])


def as_rows(leaf: Tensor) -> Tensor:
    """``[T, ...]`` as ``[T, row]``."""
    return leaf if leaf.dim() == 2 else leaf.reshape(leaf.shape[0], row_size(leaf.shape[1:]))


def row_size(shape: Sequence[int]) -> int:
    """Elements of a row of this shape, spelt out: ``reshape(T, -1)`` is undefined for T = 0, sizes may be symbolic."""
    size = 1
    for length in shape:
        size *= length
    return size
