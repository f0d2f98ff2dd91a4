"""What every collective that carries rows has in common: types, gradients, waiting, errors. W ranks, R rows."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moeops import _checks
from moeops.comm.groups import (
    RankGroup,
    describe_group,
    describe_timeout,
    process_group,
    rank_group,
)

# What gloo and NCCL both send; the rest travels as bytes.
_SENT_AS_IS = (
    *_checks.FLOAT_DTYPES,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
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


class Wire:
    """One collective: how it is begun, how it is done at once, and in a backward the gradients on their way back.

    Attributes:
        op: for error messages.
        group: the ranks.
    """

    def __init__(self, op: str, group: RankGroup) -> None:
        self.op = op
        self.group = group
        self.grad: Tensor | None = None
        self._back: Wire | None = None

    def send(self, packed: Tensor) -> Tensor:
        """Begin: torch's functional collective, whose result nobody may read before ``wait_tensor``."""
        raise NotImplementedError(
            f"{type(self).__name__}: send must be written by the subclass, got none. Write it."
        )

    def send_traced(self, packed: Tensor) -> tuple[Tensor, ...]:
        """Begin in a graph, differentiably; what ``wait_traced`` takes."""
        return (self.send(packed),)

    def wait_traced(self, sent: tuple[Tensor, ...]) -> Tensor:
        """Wait in a graph for what ``send_traced`` began."""
        return torch.ops._c10d_functional.wait_tensor(*sent)

    def run(self, packed: Tensor) -> Tensor:
        """Do it at once, on the current stream where the backend can."""
        raise NotImplementedError(
            f"{type(self).__name__}: run must be written by the subclass, got none. Write it."
        )

    def turn(self) -> Wire:
        """Make the wire of the gradients."""
        raise NotImplementedError(
            f"{type(self).__name__}: turn must be written by the subclass, got none. Write it."
        )

    def back(self) -> Wire:
        """Return the wire of the gradients, always the same one."""
        if self._back is None:
            self._back = self.turn()
        return self._back

    def run_guarded(self, packed: Tensor) -> Tensor:
        """``run``; if it fails, the error says what was run."""
        return guarded(self.op, self.group, self.run, packed)


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
    """Send rows and wait for what comes; in the backward, likewise with the gradients."""

    @staticmethod
    def forward(ctx, packed, wire):
        ctx.wire = wire
        return wire.run_guarded(packed)

    @staticmethod
    def backward(ctx, grad):
        return carry(grad, ctx.wire.back()), None


def carry(rows: Tensor, wire: Wire) -> Tensor:
    """Send rows and wait for what comes, in eager mode."""
    packed = pack_rows(rows)
    if not takes_blocking(packed):
        received = _Finish.apply(_Start.apply(packed, wire), wire)
    elif differentiated(packed):
        received = _AtOnce.apply(packed, wire)
    else:
        received = wire.run_guarded(packed)
    return unpack_rows(received, rows.dtype)


class Carried:
    """Rows on their way: construction sends them, ``finish`` waits for what comes.

    Between the two other work can run. Several may be in flight; every rank must start them in the same order.

    Args:
        rows: ``[R, ...]``, any dtype.
        wire: what is done with them.
    """

    def __init__(self, rows: Tensor, wire: Wire) -> None:
        self._dtype = rows.dtype
        packed = pack_rows(rows)
        self._wire = wire
        # Graphs hold torch's functional collectives.
        self._traced = torch.compiler.is_compiling()
        if self._traced:
            self._in_graph = wire.send_traced(packed)
            return
        self._differentiated = differentiated(packed)
        self._sent = (_Start.apply if self._differentiated else _begin)(packed, wire)

    @property
    def sent(self) -> Tensor:
        """What the collective returned, for an ``InFlight`` that goes on with it; without gradient."""
        return (self._in_graph[0] if self._traced else self._sent).detach()

    def finish(self) -> Tensor:
        """Return the rows that came."""
        if self._traced:
            return unpack_rows(self._wire.wait_traced(self._in_graph), self._dtype)
        end = _Finish.apply if self._differentiated else _end
        return unpack_rows(end(self._sent, self._wire), self._dtype)


