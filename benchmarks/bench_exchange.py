"""Bandwidth of ``moeops.all_to_all_rows`` beside torch's own all-to-all. W ranks."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

import moeops
from benchmarks.ranks import Ranks, RankTimer
from benchmarks.registry import WrongResult
from benchmarks.report import table
from benchmarks.timing import Runner, Spread

MIB = 1 << 20
CUDA_SIZES = tuple(MIB << power for power in range(9))  # 1 to 256 MiB
TEST_SIZES = (MIB // 16, MIB // 4)
ROW_ELEMENTS = 2048  # of bfloat16: 4 KiB
CALLS = 4  # in a row and timed as one, so that a skew of the ranks' starts counts a quarter
OURS = "moeops"
# With splits torch takes the path that moeops takes; without them it has equal parts to send, and less to do.
TORCH = ("torch, splits", "torch, equal")


@dataclass
class ExchangeRow:
    """One size: microseconds of one exchange, by who did it."""

    num_bytes: int  # in the buffer that each rank sends, its own part included
    num_ranks: int
    error: str = ""
    times: dict[str, Spread] | None = None
    host: dict[str, Spread] | None = (
        None  # to queue one exchange; under it, no device time is visible in eager mode
    )

    @property
    def ratio(self) -> float | None:
        """Bandwidth of moeops over that of the faster one of torch."""
        if self.times is None:
            return None
        return min(self.times[name].median for name in TORCH) / self.times[OURS].median

    def gbps(self, name: str) -> float | None:
        """GB/s that leave a rank for others."""
        if self.times is None:
            return None
        sent = self.num_bytes * (self.num_ranks - 1) / self.num_ranks
        return sent / self.times[name].median / 1e3

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        gbps = {name: self.gbps(name) for name in self.times or {}}
        return {**asdict(self), "ratio": self.ratio, "gbps": gbps}


def measure(
    ranks: Ranks, timer: RankTimer, num_bytes: int, repeats: int
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Check all three against each other, then time them in turn: on the device, and on this host."""
    num_rows = num_bytes // (2 * ROW_ELEMENTS) // ranks.size * ranks.size
    splits = [num_rows // ranks.size] * ranks.size
    group = moeops.distributed.rank_group(dist.group.WORLD)
    rows = torch.randn(num_rows, ROW_ELEMENTS, device=ranks.device).to(torch.bfloat16)

    def ours() -> torch.Tensor:
        return moeops.all_to_all_rows(rows, splits, splits, group)

    def with_splits() -> torch.Tensor:
        out = torch.empty_like(rows)
        dist.all_to_all_single(out, rows, splits, splits)
        return out

    def equal() -> torch.Tensor:
        out = torch.empty_like(rows)
        dist.all_to_all_single(out, rows)
        return out

    calls = dict(zip((OURS, *TORCH), (ours, with_splits, equal), strict=True))
    expected = equal()
    for name, call in calls.items():
        if not torch.equal(call(), expected):
            raise WrongResult(f"{name}: other rows than torch's all_to_all_single")
    if ranks.size > 1 and torch.equal(rows, expected):
        raise WrongResult("the rows came back to their own rank")

    host: dict[str, list[float]] = {name: [] for name in calls}

    def repeated(name: str) -> Runner:
        def part() -> None:
            begin = time.perf_counter()
            for _ in range(CALLS):
                calls[name]()
            host[name].append(1e6 * (time.perf_counter() - begin) / CALLS)

        return Runner((part,), lambda: None)

    samples = timer.measure({name: repeated(name) for name in calls}, repeats=repeats)
    times = {
        name: Spread.of([part / CALLS for (part,) in values]) for name, values in samples.items()
    }
    return times, {name: Spread.of(values[-repeats:]) for name, values in host.items()}


def exchange_table(rows: list[ExchangeRow]) -> str:
    """Microseconds, GB/s and ratio by size; errors below."""
    header = (
        "MiB per rank", "moeops us", "p10..p90", "splits us", "equal us",
        "moeops GB/s", "splits GB/s", "equal GB/s", "ratio", "moeops host us", "splits host us",
    )  # fmt: skip
    lines, notes = [], []
    for row in rows:
        size = f"{row.num_bytes / MIB:g}"
        if row.times is None or row.host is None:
            lines.append([size, "FAILED", *[""] * (len(header) - 2)])
            notes.append(f"  FAILED {size} MiB: {row.error}")
            continue
        own = row.times[OURS]
        names = (OURS, *TORCH)
        lines.append(
            [
                size,
                f"{own.median:.1f}",
                f"{own.p10:.1f}..{own.p90:.1f}",
                *(f"{row.times[name].median:.1f}" for name in TORCH),
                *(f"{row.gbps(name):.1f}" for name in names),
                f"{row.ratio:.3f}",
                *(f"{row.host[name].median:.1f}" for name in names[:2]),
            ]
        )
    return "\n".join([table(header, lines), *notes])
