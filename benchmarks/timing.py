"""Clocks. CUDA: events on the current stream with a cold L2; CPU: perf_counter with cold caches."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from benchmarks.registry import Case

CPU_FLUSH_BYTES = 64 << 20
CUDA_FLUSH_BYTES = 512 << 20


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a sample, in microseconds."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Percentiles with linear interpolation."""
        ordered = sorted(values)

        def at(fraction: float) -> float:
            place = fraction * (len(ordered) - 1)
            low = int(place)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

        return cls(at(0.5), at(0.1), at(0.9), len(ordered))


@dataclass(frozen=True)
class Runner:
    """Parts that run one after the other and are timed one by one, and what restores the state before them."""

    parts: tuple[Callable[[], None], ...]
    reset: Callable[[], None]


def inference_runner(case: Case) -> Runner:
    """Forward without grad."""

    def forward() -> None:
        with torch.no_grad():
            case.forward()

    return Runner((forward,), lambda: None)


def training_runner(case: Case) -> Runner:
    """Forward with grad, then backward; the outputs live until the next reset."""
    outputs: list = []

    def forward() -> None:
        outputs[:] = case.forward()

    def backward() -> None:
        case.backward(outputs)

    def reset() -> None:
        outputs.clear()
        case.clear_grads()

    return Runner((forward, backward), reset)


class Timer:
    """Takes samples on one device."""

    def __init__(self, device: torch.device, *, lead_passes: int = 1):
        """``lead_passes``: writes of the flush buffer before a sample.

        One pass keeps an H200 busy for about 0.15 ms, in which the host queues the first kernels; work of a few
        microseconds needs more passes, or the launch latency is measured.
        """
        self.device = device
        self.lead_passes = lead_passes
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(CUDA_FLUSH_BYTES, 4 * cache)
        else:
            size = CPU_FLUSH_BYTES
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def flush(self) -> None:
        """Evict the caches by writing a buffer larger than the last of them."""
        for _ in range(self.lead_passes):
            self._buffer.fill_(1)

    def sample(self, runner: Runner) -> list[float]:
        """Microseconds of each part, once."""
        runner.reset()
        self.flush()
        if self.device.type != "cuda":
            marks = [time.perf_counter()]
            for part in runner.parts:
                part()
                marks.append(time.perf_counter())
            return [1e6 * (b - a) for a, b in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runner.parts) + 1)]
        events[0].record()
        for part, event in zip(runner.parts, events[1:], strict=True):
            part()
            event.record()
        events[-1].synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]

    def sample_wall(self, runner: Runner) -> list[float]:
        """Host microseconds of all parts together, device idle before and after, as a caller without overlap sees."""
        runner.reset()
        self.flush()
        synchronize(self.device)
        begin = time.perf_counter()
        for part in runner.parts:
            part()
        synchronize(self.device)
        return [1e6 * (time.perf_counter() - begin)]


def measure(
    runners: Mapping[str, Runner],
    sample: Callable[[Runner], list[float]],
    *,
    repeats: int,
    budget_seconds: float,
    min_repeats: int = 3,
) -> dict[str, list[list[float]]]:
    """Sample every runner in turn, a rotated order in each round, so that drift hits all alike.

    Each runner gets ``repeats`` samples, fewer where they would take longer than ``budget_seconds``, at least
    ``min_repeats``. One more sample before them warms up and sets that number. A runner that raises is reported as
    an empty list; the caller runs it again alone to learn why.
    """
    wanted: dict[str, int] = {}
    samples: dict[str, list[list[float]]] = {name: [] for name in runners}
    failed: set[str] = set()

    def take(name: str) -> list[float] | None:
        try:
            return sample(runners[name])
        except Exception as err:
            failed.add(name)
            warnings.warn(f"{name}: failed while it was timed: {err}", stacklevel=2)
            return None
        finally:
            runners[name].reset()

    for name in runners:
        begin = time.perf_counter()
        if take(name) is not None:
            # Host time of the sample, so that the flush and the launches count too.
            seconds = max(time.perf_counter() - begin, 1e-6)
            wanted[name] = max(min_repeats, min(repeats, int(budget_seconds / seconds)))
    names = [name for name in runners if name not in failed]
    for turn in range(max(wanted.values(), default=0)):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            if name not in failed and len(samples[name]) < wanted[name]:
                values = take(name)
                if values is not None:
                    samples[name].append(values)
    return {name: [] if name in failed else values for name, values in samples.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device; nothing to do on CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_memory(case: Case, device: torch.device) -> tuple[int, int] | None:
    """Bytes held between forward and backward, and the peak above the inputs, gradients included; None on CPU."""
    if device.type != "cuda" or not case.leaves:
        return None
    case.clear_grads()
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = list(case.forward())
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device) - base
    case.backward(outputs)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - base
    outputs.clear()
    case.clear_grads()
    return held, peak


def count_host_syncs(call: Callable[[], None], device: torch.device) -> int | None:
    """Synchronising CUDA calls that torch's sync debug mode sees in ``call``; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def sync_counter_works(device: torch.device) -> bool:
    """Whether the counter sees a copy to the host in a forward and another in a backward."""

    class ReadsBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x.sum().item()
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad.sum().item()
            return grad

    x = torch.ones(4, device=device, requires_grad=True)
    ones = torch.ones(4, device=device)
    seen = count_host_syncs(lambda: ReadsBack.apply(x).backward(ones), device)
    return seen is not None and seen >= 2
