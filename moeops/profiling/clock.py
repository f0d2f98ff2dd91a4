"""Times of device work, on one rank or on many at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

LEAD_PASSES = 12  # writes of the flush buffer, in which the host queues what is timed


class Ranks:
    """Who measures: processes that call the same things in the same order. This one alone, if not a subclass.

    Attributes:
        device: of this process.
        rank, size: of this process, and how many there are.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device = device
        self.rank = rank
        self.size = size

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for the other ranks' hosts."""

    def meet(self, token: torch.Tensor) -> None:
        """Let the devices wait for each other: a small all-reduce of ``token``."""


class Clock:
    """Median seconds of calls, after some to warm up, each with cold caches.

    CUDA: events on the current stream behind a queue of other work, so that the host's time is not in them. CPU: the
    wall's time.

    Args:
        ranks: who takes part in collectives.
        samples: that count.
        warm_up: that do not.
        flush_bytes: of the buffer that is written before each sample, larger than the last cache.
    """

    def __init__(self, ranks: Ranks, samples: int, warm_up: int, flush_bytes: int) -> None:
        self.ranks = ranks
        self.device = ranks.device
        self._samples = samples
        self._warm_up = warm_up
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            flush_bytes = max(flush_bytes, 4 * cache)
        self._buffer = torch.empty(flush_bytes, dtype=torch.uint8, device=self.device)
        self._token = torch.zeros(1, device=self.device)

    def seconds(
        self,
        call: Callable[[], Any],
        *,
        before: Callable[[], Any] | None = None,
        together: bool = False,
    ) -> float:
        """Time ``call``.

        Args:
            call: what is timed.
            before: called before each, untimed.
            together: begin on all ranks at once; all of them must ask for it.

        Returns:
            The median on this rank.
        """
        times = []
        for turn in range(self._warm_up + self._samples):
            if before is not None:
                before()
            value = self._sample(call, together)
            if turn >= self._warm_up:
                times.append(value)
        return median(times)

    def _sample(self, call: Callable[[], Any], together: bool) -> float:
        if together:
            self.synchronize()
            self.ranks.barrier()
        if self.device.type != "cuda":
            self._buffer.fill_(1)
            if together:
                self.ranks.barrier()
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        for _ in range(LEAD_PASSES):
            self._buffer.fill_(1)
        if together:
            self.ranks.meet(self._token)  # the devices reach the first event together
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return 1e-3 * first.elapsed_time(last)

    def host_samples(self, call: Callable[[], list[float]]) -> list[float]:
        """Medians of what ``call`` returns, seconds of the host by part; the device is idle before each call."""
        rows = []
        for turn in range(self._warm_up + 2 * self._samples):
            self.synchronize()
            self.ranks.barrier()
            row = call()
            if turn >= self._warm_up:
                rows.append(row)
        return [median(column) for column in zip(*rows, strict=True)]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
