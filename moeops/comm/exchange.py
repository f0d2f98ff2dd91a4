"""Rows and counts between the ranks of a group. W ranks, R rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moeops import _checks
from moeops.comm.groups import ALONE, RankGroup, describe_group, process_group, rank_group
from moeops.comm.wires import (
    Carried,
    Wire,
    carry,
    differentiated,
    guarded,
    pack_rows,
    takes_blocking,
    unobserved,
    unpack_rows,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_library = torch.library.Library("moeops", "FRAGMENT")
_library.define(
    "all_to_all_rows(Tensor rows, SymInt[] input_splits, SymInt[] output_splits, str group_name) -> Tensor"
)


def _all_to_all_rows(rows, input_splits, output_splits, group_name):
    if len(input_splits) == 1:
        return rows.clone(memory_format=torch.contiguous_format)
    if unobserved(rows):
        group = rank_group(process_group(group_name))
        assert group is not None
        return carry(rows, AllToAll(input_splits, output_splits, group))
    return _functional(rows, input_splits, output_splits, group_name)


def _functional(rows, input_splits, output_splits, group_name):
    sent = _send(pack_rows(rows), input_splits, output_splits, group_name)
    return unpack_rows(torch.ops._c10d_functional.wait_tensor(sent), rows.dtype)


# Composite: a graph holds this op where Dynamo captured it, and below autograd the functional collectives that
# Inductor knows, whose fakes and gradients are torch's. An opaque op would hide them.
_library.impl("all_to_all_rows", _all_to_all_rows, "CompositeImplicitAutograd")


def _send(packed, input_splits, output_splits, group_name):
    """Begin an exchange: the rows to be received, which nobody may read before ``wait_tensor``."""
    return torch.ops._c10d_functional.all_to_all_single(
        packed.contiguous(), output_splits, input_splits, group_name
    )


_library.define(
    "start_all_to_all_rows(Tensor packed, SymInt[] input_splits, SymInt[] output_splits, str group_name) -> "
    "(Tensor sent, Tensor token)"
)
_library.define(
    "finish_all_to_all_rows(Tensor sent, Tensor token, SymInt[] input_splits, SymInt[] output_splits, "
    "str group_name) -> Tensor"
)


class _TracedStart(torch.autograd.Function):
    """Begin an exchange in a graph; in the backward, wait for gradients that ``_TracedFinish`` began to send back.

    Torch's own gradient of the collective sends and waits at once. Autograd accepts gradients in the shape of the value
    only, and those in flight have the shape of what was sent: they are the gradient of a second output, a token of that
    shape without memory, and the first output, of the other shape, has the token of their exchange for a gradient.
    """

    @staticmethod
    def forward(ctx, packed, input_splits, output_splits, group_name):
        ctx.way_back = (output_splits, input_splits, group_name)
        return _send(packed, input_splits, output_splits, group_name), _token(packed)

    @staticmethod
    def backward(ctx, token, sent):
        return _finish_traced(sent, token, *ctx.way_back), None, None, None


class _TracedFinish(torch.autograd.Function):
    """Wait for what ``_TracedStart`` began; in the backward, begin to send the gradients back."""

    @staticmethod
    def forward(ctx, sent, token, input_splits, output_splits, group_name):
        ctx.way_back = (output_splits, input_splits, group_name)
        return torch.ops._c10d_functional.wait_tensor(sent)

    @staticmethod
    def backward(ctx, grad):
        sent, token = _start_traced(grad, *ctx.way_back)
        return token, sent, None, None, None


def _token(packed):
    return packed.new_zeros(()).expand(packed.shape)


def _start_traced(packed, input_splits, output_splits, group_name):
    if packed.requires_grad and torch.is_grad_enabled():
        return _TracedStart.apply(packed, input_splits, output_splits, group_name)
    return _send(packed, input_splits, output_splits, group_name), _token(packed)


def _finish_traced(sent, token, input_splits, output_splits, group_name):
    if sent.requires_grad and torch.is_grad_enabled():
        return _TracedFinish.apply(sent, token, input_splits, output_splits, group_name)
    return torch.ops._c10d_functional.wait_tensor(sent)


# Composite for the same reason; AOTAutograd runs the functions above, and so knows an order of the backward in which
# the gradients of all chunks are in flight.
_library.impl("start_all_to_all_rows", _start_traced, "CompositeImplicitAutograd")
_library.impl("finish_all_to_all_rows", _finish_traced, "CompositeImplicitAutograd")


class Splits(NamedTuple):
    """Sizes of an exchange's blocks on one rank, in rows.

    Attributes:
        input_splits, output_splits: ``W`` each, as for ``all_to_all_rows``.
        middle_splits: of blocks that pass through this rank in an exchange by stages, see ``hierarchical_counts``.
        equal: all blocks of all ranks have the same size.
    """

    input_splits: Sequence[int]
    output_splits: Sequence[int]
    middle_splits: Sequence[int]
    equal: bool = False


class AllToAll(Wire):
    """Every rank sends every other its part of the rows."""

    def __init__(
        self,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        group: RankGroup,
        op: str = "all_to_all_rows",
    ) -> None:
        super().__init__(op, group)
        self.input_splits = list(input_splits)
        self.output_splits = list(output_splits)

    def send(self, packed: Tensor) -> Tensor:
        """Begin the exchange."""
        return _send(packed, self.input_splits, self.output_splits, self.group.name)

    def run(self, packed: Tensor) -> Tensor:
        """Exchange at once."""
        received = packed.new_empty((sum(self.output_splits), *packed.shape[1:]))
        torch.distributed.all_to_all_single(
            received,
            packed.contiguous(),
            self.output_splits,
            self.input_splits,
            process_group(self.group.name),
        )
        return received

    def send_traced(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Begin the exchange, with gradients that are in flight as the rows are."""
        return torch.ops.moeops.start_all_to_all_rows(
            packed, self.input_splits, self.output_splits, self.group.name
        )

    def wait_traced(self, sent: tuple[Tensor, ...]) -> Tensor:
        """Wait for it."""
        return torch.ops.moeops.finish_all_to_all_rows(
            *sent, self.input_splits, self.output_splits, self.group.name
        )

    def turn(self) -> Wire:
        """The way back."""
        return AllToAll(self.output_splits, self.input_splits, self.group)


