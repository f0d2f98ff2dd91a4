"""Clocks for several ranks: all begin together, and the slowest rank's time counts. W ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Runner, Timer, synchronize
from moeops.planner.ranks import TorchrunRanks


class Ranks(TorchrunRanks):
    """The processes that torchrun started, a device each: ``device`` and ``seconds`` as in ``TorchrunRanks``."""

    def __init__(self, device: str, seconds: float):
        if "RANK" not in os.environ:
            raise RuntimeError(
                "benchmarks: processes must be started by torchrun, got one without a rank. Run torchrun "
                "--nproc-per-node=2 -m benchmarks.parallel."
            )
        if device == "cpu":
            torch.set_num_threads(1)
        super().__init__(device, op="benchmarks", seconds=seconds)

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
        self._ranks.barrier()
        super().flush()
        self._ranks.meet(self._token)

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
