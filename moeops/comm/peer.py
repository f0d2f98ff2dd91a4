"""Rows of all ranks, fetched from their memory by copy engines, which leave the GPU's processors to experts. W ranks.

All ranks of a group are on one machine, and each of them sees a block of memory of every other one: torch's symmetric
memory, which is allocated when the first layer is built and grows where rows want more. An exchange copies this rank's
rows into its block, meets the other ranks on the device, and copies what it wants out of their blocks, all on streams
of its own. The block is used in laps, so that several exchanges are under way at once; between two laps ranks meet.

``torch.ops.moeops.peer_all_gather`` and ``peer_reduce_scatter`` return what nobody may read before torch's
``wait_tensor``, as its functional collectives do. torch has such ops (``symm_mem._low_contention_all_gather``), which
are not used: ranks meet in them without a time-out, so that one that has ended would let the others wait for ever.
"""

from __future__ import annotations

import functools
import os
import socket
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeops.comm.agreement import everywhere
from moeops.comm.groups import (
    RankGroup,
    describe_group,
    process_group,
    rank_group,
    timeout_of,
    works_by,
)
from moeops.comm.wires import nccl_waits_on_host

if TYPE_CHECKING:
    from collections.abc import Iterator

_library = torch.library.Library("moeops", "FRAGMENT")
_library.define("peer_all_gather(Tensor rows, int group_size, str group_name) -> Tensor")
_library.define("peer_reduce_scatter(Tensor rows, int group_size, str group_name) -> Tensor")

FIRST_BYTES = 1 << 24  # of a block, before anybody knows how much travels
LAP = 4  # exchanges of the largest size that a block has room for
ALIGNMENT = 256
_NO_TIMEOUT = 1e6  # seconds
_GRACE = 5.0
_memories: dict[str, PeerMemory] = {}


def open_peer_memory(op: str, group: RankGroup) -> None:
    """Let the ranks of a group see blocks of each other's memory; every rank calls it, once is enough.

    Args:
        op: for error messages.
        group: the ranks, more than one, each with a GPU of its own as torch's current device.

    Raises:
        ValueError: on every rank, where the group has no NCCL, ranks are on several machines or share a GPU, or a GPU
        cannot read another one's memory.  RuntimeError: it failed on another rank.
    """
    if group.name in _memories:
        return
    advice = 'Pass transport="nccl".'

    def place() -> tuple[str, int, str]:
        if not works_by("nccl", group.name, "cuda"):
            backend = torch.distributed.get_backend(process_group(group.name))
            raise ValueError(
                f'{op}: transport must be "nccl" where {describe_group(group)} does not work on CUDA devices by NCCL, '
                f'got "peer" with backend {backend!r}. {advice}'
            )
        device = torch.cuda.current_device()
        return socket.gethostname(), device, str(torch.cuda.get_device_properties(device).uuid)

    places = everywhere(op, group, place)
    hosts = sorted({host for host, _, _ in places})
    if len(hosts) > 1:
        raise ValueError(
            f'{op}: transport must be "nccl" where ranks are on several machines, got "peer" in '
            f"{describe_group(group)} on {hosts}. {advice}"
        )
    if len({uuid for _, _, uuid in places}) < group.size:
        raise ValueError(
            f'{op}: transport must be "nccl" where ranks share a GPU, got "peer" in {describe_group(group)} on '
            f"devices {[device for _, device, _ in places]}. Call torch.cuda.set_device on every rank, or pass "
            'transport="nccl".'
        )

    def connect() -> PeerMemory:
        own = places[group.rank][1]
        for rank, (_, other, uuid) in enumerate(places):
            # A rank that sees its own GPU only counts from 0, as all others do.
            seen = other < torch.cuda.device_count()
            is_it = seen and str(torch.cuda.get_device_properties(other).uuid) == uuid
            if rank != group.rank and is_it and not torch.cuda.can_device_access_peer(own, other):
                raise ValueError(
                    f'{op}: transport must be "nccl" where a GPU cannot read the memory of another one, got "peer" '
                    f"with devices {own} and {other} of ranks {group.rank} and {rank}. {advice}"
                )
        return PeerMemory(group, torch.device("cuda", own))

    # Kept by this rank only, so nothing is told that could not be pickled.
    made: list[PeerMemory] = []
    everywhere(op, group, lambda: made.append(connect()))
    made[0].grow(FIRST_BYTES)
    _memories[group.name] = made[0]


