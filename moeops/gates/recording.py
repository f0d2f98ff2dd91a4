"""What a forward leaves behind: counts, losses, decisions. Once per forward, however often torch runs it again.

Activation checkpointing runs a forward a second time in the backward. In eager mode Python sees that; a compiled graph
is one and the same both times, so what it leaves behind goes through an op that looks when it runs.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

from moeops._tracing import exporting

T = TypeVar("T")


def _in_backward() -> bool:
    """Autograd is running: this forward is a recomputation made by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


# One op and not two, a look and a sum: a checkpoint with a policy per operator would hand the forward's look to the
# recomputation. A CUDA graph would replay what the op did when it was captured. Without torch.library.custom_op, whose
# wrapper costs several times what the op does.
_LIBRARY = torch.library.Library("moeops_gates", "FRAGMENT")
_LIBRARY.define(
    "add_up_(Tensor(a!) total, Tensor amount) -> ()", tags=(torch.Tag.cudagraph_unsafe,)
)


@torch.library.impl(_LIBRARY, "add_up_", "CompositeExplicitAutograd")
def _add_up(total: Tensor, amount: Tensor) -> None:
    if not _in_backward():
        total.add_(amount)


@torch.library.register_fake("moeops_gates::add_up_", lib=_LIBRARY)
def _add_up_fake(total, amount):
    return None


def add_up(total: Tensor, amount: Tensor) -> None:
    """Add ``amount`` to ``total`` in place; not while exporting, nor in a recomputation by activation checkpointing.

    Call it in every forward, and compute the amount in every forward: a recomputation that leaves operators out gets
    the wrong tensors from a checkpoint that saves some operators' results.

    Args:
        total: of any shape and type.
        amount: of the same shape.

    Host sync: none.  One op to a compiler, ``torch.ops.moeops_gates.add_up_``, which CUDA graphs leave out.
    """
    if not exporting():
        torch.ops.moeops_gates.add_up_(total, amount)


class Newest(Generic[T]):
    """A value of the newest forward, to be handed over once. Recomputations and exported programs do not set it.

    The recomputation of a compiled forward does write the value, which is the same as the forward's; a count of such
    forwards says whether it was handed over before.
    """

    def __init__(self) -> None:
        self.value: T | None = None
        # Of compiled forwards; on the CPU, where reading it waits for nothing.
        self._forwards = torch.zeros((), dtype=torch.int64, device="cpu")
        # The count when a value was handed over; -1 when an eager forward has left a new one.
        self._taken = 0

    def set(self, value: T) -> None:
        """Keep the value of this forward."""
        if exporting():
            return
        if torch.compiler.is_compiling():
            add_up(self._forwards, torch.ones((), dtype=torch.int64, device="cpu"))
        elif _in_backward():
            return
        else:
            self._taken = -1
        self.value = value

    def get(self) -> T | None:
        """The value, unless it was handed over."""
        if not torch.compiler.is_compiling() and self._taken == int(self._forwards):
            self.value = None  # a recomputation's
        return self.value

    def clear(self) -> None:
        """Count the value as handed over."""
        self.value = None
        if not torch.compiler.is_compiling():
            self._taken = int(self._forwards)
