"""Times of collectives among the ranks of a group, and what is lost when experts run beside one. W ranks.

Every rank of the group calls everything here, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moeops.comm.gathering import blocking_all_gather, blocking_reduce_scatter
from moeops.profiling.clock import Clock
from moeops.profiling.work import ExpertRun, Record


def all_to_alls(clock: Clock, sizes: Iterable[int], group: Any, length: int) -> list[Record]:
    """All-to-alls of so many bytes in the buffer that a rank sends."""
    records = []
    for num_bytes in sizes:
        sent = torch.zeros(num_bytes // length * length, dtype=torch.uint8, device=clock.device)
        received = torch.empty_like(sent)
        exchange = partial(dist.all_to_all_single, received, sent, group=group)
        seconds = clock.seconds(exchange, together=True)
        records.append(
            {
                "op": "all_to_all_single",
                "ranks": length,
                "num_messages": length - 1,
                "num_bytes": sent.numel() // length * (length - 1),
                "seconds": seconds,
            }
        )
    return records


def all_reduces(clock: Clock, sizes: Iterable[int], group: Any, length: int) -> list[Record]:
    """All-reduces of tensors of so many bytes."""
    records = []
    for num_bytes in sizes:
        values = torch.zeros(num_bytes // 4, device=clock.device)
        seconds = clock.seconds(partial(dist.all_reduce, values, group=group), together=True)
        records.append(
            {
                "op": "all_reduce",
                "ranks": length,
                "num_messages": 2 * (length - 1),
                "num_bytes": 8 * values.numel() * (length - 1) // length,
                "seconds": seconds,
            }
        )
    return records


def gathers(clock: Clock, sizes: Iterable[int], group: Any, length: int) -> dict[str, list[Record]]:
    """All-gathers and reduce-scatters, with as many bytes from a rank as the all-to-alls have."""
    records: dict[str, list[Record]] = {"all_gather": [], "reduce_scatter": []}
    for num_bytes in sizes:
        part = torch.zeros(max(1, num_bytes // 4 // length), device=clock.device)
        whole = part.repeat(length)
        calls = {
            "all_gather": partial(blocking_all_gather, whole, part, group=group),
            "reduce_scatter": partial(blocking_reduce_scatter, part, whole, group=group),
        }
        for op, call in calls.items():
            records[op].append(
                {
                    "op": op,
                    "ranks": length,
                    "num_messages": length - 1,
                    "num_bytes": 4 * part.numel() * (length - 1),
                    "seconds": clock.seconds(call, together=True),
                }
            )
    return records


def overlap(clock: Clock, block: ExpertRun, num_bytes: int, group: Any) -> Record:
    """Experts alone, an exchange of so many bytes alone, and both at once."""
    size = clock.ranks.size
    sent = torch.zeros(num_bytes // size * size, dtype=torch.uint8, device=clock.device)
    received = torch.empty_like(sent)
    exchange = partial(dist.all_to_all_single, received, sent, group=group)

    def both() -> None:
        work = dist.all_to_all_single(received, sent, group=group, async_op=True)
        block.forward()
        work.wait()

    return {
        "num_bytes": sent.numel(),
        "rows": block.facts["rows"],
        "experts_seconds": clock.seconds(block.forward, together=True),
        "exchange_seconds": clock.seconds(exchange, together=True),
        "both_seconds": clock.seconds(both, together=True),
    }
