"""Pairs that found no row are an error in the next forward, which no forward waits for. W ranks, R rows on each.

The graph counts lost pairs on the device. An op behind the count copies it to the host without waiting, and raises for
what the forward before had copied: the host is then rarely ahead of the device by as much as a forward. Every rank
knows the pairs of all ranks, so all of them raise in the same forward.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("moeops", "FRAGMENT")
_library.define("report_lost_pairs(Tensor expert_offsets, Tensor lost, str reporter) -> Tensor")


class _Report:
    """What the host knows of one reporter: the count as it was last copied, and when that will have arrived."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._recorded = False

    def post(self, lost: Tensor) -> None:
        """Copy the count to the host; nothing waits."""
        self._pinned.copy_(lost, non_blocking=True)
        if self._arrived is not None and not torch.cuda.is_current_stream_capturing():
            self._arrived.record(torch.cuda.current_stream(lost.device))
            self._recorded = True

    def read(self) -> int:
        """The count that was posted last."""
        if self._recorded:
            assert self._arrived is not None
            self._arrived.synchronize()
        return int(self._pinned)

    def forget(self) -> None:
        """An error has told of them."""
        self._pinned.zero_()
        self._recorded = False


_reports: dict[str, _Report] = {}
_numbers = itertools.count()


def _report_lost_pairs(expert_offsets: Tensor, lost: Tensor, reporter: str) -> Tensor:
    report = _reports.get(reporter)
    if report is None:
        report = _reports[reporter] = _Report(lost.device)
    capturing = lost.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing:
        raise_for_lost_pairs(reporter)
    report.post(lost)
    return expert_offsets.clone()


def raise_for_lost_pairs(reporter: str) -> None:
    """Raise RuntimeError if the forward before lost pairs; waits until its count has arrived."""
    report = _reports.get(reporter)
    count = 0 if report is None else report.read()
    if report is None or count == 0:
        return
    report.forget()
    raise RuntimeError(
        f"GatherDispatcher: rows must leave room for every token-expert pair, got {count} pairs without a row in the "
        "forward before, whose outputs lack them. Raise rows in dispatch=Gather(rows=...), balance the experts' loads, "
        'or use dispatch="exact".'
    )


# Python on every device: the host's part is all there is. The result is the offsets, so that no graph drops the op or
# moves it behind the experts.
_library.impl("report_lost_pairs", _report_lost_pairs, "CompositeExplicitAutograd")


@torch.library.register_fake("moeops::report_lost_pairs")
def _report_lost_pairs_fake(expert_offsets, lost, reporter):
    return torch.empty_like(expert_offsets)


class LostPairs:
    """The reporter of one dispatcher; a copy of it, by ``deepcopy`` or pickle, is another one."""

    def __init__(self) -> None:
        self.name = f"dispatcher {next(_numbers)}"

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.name = f"dispatcher {next(_numbers)}"

    def report(self, expert_offsets: Tensor, lost: Tensor) -> Tensor:
        """Raise for the pairs that the forward before lost, and note those of this one.

        Args:
            expert_offsets: any tensor that what follows depends on.
            lost: number of pairs, ``[1]`` int64.

        Returns:
            ``expert_offsets``.
        """
        return torch.ops.moeops.report_lost_pairs(expert_offsets, lost, self.name)