@functools.cache
def _work_class() -> type:
    """What ``wait_tensor`` waits for; made when it is needed, since not every torch has its base."""

    class Fetched(torch._C._distributed_c10d.Work):
        """The stream that fetches, as it is now; after ``seconds`` the host gives up, where NCCL lets it wait."""

        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds
            self.event = torch.cuda.Event()
            self.event.record()

        def wait(self, timeout: timedelta = timedelta(0)) -> bool:
            if nccl_waits_on_host() and not torch.cuda.is_current_stream_capturing():
                deadline = time.monotonic() + self.seconds
                while not self.event.query():
                    if time.monotonic() > deadline:
                        raise RuntimeError(
                            "peer memory: every rank must come to the same exchange, got some that have not. Read the "
                            "first error of every rank."
                        )
                    time.sleep(1e-4)
            self.event.wait()
            return True

    return Fetched


class PeerMemory:
    """A block of every rank's memory that all ranks of a group see, and the streams that work on it.

    Args:
        group: the ranks, on one machine.
        device: this rank's.
    """

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.size = 0
        self._next = 0
        timeout = timeout_of(group)
        self._seconds = _NO_TIMEOUT if timeout is None else timeout.total_seconds()
        self._staging = torch.cuda.Stream(device)
        self._fetching = torch.cuda.Stream(device)
        self._blocks: list[Tensor] = []  # by rank, bytes
        self._handle: Any = None

    def grow(self, num_bytes: int) -> None:
        """Make the blocks at least as large; all ranks call it with one number. The host waits for all of them."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"peer_all_gather: the first forward with {num_bytes} bytes must be outside of a CUDA graph, got one "
                f"while a graph is captured, with blocks of {self.size} bytes. Run a step of this size before."
            )
        everywhere("peer_all_gather", self.group, torch.cuda.synchronize, self.device)
        import torch.distributed._symmetric_memory as symmetric

        # All ranks are done with the old ones.
        self._blocks, self._handle = [], None
        with _without_multicast():
            own = symmetric.empty(num_bytes, dtype=torch.uint8, device=self.device)
            self._handle = symmetric.rendezvous(own, process_group(self.group.name))
        for rank in range(self.group.size):
            is_own = rank == self.group.rank
            block = (
                own if is_own else self._handle.get_remote_tensor(rank, (num_bytes,), torch.uint8)
            )
            self._blocks.append(block)
        self.size, self._next = num_bytes, 0

    def _stage(self, rows: Tensor) -> slice:
        """Copy rows into this rank's block; return the place, the same on every rank."""
        wanted = -(-rows.nbytes // ALIGNMENT) * ALIGNMENT
        if LAP * wanted > self.size:
            self.grow(LAP * wanted)
        if self._next + wanted > self.size:
            self._next = 0
        self._staging.wait_stream(torch.cuda.current_stream())
        self._fetching.wait_stream(torch.cuda.current_stream())
        if self._next == 0:  # a new lap: nobody fetches from the last one any more
            self._meet()
            self._staging.wait_stream(self._fetching)
        place = slice(self._next, self._next + rows.nbytes)
        self._next += wanted
        with torch.cuda.stream(self._staging):
            self._blocks[self.group.rank][place].copy_(_as_bytes(rows))
        self._fetching.wait_stream(self._staging)
        # Who owns the rows may write over them from here on.
        torch.cuda.current_stream().wait_stream(self._staging)
        return place

    def _meet(self) -> None:
        """Wait on the device until all ranks are here; after the group's time-out torch ends the CUDA context."""
        with torch.cuda.stream(self._fetching):
            # Where the host waits, it is to raise first.
            grace = _GRACE if nccl_waits_on_host() else 0.0
            self._handle.barrier(channel=0, timeout_ms=int(1000 * (self._seconds + grace)))

    def all_gather(self, rows: Tensor) -> Tensor:
        """Begin to fetch the rows of all ranks."""
        size = self.group.size
        out = rows.new_empty((size * rows.shape[0], *rows.shape[1:]))
        place = self._stage(rows)
        self._meet()
        with torch.cuda.stream(self._fetching):
            parts = _as_bytes(out).chunk(size)
            for rank in self._in_turn():
                parts[rank].copy_(self._blocks[rank][place])
            self._register(out)
        return out

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Begin to fetch this rank's part of the rows of all ranks, and add them up, half types in float32."""
        size = self.group.size
        shape = (rows.shape[0] // size, *rows.shape[1:])
        out = rows.new_empty(shape)
        place = self._stage(rows)
        part = out.nbytes
        mine = slice(
            place.start + self.group.rank * part, place.start + (self.group.rank + 1) * part
        )
        self._meet()
        with torch.cuda.stream(self._fetching):
            fetched = rows.new_empty((size, *shape))
            for rank in self._in_turn():
                _as_bytes(fetched[rank]).copy_(self._blocks[rank][mine])
            torch.sum(fetched, 0, out=out)
            self._register(out)
        return out

    def _register(self, out: Tensor) -> None:
        """Let ``wait_tensor`` know when this is there; on the stream that fetches."""
        torch._C._distributed_c10d._register_work(out, _work_class()(self._seconds))

    def _in_turn(self) -> list[int]:
        """Ranks, this one first; each rank is fetched from by one other at a time."""
        return [(self.group.rank - step) % self.group.size for step in range(self.group.size)]


@contextmanager
def _without_multicast() -> Iterator[None]:
    """Memory that is mapped by ordinary means; what torch maps in addition otherwise is used by nothing here."""
    name = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _as_bytes(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)


def _memory_of(group_name: str) -> PeerMemory:
    if group_name not in _memories:  # code from a cache, or an exported program
        group = rank_group(process_group(group_name))
        assert group is not None
        open_peer_memory("peer_all_gather", group)
    return _memories[group_name]


def _peer_all_gather(rows: Tensor, group_size: int, group_name: str) -> Tensor:
    if rows.numel() == 0:
        return rows.new_empty((group_size * rows.shape[0], *rows.shape[1:]))
    return _memory_of(group_name).all_gather(rows.contiguous())


def _peer_reduce_scatter(rows: Tensor, group_size: int, group_name: str) -> Tensor:
    if rows.shape[0] % group_size:
        raise ValueError(
            f"peer_reduce_scatter: rows must be as many for each of the {group_size} ranks, got {list(rows.shape)}. "
            "Pad them."
        )
    if rows.numel() == 0:
        return rows.new_empty((rows.shape[0] // group_size, *rows.shape[1:]))
    return _memory_of(group_name).reduce_scatter(rows.contiguous())


def _refuse_cpu(op):
    def kernel(rows, group_size, group_name):
        raise ValueError(
            f"{op}: rows must be on a CUDA device, got {rows.device}. "
            'Pass Gather(transport="nccl"), which takes gloo for rows on the CPU.'
        )

    return kernel


_library.impl("peer_all_gather", _peer_all_gather, "CUDA")
_library.impl("peer_reduce_scatter", _peer_reduce_scatter, "CUDA")
for _name in ("peer_all_gather", "peer_reduce_scatter"):
    _library.impl(_name, _refuse_cpu(_name), "CPU")


@torch.library.register_fake("moeops::peer_all_gather")
def _peer_all_gather_fake(rows, group_size, group_name):
    return rows.new_empty((group_size * rows.shape[0], *rows.shape[1:]))


@torch.library.register_fake("moeops::peer_reduce_scatter")
def _peer_reduce_scatter_fake(rows, group_size, group_name):
    return rows.new_empty((rows.shape[0] // group_size, *rows.shape[1:]))


def _save_group(ctx, inputs, output):
    _, *ctx.group = inputs


def _backward_of(op):
    def backward(ctx, grad):
        sent = op(grad.contiguous(), *ctx.group)
        return torch.ops._c10d_functional.wait_tensor(sent), None, None

    return backward


torch.library.register_autograd(
    "moeops::peer_all_gather",
    _backward_of(torch.ops.moeops.peer_reduce_scatter),
    setup_context=_save_group,
)
torch.library.register_autograd(
    "moeops::peer_reduce_scatter",
    _backward_of(torch.ops.moeops.peer_all_gather),
    setup_context=_save_group,
)

PEER_OPS = (
    torch.ops.moeops.peer_all_gather.default,
    torch.ops.moeops.peer_reduce_scatter.default,
)
