"""Rows and counts between the ranks of a group. W ranks, R rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moeops import _checks
from moeops.comm.groups import RankGroup, describe_group, process_group, rank_group, timeout_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What gloo and NCCL both send; the rest travels as bytes.
_SENT_AS_IS = (
    *_checks.FLOAT_DTYPES,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)

_library = torch.library.Library("moeops", "FRAGMENT")
_library.define(
    "all_to_all_rows(Tensor rows, SymInt[] input_splits, SymInt[] output_splits, str group_name) -> Tensor"
)


def _all_to_all_rows(rows, input_splits, output_splits, group_name):
    if len(input_splits) == 1:
        return rows.clone(memory_format=torch.contiguous_format)
    if _unobserved(rows):
        group = rank_group(process_group(group_name))
        assert group is not None
        return _exchange_rows(rows, _Wire(input_splits, output_splits, group))
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


def pack_rows(rows: Tensor) -> Tensor:
    """View types that not every backend sends as types that it does."""
    if rows.dtype in _SENT_AS_IS:
        return rows
    if rows.is_complex():
        return torch.view_as_real(rows.resolve_conj())
    return rows.contiguous().unsqueeze(-1).view(torch.uint8)


def unpack_rows(received: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo ``pack_rows``."""
    if dtype in _SENT_AS_IS:
        return received
    if dtype.is_complex:
        return torch.view_as_complex(received)
    return received.view(dtype).squeeze(-1)


class _Wire:
    """One exchange: its splits, its group, and in a backward the gradients on their way back."""

    def __init__(self, input_splits: list[int], output_splits: list[int], group: RankGroup) -> None:
        self.input_splits = input_splits
        self.output_splits = output_splits
        self.group = group
        self.grad: Tensor | None = None
        self._back: _Wire | None = None

    def back(self) -> _Wire:
        """Return the wire of the gradients, always the same one."""
        if self._back is None:
            self._back = _Wire(self.output_splits, self.input_splits, self.group)
        return self._back


class _Start(torch.autograd.Function):
    """Begin to send rows; in the backward, wait for the gradients that ``_Finish`` began to send back.

    Autograd runs last what was recorded first, so the exchanges of several chunks are all in flight in the backward
    before the first expert runs, as in the forward.
    """

    @staticmethod
    def forward(ctx, packed, wire):
        ctx.wire = wire
        return _begin(packed, wire)

    @staticmethod
    def backward(ctx, _grad):
        # Autograd accepts gradients in the shape of the value only, so those in flight travel in the wire.
        grad, ctx.wire.grad = ctx.wire.grad, None
        return _Finish.apply(grad, ctx.wire.back()), None


class _Finish(torch.autograd.Function):
    """Wait for what ``_Start`` began; in the backward, begin to send the gradients back."""

    @staticmethod
    def forward(ctx, sent, wire):
        ctx.wire = wire
        return _end(sent, wire)

    @staticmethod
    def backward(ctx, grad):
        ctx.wire.grad = _Start.apply(grad, ctx.wire.back())
        return grad, None


class _AtOnce(torch.autograd.Function):
    """Exchange rows and wait for them; in the backward, their gradients."""

    @staticmethod
    def forward(ctx, packed, wire):
        ctx.wire = wire
        return _exchange_at_once("all_to_all_rows", packed, wire)

    @staticmethod
    def backward(ctx, grad):
        return _exchange_rows(grad, ctx.wire.back()), None


def _exchange_rows(rows: Tensor, wire: _Wire) -> Tensor:
    """Exchange rows in eager mode."""
    packed = pack_rows(rows)
    if not _unobserved(packed):
        received = _Finish.apply(_Start.apply(packed, wire), wire)
    elif _differentiated(packed):
        received = _AtOnce.apply(packed, wire)
    else:
        received = _exchange_at_once("all_to_all_rows", packed, wire)
    return unpack_rows(received, rows.dtype)


def _unobserved(rows: Tensor) -> bool:
    """No tracer, no mode and no subclass looks at the collectives of these rows.

    Nobody then needs functional ones: torch's blocking all-to-all costs the host half as much, and with NCCL it runs on
    the current stream, instead of on another one that must wait for it and be waited for.
    """
    return (
        type(rows) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and not (rows.is_cuda and _nccl_waits_on_host())
    )


