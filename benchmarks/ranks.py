"""Clocks for several ranks: all begin together, and the slowest rank's time counts. W ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import Runner, Timer, synchronize


class Ranks:
    """The processes that torchrun started, a device each.

    Args:
        device: "cuda" (a GPU each, NCCL) or "cpu" (gloo).
        seconds: time-out of every collective.
    """

    def __init__(self, device: str, seconds: float):
        timeout = timedelta(seconds=seconds)
        if device == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise RuntimeError(
                    f"benchmarks: every rank needs a GPU of its own, got {torch.cuda.device_count()} for local rank "
                    f"{local}. Lower --nproc-per-node, or pass --device cpu."
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", timeout=timeout, device_id=self.device)
        else:
            torch.set_num_threads(1)
            self.device = torch.device("cpu")
            dist.init_process_group("gloo", timeout=timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # What ranks tell each other about rows must not depend on the GPUs' state.
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def slowest(self, samples: list[list[float]]) -> list[list[float]]:
        """Largest value over the ranks of each part of each sample."""
        every = self.gather(samples)
        return [
            [max(values) for values in zip(*parts, strict=True)]
            for parts in zip(*every, strict=True)
        ]


class RankTimer(Timer):
    """Takes samples that begin on all ranks at once: a barrier of the hosts, queued work, a barrier of the devices."""

    def __init__(self, ranks: Ranks, *, lead_passes: int):
        super().__init__(ranks.device, lead_passes=lead_passes)
        self._ranks = ranks
        self._token = torch.zeros(1, device=ranks.device)

    def flush(self) -> None:
        """Cold caches, and devices that reach the first event together."""
        synchronize(self.device)
        dist.barrier()
        super().flush()
        dist.all_reduce(self._token)

    def measure(
        self, runners: dict[str, Runner], *, repeats: int, warm_up: int = 2
    ) -> dict[str, list[list[float]]]:
        """Samples of every runner in microseconds, the slowest rank's, in rotated order.

        The number of samples does not depend on how long they take: ranks would disagree about it.
        """
        names = list(runners)
        samples: dict[str, list[list[float]]] = {name: [] for name in names}
        for turn in range(warm_up + repeats):
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                values = self.sample(runners[name])
                runners[name].reset()
                if turn >= warm_up:
                    samples[name].append(values)
        return {name: self._ranks.slowest(values) for name, values in samples.items()}


def attempt(ranks: Ranks, work: Callable[[], Any]) -> tuple[Any, str]:
    """Run ``work`` on every rank: what it returned and "", or None and the first error of any rank on all of them."""
    result, error = None, ""
    try:
        result = work()
    except Exception as err:
        lines = str(err).strip().splitlines() or [""]
        error = f"rank {ranks.rank}: {type(err).__name__}: {lines[0]}"[:400]
        # The traceback holds every tensor of the failed call.
        err.__traceback__ = None
    errors = [text for text in ranks.gather(error) if text]
    return (None, errors[0]) if errors else (result, "")
