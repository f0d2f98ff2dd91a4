"""A size that is the same on all ranks of a group, without a collective while no rank's own changes. W ranks.

Eager code may exchange the common size where its own is another one (``CommonSize.begin``, ``settle``). Compiled code
has its own size in its kernels, and a backend may end the process where two ranks exchange different ones: an op in the
graph, ``CommonSize.require``, raises before that happens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moeops.comm.agreement import everywhere
from moeops.comm.groups import RankGroup, describe_group, process_group

if TYPE_CHECKING:
    from torch.distributed import Store

# Exchanges of each group so far, by its name: the same on all ranks, who take part in all of them.
_rounds: dict[str, int] = {}
_by_name: WeakValueDictionary[str, CommonSize] = WeakValueDictionary()
_numbers = itertools.count()
_library = torch.library.Library("moeops", "FRAGMENT")
_library.define("require_common_size(Tensor[] like, SymInt wanted, str name) -> Tensor")
# exchange(size, like): do what ranks of this size do first, with rows like those of some tensors; return what arrived.
Exchange = Callable[[int, Sequence[Tensor]], Tensor]


class CommonSize:
    """The size of the blocks that the ranks of a group exchange, where each rank wants one by its own data.

    In the first exchange the ranks tell each other what they want, and all take the largest. Later on a rank that wants
    what it wanted says nothing and asks nobody. A rank that wants something else writes so into the job's store, and
    takes part with the old size, which the others expect. When the exchange has arrived, all have begun it, so the
    store holds the wishes of all who changed: if those are all ranks, the exchange is done again with the largest.
    Otherwise the old size stays, and what is too much for it is the caller's to drop.

    Calls: ``begin`` before an exchange, ``settle`` after it if ``changed``; ``require`` where all must want the same.

    Args:
        op: for error messages.
        group: the ranks, more than one.
        exchange: for ``require``: what ranks do that have not changed.
        remedy: the last sentence of messages.

    Attributes:
        size: what all ranks exchange, ``None`` before the first exchange.
        wishes: what each rank wanted when all last said so.
        changed: this rank wants another size than ``size`` and has said so.

    Host sync: in the first exchange, and where a rank's own size changes.
    """

    def __init__(self, op: str, group: RankGroup, exchange: Exchange, remedy: str) -> None:
        self.op = op
        self.group = group
        self.exchange = exchange
        self.remedy = remedy
        self.size: int | None = None
        self.wishes: list[int] = []
        self.changed = False
        self._wanted = 0
        self._key = ""
        self._written: list[str] = []
        self._warned = False
        self._enlist()

    def _enlist(self) -> None:
        self.name = f"size {next(_numbers)}"
        _by_name[self.name] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enlist()  # a copy, by deepcopy or pickle, is another one

    def begin(self, wanted: int, device: torch.device) -> int:
        """Return the size of an exchange that begins, on every rank of the group.

        Raises:
            RuntimeError: a rank did not take part in the first one within the group's time-out.
        """
        name = self.group.name
        number = _rounds[name] = _rounds.get(name, 0) + 1
        if self.size is None:
            self.wishes = everywhere(self.op, self.group, lambda: wanted, device)
            self.size = max(self.wishes)
        elif wanted != self.size and _is_fake(self.group):
            self.size = wanted
        elif wanted != self.size:
            self.changed, self._wanted, self._key = True, wanted, str(number)
            store = self._store()
            while len(self._written) > 1:  # all ranks have read them: they have begun the one after
                old = self._written.pop(0)
                store.delete_key(f"{old}/{self.group.rank}")
                store.delete_key(f"{old}/changed")
            store.set(f"{self._key}/{self.group.rank}", str(wanted))
            store.add(f"{self._key}/changed", 1)
            self._written.append(self._key)
        return self.size

    def settle(self, arrived: Tensor) -> bool:
        """Say whether the exchange is to be done again, with the new ``size``; all ranks say the same.

        Args:
            arrived: an element of what all other ranks have sent.
        """
        arrived.reshape(-1)[:1].cpu()  # the host waits: who has sent has written
        self.changed = False
        assert self.size is not None
        store = self._store()
        if store.add(f"{self._key}/changed", 0) == self.group.size:
            ranks = range(self.group.size)
            self.wishes = [int(store.get(f"{self._key}/{rank}")) for rank in ranks]
            self.size = max(self.wishes)
            return True
        return False

    def warn_of_surplus(self) -> None:
        """Say once that this rank wants more than all ranks exchange."""
        assert self.size is not None
        if self._wanted > self.size and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.op}: every rank of {describe_group(self.group)} should have as many tokens as the others: this "
                f"one wants {self._wanted} rows per expert and keeps to the {self.size} of all ranks, because others "
                f"have not changed. Rows beyond that are dropped. {self.remedy}",
                stacklevel=2,
            )

    def require(self, leaves: Sequence[Tensor], wanted: Any) -> Tensor:
        """Raise where ranks want different sizes; for what is exchanged to depend on it, add what this returns to it.

        Args:
            leaves: nest leaves ``[R, ...]`` that are exchanged, of which ``exchange`` gets types and sizes of rows.
            wanted: this rank's size, an int or a symbolic one.

        Returns:
            0, an int32 scalar.

        Raises:
            ValueError: on all ranks where all have a new size, as in the first forward; else on those that have one,
            while the others wait for them until they end, or for the group's time-out.
        """
        like = [leaf.detach()[:0] for leaf in leaves]
        return torch.ops.moeops.require_common_size(like, wanted, self.name)

    def _require(self, like: Sequence[Tensor], wanted: int) -> None:
        size = self.begin(max(wanted, 1), like[0].device)
        if self.changed and not self.settle(self.exchange(size, like)):
            raise ValueError(
                f"{self.op}: every rank of {describe_group(self.group)} must have as many tokens as the others here, "
                f"got those for a size of {wanted} on rank {self.group.rank}, where it was {size} before and still is "
                f"on another rank. {self.remedy}"
            )
        if len(set(self.wishes)) > 1:
            self.size = None  # on all ranks, who ask each other again the next time
            raise ValueError(
                f"{self.op}: every rank of {describe_group(self.group)} must have as many tokens as the others here, "
                f"got those for sizes of {self.wishes}, by rank. {self.remedy}"
            )

    def _store(self) -> Store:
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        return PrefixStore(f"moeops/{self.group.name}", _get_default_store())


def _require_common_size(like: Sequence[Tensor], wanted: int, name: str) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32, device=like[0].device)
    if not (zero.is_cuda and torch.cuda.is_current_stream_capturing()):
        _by_name[name]._require(like, wanted)
    return zero


# Python on every device: the host's part is all there is.
_library.impl("require_common_size", _require_common_size, "CompositeExplicitAutograd")


@torch.library.register_fake("moeops::require_common_size")
def _require_common_size_fake(like, wanted, name):
    return like[0].new_empty((), dtype=torch.int32)


def _is_fake(group: RankGroup) -> bool:
    """The group is torch's stand-in for one, whose other ranks do not exist."""
    return torch.distributed.get_backend(process_group(group.name)) == "fake"


def can_settle(leaf: Any, wanted: Any) -> bool:
    """Numbers and tensors are real, and the host may wait: no tracer, no fake tensors, no capture of a CUDA graph."""
    if torch.compiler.is_compiling():
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return not (
        not isinstance(wanted, int)
        or isinstance(leaf, FakeTensor)
        or leaf.is_meta
        or (leaf.is_cuda and torch.cuda.is_current_stream_capturing())
    )
