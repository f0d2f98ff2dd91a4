"""Time an op against others, on the device of its arguments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moeops.numba._ops import Op


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

    On CPU: the median time of a call. On CUDA: the host's time to launch it, with the queue kept short, the time
    between two events around it, and the op once more with Numba's own launch.

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
    functions: dict[str, Callable[..., Any]] = {op.name: op}
    if cuda and op.launch == "direct":
        functions[f"{op.name}, launch='numba'"] = _launched_by_numba(op)
    functions.update(others)
    rows = []
    with torch.no_grad():
        for name, function in functions.items():

            def call(function: Callable[..., Any] = function) -> None:
                function(*args, **kwargs)

            rows.append(_time_cuda(name, call, seconds) if cuda else _time_cpu(name, call, seconds))
    if show:
        print(table(rows))
    return rows


def _launched_by_numba(op: Op) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        op.launch = "numba"
        try:
            return op(*args, **kwargs)
        finally:
            op.launch = "direct"

    return call


def _time_cpu(name: str, call: Callable[[], None], seconds: float) -> Timing:
    call()  # compiles
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return Timing(name, median(times), None)


def _time_cuda(name: str, call: Callable[[], None], seconds: float) -> Timing:
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    host: list[float] = []
    device: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(host) < 20:
        begin = time.perf_counter()
        for _ in range(20):
            call()
        host.append(1e6 * (time.perf_counter() - begin) / 20)
        # Twenty calls wait behind a long kernel, so that the host's time does not show between the events.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda._sleep(4_000_000)
        events[0].record()
        for _ in range(20):
            call()
        events[1].record()
        events[1].synchronize()
        device.append(1e3 * events[0].elapsed_time(events[1]) / 20)
    return Timing(name, median(host), median(device))


def table(rows: list[Timing]) -> str:
    """The rows as text, each with its ratio to the last."""
    width = max(len(row.name) for row in rows)
    last = rows[-1].host if rows[-1].device is None else rows[-1].device
    lines = [f"{'':{width}}  {'host us':>9}  {'device us':>9}  ratio to last"]
    for row in rows:
        own = row.host if row.device is None else row.device
        device = "" if row.device is None else f"{row.device:9.1f}"
        lines.append(f"{row.name:{width}}  {row.host:9.1f}  {device:>9}  {own / last:.2f}")
    return "\n".join(lines)