class Exchange(Carried):
    """Rows on their way to other ranks: construction sends them, ``finish`` waits for the others'.

    Args:
        rows, input_splits, output_splits: as for ``all_to_all_rows``, not checked.
        group: the ranks, more than one.
    """

    def __init__(
        self,
        rows: Tensor,
        input_splits: Sequence[int],
        output_splits: Sequence[int],
        group: RankGroup,
    ) -> None:
        wire = AllToAll(input_splits, output_splits, group)
        if _checks.debug_checks() and not torch.compiler.is_compiling():
            _check_agreement(rows, wire)
        super().__init__(rows, wire)


def all_to_all_rows(
    rows: Tensor,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
    group: ProcessGroup | RankGroup | None,
) -> Tensor:
    """Send each rank of a group its part of the rows, and receive its parts of theirs.

    The first ``input_splits[0]`` rows go to the group's rank 0, the next ``input_splits[1]`` to rank 1, and so on; the
    result holds first what rank 0 sent, then what rank 1 sent, and so on. What rank ``i`` sends to ``j`` must be what
    ``j`` expects from ``i``: a backend may end the process where it is not. ``MOEOPS_DEBUG_CHECKS=1`` in the
    environment compares sizes and types first, outside of compiled code, for one more collective and a host copy.

    Args:
        rows: ``[R, ...]``, any dtype; the same dtype and row shape on every rank.
        input_splits: ``W`` numbers of rows to send, 0 included; their sum is ``R``. May be symbolic.
        output_splits: ``W`` numbers of rows to receive.
        group: the ranks, ``rank_group`` of them, or ``None`` for this rank alone.

    Returns:
        ``[sum(output_splits), ...]``, dtype of ``rows``.

    Raises:
        ValueError: the splits do not fit the group or the rows, or, with the debug checks, those of another rank.
        TypeError: ``rows`` is not a tensor.  RuntimeError: a rank did not take part within the group's time-out.
    Gradients: ``rows``, if its type is float or complex.  Host sync: none.  Deterministic: yes.

    Example:
        >>> all_to_all_rows(torch.tensor([[1.0], [2.0]]), [2], [2], None).tolist()
        [[1.0], [2.0]]
    """
    group = rank_group(group) or ALONE
    if not torch.compiler.is_compiling():
        check_splits("all_to_all_rows", rows, input_splits, output_splits, group)
        if group.size > 1:
            wire = AllToAll(input_splits, output_splits, group)
            if _checks.debug_checks():
                _check_agreement(rows, wire)
            return carry(rows, wire)
    return torch.ops.moeops.all_to_all_rows(
        rows, list(input_splits), list(output_splits), group.name
    )