class InFlight:
    """Rows on their way, without gradients: construction sends them, ``finish`` waits for what comes.

    For code that is a gradient itself, or has one of its own.

    Args:
        rows: ``[R, ...]``, any dtype.
        wire: what is done with them.
        begun: what is under way already, in the place of the rows: ``sent`` of another one.

    Attributes:
        sent: what the collective returned; nobody may read it before ``finish``.
    """

    def __init__(self, rows: Tensor, wire: Wire, begun: Tensor | None = None) -> None:
        self._dtype = rows.dtype
        self._wire = wire
        self._traced = torch.compiler.is_compiling()
        if begun is not None:
            self.sent = begun
        elif self._traced:
            self.sent = wire.send(pack_rows(rows))
        else:
            self.sent = _begin(pack_rows(rows), wire)

    def advance(self) -> None:
        """There is one link: nothing is to be sent on, see ``TwoHops``."""

    def finish(self) -> Tensor:
        """Return the rows that came."""
        wait = torch.ops._c10d_functional.wait_tensor
        received = wait(self.sent) if self._traced else _end(self.sent, self._wire)
        return unpack_rows(received, self._dtype)


class TwoHops:
    """Rows that pass two links, without gradients: construction sends them over the first one.

    ``advance`` waits for them there, once, and sends them on; ``finish`` waits for what comes over the second. So the
    second link can carry one chunk while the first one carries the next.

    Args:
        rows: ``[R, ...]``, any dtype.
        first: what is done with them first.
        middle: brings what came into the order in which it is sent on.
        second: what is done with that.
        end: brings what came then into the order that is returned.
    """

    def __init__(
        self,
        rows: Tensor,
        first: Wire,
        middle: Callable[[Tensor], Tensor],
        second: Wire,
        end: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._flight = InFlight(rows, first)
        self._onward: tuple[Callable[[Tensor], Tensor], Wire] | None = (middle, second)
        self._end = end

    @property
    def sent(self) -> Tensor:
        """What the collective returned that is under way."""
        return self._flight.sent

    def advance(self) -> None:
        """Send the rows on, if they are still on their first way."""
        if self._onward is not None:
            middle, second = self._onward
            self._flight, self._onward = InFlight(middle(self._flight.finish()), second), None

    def finish(self) -> Tensor:
        """Return the rows that came."""
        self.advance()
        rows = self._flight.finish()
        return rows if self._end is None else self._end(rows)


def unobserved(rows: Tensor) -> bool:
    """No tracer, no mode and no subclass looks at the collectives of these rows."""
    return type(rows) in (Tensor, torch.nn.Parameter) and torch._C._len_torch_dispatch_stack() == 0


def takes_blocking(rows: Tensor) -> bool:
    """Nobody needs functional collectives of these rows.

    torch's blocking ones cost the host half as much, and with NCCL they run on the current stream, instead of on
    another one that must wait for it and be waited for.
    """
    return unobserved(rows) and not (rows.is_cuda and nccl_waits_on_host())


@functools.cache
def nccl_waits_on_host() -> bool:
    """Whether NCCL has no watchdog: torch then sees a missing rank where the host waits, and no blocking call does."""
    return os.environ.get("TORCH_NCCL_BLOCKING_WAIT", "0").lower() in ("1", "y", "yes", "true", "t")


def differentiated(rows: Tensor) -> bool:
    """Autograd or torch.func takes part, if only to say that it cannot."""
    return (
        (rows.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


# The functional collectives enter autograd in Python, which costs more than what they do. Here there is no gradient.
without_autograd = torch._C._AutoDispatchBelowAutograd


def _begin(packed: Tensor, wire: Wire) -> Tensor:
    with without_autograd():
        return guarded(wire.op, wire.group, wire.send, packed)


def _end(sent: Tensor, wire: Wire) -> Tensor:
    wait = torch.ops._c10d_functional.wait_tensor
    with without_autograd():
        return guarded(wire.op, wire.group, wait, sent)


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
        f"{describe_timeout(group)}, got: {err}. A rank has ended, hangs or runs another program: read the first error "
        "of every rank."
    )