@functools.cache
def _nccl_waits_on_host() -> bool:
    """Whether NCCL has no watchdog: torch then sees a missing rank where the host waits, and no blocking call does."""
    return os.environ.get("TORCH_NCCL_BLOCKING_WAIT", "0").lower() in ("1", "y", "yes", "true", "t")


def _differentiated(rows: Tensor) -> bool:
    """Autograd or torch.func takes part, if only to say that it cannot."""
    return (
        (rows.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


# The functional collectives enter autograd in Python, which costs more than what they do. Here there is no gradient.
without_autograd = torch._C._AutoDispatchBelowAutograd


def _exchange_at_once(op: str, packed: Tensor, wire: _Wire) -> Tensor:
    received = packed.new_empty((sum(wire.output_splits), *packed.shape[1:]))
    guarded(
        op,
        wire.group,
        torch.distributed.all_to_all_single,
        *(received, packed.contiguous(), wire.output_splits, wire.input_splits),
        process_group(wire.group.name),
    )
    return received


def _begin(packed: Tensor, wire: _Wire) -> Tensor:
    args = (packed, wire.input_splits, wire.output_splits, wire.group.name)
    with without_autograd():
        return guarded("all_to_all_rows", wire.group, _send, *args)


def _end(sent: Tensor, wire: _Wire) -> Tensor:
    wait = torch.ops._c10d_functional.wait_tensor
    with without_autograd():
        return guarded("all_to_all_rows", wire.group, wait, sent)


def guarded(op: str, group: RankGroup, function: Callable[..., Any], *args: Any) -> Any:
    """Call a collective; if it fails, say which op, in which group, after which time-out."""
    try:
        return function(*args)
    except RuntimeError as err:
        raise explained(op, group.name, err) from err


def explained(op: str, group_name: str, err: RuntimeError) -> RuntimeError:
    """Build the error that says what a failed collective was, and what to look at."""
    group = rank_group(process_group(group_name))
    assert group is not None
    return RuntimeError(
        f"{op}: every rank of {describe_group(group)} must take part within the time-out of "
        f"{timeout_of(group)}, got: {err}. A rank has ended, hangs or runs another program: read the first error of "
        "every rank."
    )


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


class Exchange:
    """Rows on their way to other ranks: construction sends them, ``finish`` waits for the others'.

    Between the two other work can run. Several exchanges may be in flight; every rank must start them in the same
    order.

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
        self._dtype = rows.dtype
        # Graphs hold torch's functional collectives, with torch's gradients.
        self._traced = torch.compiler.is_compiling()
        if self._traced:
            self._sent = _send(pack_rows(rows), list(input_splits), list(output_splits), group.name)
            return
        self._wire = _Wire(list(input_splits), list(output_splits), group)
        if _checks.debug_checks():
            _check_agreement(rows, self._wire)
        packed = pack_rows(rows)
        self._differentiated = _differentiated(packed)
        self._sent = (_Start.apply if self._differentiated else _begin)(packed, self._wire)

    def finish(self) -> Tensor:
        """Return the rows that the other ranks sent, ``[sum(output_splits), ...]``."""
        if self._traced:
            return unpack_rows(torch.ops._c10d_functional.wait_tensor(self._sent), self._dtype)
        end = _Finish.apply if self._differentiated else _end
        return unpack_rows(end(self._sent, self._wire), self._dtype)


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
    group = rank_group(group) or RankGroup("", 1, 0)
    if not torch.compiler.is_compiling():
        check_splits("all_to_all_rows", rows, input_splits, output_splits, group)
        if group.size > 1:
            wire = _Wire(list(input_splits), list(output_splits), group)
            if _checks.debug_checks():
                _check_agreement(rows, wire)
            return _exchange_rows(rows, wire)
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
    group = rank_group(group) or RankGroup("", 1, 0)
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
    if _unobserved(rows) and not _differentiated(rows):
        wire = _Wire(sends, receives, group)
        return unpack_rows(_exchange_at_once(op, pack_rows(rows), wire), rows.dtype)
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