def exchange_counts(counts: Tensor, group: ProcessGroup | RankGroup | None) -> Tensor:
    """Send each rank of a group its entry, and receive its entries of theirs.

    Args:
        counts: ``[W, ...]``, entry ``r`` for the group's rank ``r``; same shape and dtype on every rank.
        group: the ranks, ``rank_group`` of them, or ``None`` for this rank alone.

    Returns:
        ``[W, ...]``, entry ``r`` from rank ``r``; dtype of ``counts``.

    Raises:
        ValueError: there is not one entry per rank.  TypeError: ``counts`` is not a tensor.  RuntimeError: a rank did
        not take part within the group's time-out.
    Gradients: none, the result is detached.  Host sync: none.  Deterministic: yes.

    Example:
        >>> exchange_counts(torch.tensor([[3, 1]]), None).tolist()
        [[3, 1]]
    """
    group = rank_group(group) or ALONE
    op = "exchange_counts"
    ones = [1] * group.size
    if not torch.compiler.is_compiling():
        check_splits(op, counts, ones, ones, group)
    return exchange_detached(op, counts, ones, ones, group)


def exchange_detached(
    op: str,
    rows: Tensor,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
    group: RankGroup,
) -> Tensor:
    """Do what ``all_to_all_rows`` does without gradients and checks; errors name ``op``."""
    rows, sends, receives = rows.detach(), list(input_splits), list(output_splits)
    if torch.compiler.is_compiling():
        return torch.ops.moeops.all_to_all_rows(rows, sends, receives, group.name)
    if group.size == 1:
        return rows.clone(memory_format=torch.contiguous_format)
    if takes_blocking(rows) and not differentiated(rows):
        wire = AllToAll(sends, receives, group, op)
        return unpack_rows(wire.run_guarded(pack_rows(rows)), rows.dtype)
    return guarded(op, group, _functional, rows, sends, receives, group.name)


def check_splits(op, rows, input_splits, output_splits, group):
    """The splits are one non-negative int per rank, and those to send add up to the rows."""
    _checks.check_tensor(op, "rows", rows, None)
    if rows.dim() == 0:
        raise ValueError(
            f"{op}: rows must have at least 1 dimension, got {_checks.describe(rows)}. Reshape it first."
        )
    for name, splits in (("input_splits", input_splits), ("output_splits", output_splits)):
        if len(splits) != group.size:
            raise ValueError(
                f"{op}: {name} must have {group.size} entries, one per rank of {describe_group(group)}, got "
                f"{len(splits)}. Pass rows per rank."
            )
        for count in splits:
            if type(count) is not int or count < 0:  # quick for what is right
                _checks.check_int(op, name, count, 0, "Pass rows per rank.")
    if sum(input_splits) != rows.shape[0]:
        raise ValueError(
            f"{op}: input_splits must add up to the {rows.shape[0]} rows, got {sum(input_splits)} on rank "
            f"{group.rank} of {group.size}. Pass rows per rank."
        )


def _check_agreement(rows, wire):
    """Every rank sends what the others expect: every rank sees all sizes, so all of them fail or none."""
    op, group = "all_to_all_rows", wire.group
    row = rows.shape[1:].numel()
    dtypes = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
    mine = torch.tensor([*wire.input_splits, *wire.output_splits, row, dtypes.index(rows.dtype)])
    ops = torch.ops._c10d_functional
    sizes = guarded(
        op,
        group,
        lambda: ops.wait_tensor(
            ops.all_gather_into_tensor(mine.to(rows.device), group.size, group.name)
        ),
    )
    table = sizes.view(group.size, -1).tolist()
    for rank, (*_, other_row, other_dtype) in enumerate(table):
        if (other_row, other_dtype) != tuple(table[0][-2:]):
            raise ValueError(
                f"{op}: rows must have the same row size and dtype on all {group.size} ranks of group "
                f"{group.name!r}, got {table[0][-2]} x {dtypes[table[0][-1]]} on rank 0 and {other_row} x "
                f"{dtypes[other_dtype]} on rank {rank}. Check the layer's input on these ranks."
            )
    for source in range(group.size):
        for target in range(group.size):
            sent, expected = table[source][target], table[target][group.size + source]
            if sent != expected:
                raise ValueError(
                    f"{op}: output_splits[{source}] on rank {target} must be what rank {source} of {group.size} sends, "
                    f"got {expected} and {sent} in group {group.name!r}. Exchange the counts first."
                )
