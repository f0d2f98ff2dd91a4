"""A backend of torch.distributed whose links have a speed of one's choice, so that overlap shows in wall time.

``start_group`` makes a group of processes on one machine that sends through gloo, and holds back what came until
``call_seconds + bytes * seconds_per_byte`` have passed. A group is one link, as a communicator of NCCL is one stream:
what was begun first is over first, and the next one starts then, once all ranks have begun it. Links cost no CPU time:
a thread sleeps. Groups work at the same time. Eager collectives, functional ones and compiled code all work with it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "timed"


class Sent(NamedTuple):
    """A collective that is over.

    Attributes:
        op: "all_to_all", "all_gather", "reduce_scatter", "all_reduce", "broadcast", "barrier" or "point_to_point".
        num_bytes: that left this rank.
        begun: when the program asked for it, in seconds of ``time.monotonic``.
        started: when its link was free and all ranks had asked for it.
        ended: when the program might read what came.
    """

    op: str
    num_bytes: int
    begun: float
    started: float
    ended: float


class _Job(NamedTuple):
    op: str
    num_bytes: int
    begun: float
    seconds: float
    work: dist.Work
    future: torch.futures.Future


class TimedGroup(dist.ProcessGroup):
    """See the module. ``set_link`` makes it slow, which it is not at first.

    Attributes:
        sent: what is over, in order.
        most_in_flight: of collectives that were begun and not over, the largest number at once.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        backend = dist.ProcessGroupGloo(dist.PrefixStore("data", store), rank, size, timeout)
        self._inner = dist.ProcessGroup(store, rank, size)
        self._inner._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._inner._register_backend(
            torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend
        )
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._in_flight = 0
        self._lock = threading.Lock()
        self.set_link()
        threading.Thread(target=self._serve, name="timed link", daemon=True).start()

    def set_link(self, call_seconds: float = 0.0, seconds_per_byte: float = 0.0) -> None:
        """Give the link this speed from now on, and forget what it sent."""
        self._law = call_seconds, seconds_per_byte
        self.sent: list[Sent] = []
        self.most_in_flight = 0

    def getBackendName(self) -> str:
        return NAME

    def getSize(self) -> int:
        return self._inner.size()

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        return self._name

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    def getGroupDesc(self) -> str:
        return self._description

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.work.wait()
            except RuntimeError as err:
                self._end(job, time.monotonic())
                job.future.set_exception(err)
                continue
            started = time.monotonic()
            time.sleep(job.seconds)
            self._end(job, started)
            job.future.set_result(None)

    def _end(self, job: _Job, started: float) -> None:
        with self._lock:
            self._in_flight -= 1
            self.sent.append(Sent(job.op, job.num_bytes, job.begun, started, time.monotonic()))

    def _begin(
        self, op: str, num_bytes: int, call: Callable[..., dist.Work], *arguments: Any
    ) -> dist.Work:
        call_seconds, seconds_per_byte = self._law
        with self._lock:
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            future: torch.futures.Future = torch.futures.Future()
            seconds = call_seconds + num_bytes * seconds_per_byte
            # Under the lock, so that the order of the jobs is that of the collectives.
            work = call(*arguments)
            self._jobs.put(_Job(op, num_bytes, time.monotonic(), seconds, work, future))
        return torch._C._distributed_c10d._create_work_from_future(future)

    def _inner_call(self, *names: str) -> Callable[..., dist.Work]:
        """The gloo group's method: torch 2.13 renamed some."""
        return next(getattr(self._inner, name) for name in names if hasattr(self._inner, name))

    def _shared(self, tensors: Sequence[Tensor]) -> int:
        """Bytes of which each rank keeps its own part and sends the others."""
        return _bytes(tensors) * (self.size() - 1) // self.size()

    def all_to_all_single(self, received, sent, output_splits, input_splits, *options):
        own = input_splits[self.rank()] if input_splits else sent.shape[0] // self.size()
        num_bytes = (sent.shape[0] - own) * sent[:1].nbytes
        call = self._inner_call("all_to_all_single", "alltoall_base")
        return self._begin(
            "all_to_all", num_bytes, call, received, sent, output_splits, input_splits, *options
        )

    def all_gather_single(self, received, sent, *options):
        call = self._inner_call("all_gather_single", "_allgather_base")
        num_bytes = sent.nbytes * (self.size() - 1)
        return self._begin("all_gather", num_bytes, call, received, sent, *options)

    def all_gather_single_coalesced(self, received, sent, *options):
        call = self._inner_call("all_gather_single_coalesced", "allgather_into_tensor_coalesced")
        num_bytes = _bytes(sent) * (self.size() - 1)
        return self._begin("all_gather", num_bytes, call, received, sent, *options)

    def allgather(self, received, sent, *options):
        num_bytes = _bytes(sent) * (self.size() - 1)
        return self._begin("all_gather", num_bytes, self._inner.allgather, received, sent, *options)

    def reduce_scatter_single(self, received, sent, *options):
        call = self._inner_call("reduce_scatter_single", "_reduce_scatter_base")
        return self._begin("reduce_scatter", self._shared([sent]), call, received, sent, *options)

    def reduce_scatter_single_coalesced(self, received, sent, *options):
        call = self._inner_call(
            "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"
        )
        return self._begin("reduce_scatter", self._shared(sent), call, received, sent, *options)

    def allreduce(self, tensors, *options):
        num_bytes = 2 * self._shared(tensors)
        return self._begin("all_reduce", num_bytes, self._inner.allreduce, tensors, *options)

    def allreduce_coalesced(self, tensors, *options):
        num_bytes = 2 * self._shared(tensors)
        call = self._inner.allreduce_coalesced
        return self._begin("all_reduce", num_bytes, call, tensors, *options)

    def broadcast(self, tensors, *options):
        return self._begin("broadcast", _bytes(tensors), self._inner.broadcast, tensors, *options)

    def barrier(self, opts=None):
        options = () if opts is None else (opts,)
        return self._begin("barrier", 0, self._inner.barrier, *options)

    def send(self, tensors, target, tag):
        num_bytes = _bytes(tensors)
        return self._begin("point_to_point", num_bytes, self._inner.send, tensors, target, tag)

    def recv(self, tensors, source, tag):
        return self._begin("point_to_point", 0, self._inner.recv, tensors, source, tag)

    # Their names before torch 2.13.
    alltoall_base = all_to_all_single
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def start_group(ranks: Sequence[int] | None = None) -> TimedGroup:
    """Make a group of these ranks, all of them without any; every rank of the job calls it."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, TimedGroup, devices=["cpu"])
    return dist.new_group(ranks, backend=NAME)
