"""A size that is the same on all ranks of a group, without a collective while no rank's own changes. W ranks."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeops.comm.agreement import everywhere
from moeops.comm.groups import RankGroup, describe_group, process_group

if TYPE_CHECKING:
    from torch.distributed import Store

# Exchanges of each group so far, by its name: the same on all ranks, who take part in all of them.
_rounds: dict[str, int] = {}


class CommonSize:
    """The size of the blocks that the ranks of a group exchange, where each rank wants one by its own data.

    In the first exchange the ranks tell each other what they want, and all take the largest. Later on a rank that wants
    what it wanted says nothing and asks nobody. A rank that wants something else writes so into the job's store, and
    takes part with the old size, which the others expect. When the exchange has arrived, all have begun it, so the
    store holds the wishes of all who changed: if those are all ranks, the exchange is done again with the largest.
    Otherwise the old size stays, and what is too much for it is the caller's to drop.

    Calls: ``begin`` before an exchange, ``settle`` after it if ``changed``.

    Args:
        op: for error messages.
        group: the ranks, more than one.

    Attributes:
        size: what all ranks exchange, ``None`` before the first exchange.
        changed: this rank wants another size than ``size`` and has said so.

    Host sync: in the first exchange, and where a rank's own size changes.
    """

    def __init__(self, op: str, group: RankGroup) -> None:
        self.op = op
        self.group = group
        self.size: int | None = None
        self.changed = False
        self._wanted = 0
        self._key = ""
        self._written: list[str] = []
        self._warned = False

    def begin(self, wanted: int, device: torch.device) -> int:
        """Return the size of an exchange that begins, on every rank of the group.

        Raises:
            RuntimeError: a rank did not take part in the first one within the group's time-out.
        """
        name = self.group.name
        number = _rounds[name] = _rounds.get(name, 0) + 1
        if self.size is None:
            self.size = max(everywhere(self.op, self.group, lambda: wanted, device))
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
            self.size = max(int(store.get(f"{self._key}/{rank}")) for rank in ranks)
            return True
        if self._wanted > self.size and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.op}: every rank of {describe_group(self.group)} should have as many tokens as the others: this "
                f"one wants {self._wanted} rows per expert and keeps to the {self.size} of all ranks, because others "
                "have not changed. Rows beyond that are dropped. Pad shorter batches, or pass an int as capacity.",
                stacklevel=2,
            )
        return False

    def _store(self) -> Store:
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        return PrefixStore(f"moeops/{self.group.name}", _get_default_store())


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
