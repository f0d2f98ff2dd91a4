"""Rows of all ranks on every rank, and sums of what the ranks made of them. W ranks, T rows on each.

All-gather and reduce-scatter, each the gradient of the other. Every rank must have as many rows: a backend may hang or
end the process where one has not, which ``CommonSize.require`` and ``check_equal_rows`` find out first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import moeops.comm.peer  # noqa: F401  (registers the ops)
from moeops.comm.groups import RankGroup, describe_group, process_group, works_by
from moeops.comm.wires import Carried, Wire, carry, guarded, pack_rows, unpack_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def blocking_all_gather(received: Tensor, sent: Tensor, group: ProcessGroup) -> None:
    """torch's, which 2.13 calls by another name and warns of the old one."""
    dist = torch.distributed
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(received, sent, group=group)


def blocking_reduce_scatter(received: Tensor, sent: Tensor, group: ProcessGroup) -> None:
    """The same; a sum."""
    dist = torch.distributed
    call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    call(received, sent, group=group)


class AllGather(Wire):
    """Every rank gets the rows of all, in the order of ranks."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__("all_gather_rows", group)

    def send(self, packed: Tensor) -> Tensor:
        """Begin; with gloo as an exchange in which every rank sends every other the same rows.

        Two functional all-gathers that gloo runs at once free one string twice, in torch 2.13 at least: each thread
        writes the name of its work, too long to be kept in place, where the other one does.
        """
        name, size = self.group.name, self.group.size
        if not works_by("gloo", name, packed.device.type):
            return torch.ops._c10d_functional.all_gather_into_tensor(
                packed.contiguous(), size, name
            )
        splits = [packed.shape[0]] * size
        copies = packed.repeat(size, *[1] * (packed.dim() - 1))
        return torch.ops._c10d_functional.all_to_all_single(copies, splits, splits, name)

    def run(self, packed: Tensor) -> Tensor:
        """Gather at once."""
        received = packed.new_empty((self.group.size * packed.shape[0], *packed.shape[1:]))
        blocking_all_gather(received, packed.contiguous(), process_group(self.group.name))
        return received

    def turn(self) -> Wire:
        """Gradients of a rank's rows come from all ranks."""
        return ReduceScatter(self.group)


class ReduceScatter(Wire):
    """Every rank gets the sum over the ranks of its part of the rows."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__("reduce_scatter_rows", group)

    def send(self, packed: Tensor) -> Tensor:
        """Begin."""
        return torch.ops._c10d_functional.reduce_scatter_tensor(
            packed.contiguous(), "sum", self.group.size, self.group.name
        )

    def run(self, packed: Tensor) -> Tensor:
        """Sum and scatter at once."""
        received = packed.new_empty((packed.shape[0] // self.group.size, *packed.shape[1:]))
        blocking_reduce_scatter(received, packed.contiguous(), process_group(self.group.name))
        return received

    def turn(self) -> Wire:
        """The gradient of a sum goes to all ranks that added to it."""
        return AllGather(self.group)


class PeerAllGather(Wire):
    """``AllGather`` by copy engines, from the memory of ranks on one machine: see ``moeops.comm.peer``."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__("peer_all_gather", group)

    def send(self, packed: Tensor) -> Tensor:
        """Begin."""
        return torch.ops.moeops.peer_all_gather(packed, self.group.size, self.group.name)

    def run(self, packed: Tensor) -> Tensor:
        """Gather, and let the current stream wait."""
        return torch.ops._c10d_functional.wait_tensor(self.send(packed))

    def turn(self) -> Wire:
        """Gradients of a rank's rows come from all ranks."""
        return PeerReduceScatter(self.group)


class PeerReduceScatter(Wire):
    """``ReduceScatter`` likewise; half types are added in float32."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__("peer_reduce_scatter", group)

    def send(self, packed: Tensor) -> Tensor:
        """Begin."""
        return torch.ops.moeops.peer_reduce_scatter(packed, self.group.size, self.group.name)

    def run(self, packed: Tensor) -> Tensor:
        """Sum and scatter, and let the current stream wait."""
        return torch.ops._c10d_functional.wait_tensor(self.send(packed))

    def turn(self) -> Wire:
        """The gradient of a sum goes to all ranks that added to it."""
        return PeerAllGather(self.group)


# By name: how rows of all ranks come to every rank. The wire of the gradients brings sums back.
GATHERS: dict[str, Callable[[RankGroup], Wire]] = {"nccl": AllGather, "peer": PeerAllGather}


class Gathering(Carried):
    """An all-gather on its way: construction begins it, ``finish`` returns what ``all_gather_rows`` does."""

    def __init__(self, rows: Tensor, group: RankGroup, transport: str = "nccl") -> None:
        super().__init__(rows, GATHERS[transport](group))


def all_gather_rows(rows: Tensor, group: RankGroup) -> Tensor:
    """Collect the rows of all ranks.

    Args:
        rows: ``[T, ...]``, any dtype; same shape and dtype on every rank.
        group: the ranks, more than one.

    Returns:
        ``[W * T, ...]``, first those of rank 0, then those of rank 1, and so on; dtype of ``rows``.

    Raises:
        RuntimeError: a rank did not take part within the group's time-out.
    Gradients: ``rows``, by ``reduce_scatter_rows``.  Host sync: none.  Deterministic: yes.
    """
    return _carry(rows, AllGather(group))


def reduce_scatter_rows(rows: Tensor, group: RankGroup, transport: str = "nccl") -> Tensor:
    """Add up the rows of all ranks, and keep this rank's part of the sum.

    Args:
        rows: ``[W * T, ...]``, a float type; same shape and dtype on every rank. Rows ``r * T`` to ``(r + 1) * T`` are
            what this rank adds to the result of rank ``r``.
        group: the ranks, more than one.
        transport: "nccl", the group's backend, or "peer": see ``moeops.comm.peer``.

    Returns:
        ``[T, ...]``, dtype of ``rows``, in which the backend adds.

    Raises:
        RuntimeError: a rank did not take part within the group's time-out.
    Gradients: ``rows``, by ``all_gather_rows``.  Host sync: none.  Deterministic: as the backend's reduce-scatter is.
    """
    return _carry(rows, GATHERS[transport](group).turn())


def _carry(rows: Tensor, wire: Wire) -> Tensor:
    if not torch.compiler.is_compiling():
        return carry(rows, wire)
    sent = wire.send(pack_rows(rows))
    return unpack_rows(torch.ops._c10d_functional.wait_tensor(sent), rows.dtype)


def check_equal_rows(op: str, leaves: Sequence[Tensor], group: RankGroup) -> None:
    """Compare numbers and sizes of rows with all ranks: every rank sees all of them, so all of them fail or none.

    One small collective and a copy to the host; outside of compiled code.

    Args:
        op: for error messages.
        leaves: tensors with the rows in dimension 0.
        group: the ranks.

    Raises:
        ValueError: on every rank, where a rank's shapes or dtypes differ.
    """
    mine = [(list(leaf.shape), str(leaf.dtype)) for leaf in leaves]
    everyone: list[object] = [None] * group.size
    guarded(
        op,
        group,
        lambda: torch.distributed.all_gather_object(
            everyone, mine, group=process_group(group.name)
        ),
    )
    for rank, theirs in enumerate(everyone):
        if theirs != mine:
            raise ValueError(
                f"{op}: moe_inp must have the same shapes and dtypes on every rank of {describe_group(group)}, got "
                f"{mine} here and {theirs} on rank {rank}. Pass as many tokens on every rank, max_tokens=, or use "
                'dispatch="exact".'
            )
