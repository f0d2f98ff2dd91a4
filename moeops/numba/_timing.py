"""Time an op against others, on the device of its arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moeops.numba._ops import Op

_CALLS = 20  # per measurement on CUDA


@dataclass(frozen=True)
class Timing:
    """One row: microseconds per call on the host, and on the CUDA device (``None`` on CPU)."""

    name: str
    host: float
    device: float | None


def bench(
    op: Op,
    *args: Any,
    against: Mapping[str, Callable[..., Any]] | Callable[..., Any] | None = None,
    seconds: float = 0.5,
    show: bool = True,
    **kwargs: Any,
) -> list[Timing]:
    """Time an op and what it is to be compared with, and print a table.

    On CPU: the median time of a call. On CUDA: the host's time to launch it, with the queue kept short, and the time
    between two events around it.

    Args:
        op: made by one of the decorators.
        args: arguments of the call.
        against: other functions with the same arguments, by name or a single one, such as the native op.
        seconds: time spent on each row.
        show: print the table.
        kwargs: further arguments of the call, by name.

    Returns:
        The rows, the op first.

    Host sync: many.

    Example:
        >>> from moeops.numba.gates import naive_topk
        >>> rows = bench(naive_topk, torch.randn(64, 8), 2, against=moeops.topk_route, seconds=0.01, show=False)
        >>> [row.name for row in rows]
        ['moeops_numba::naive_topk', 'topk_route']
    """
    others = {} if against is None else against
    if not isinstance(others, Mapping):
        others = {getattr(others, "__name__", "against"): others}
    cuda = any(isinstance(v, Tensor) and v.is_cuda for v in (*args, *kwargs.values()))
    rows = []
    with torch.no_grad():
        functions: dict[str, Callable[..., Any]] = {op.name: op, **others}
        for name, function in functions.items():
            call = partial(function, *args, **kwargs)
            rows.append(Timing(name, *_time(call, cuda, seconds)))
    if show:
        width = max(len(row.name) for row in rows)
        print(f"{'':{width}}  {'host us':>9}  {'device us':>9}  ratio to last")
        last = rows[-1].device or rows[-1].host
        for row in rows:
            device = "" if row.device is None else f"{row.device:9.1f}"
            ratio = (row.device or row.host) / last
            print(f"{row.name:{width}}  {row.host:9.1f}  {device:>9}  {ratio:.2f}")
    return rows


def _time(call: Callable[[], Any], cuda: bool, seconds: float) -> tuple[float, float | None]:
    """Median microseconds of a call on the host, and on the device."""
    calls = _CALLS if cuda else 1
    for _ in range(10 if cuda else 2):
        call()  # the first one compiles
    host: list[float] = []
    device: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(host) < 3:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        host.append(1e6 * (time.perf_counter() - begin) / calls)
        if cuda:
            # The calls wait behind a long kernel, so that the host's time does not show between the events.
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            torch.cuda._sleep(4_000_000)
            events[0].record()
            for _ in range(calls):
                call()
            events[1].record()
            events[1].synchronize()
            device.append(1e3 * events[0].elapsed_time(events[1]) / calls)
    return median(host), median(device) if cuda else None
