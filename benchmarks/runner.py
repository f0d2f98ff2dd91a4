"""Runs a group: builds every row, refuses wrong ones, times the rest in rotated order."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.registry import Case, Entry, WrongResult, entries
from benchmarks.timing import (
    Runner,
    Spread,
    Timer,
    count_host_syncs,
    inference_runner,
    measure,
    measure_memory,
    training_runner,
)


class BrokenDevice(Exception):
    """The CUDA context does not work any more; nothing measured after this would mean anything."""


@dataclass
class Row:
    """One line of a table; times in microseconds, memory in bytes."""

    key: str
    label: str
    ours: bool
    status: str = "ok"  # ok, wrong, failed
    error: str = ""
    errors: dict[str, float] = field(default_factory=dict)  # relative, by tensor
    infer: Spread | None = None
    forward: Spread | None = None
    backward: Spread | None = None
    total: Spread | None = None
    wall_forward: Spread | None = None
    wall_total: Spread | None = None
    activation_bytes: int | None = None
    peak_bytes: int | None = None
    host_syncs: int | None = None
    bytes_forward: int = 0
    bytes_backward: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values; what was not measured is left out."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "", {})}


@dataclass(frozen=True)
class Plan:
    """What to measure of each row."""

    infer: bool = True
    memory: bool = False
    wall: bool = False


@dataclass(frozen=True)
class Options:
    """How to measure."""

    device: torch.device
    peers: tuple[str, ...] | None
    repeats: int
    budget_seconds: float
    echo: Callable[[str], None]
    count_syncs: bool = True


def run_group(group: str, problem: Any, plan: Plan, options: Options, timer: Timer) -> list[Row]:
    """Every row of a group on one problem; a failing row is reported in its place."""
    rows: list[Row] = []
    cases: dict[str, Case] = {}
    for entry in entries(group, options.device.type, options.peers):
        row, case = _prepare(entry, problem, plan, options)
        rows.append(row)
        if case is not None:
            cases[entry.key] = case
        state = ", ".join(f"{k} {v:.1e}" for k, v in row.errors.items()) if case else row.error
        options.echo(f"  {row.status:6} {group}/{row.key}: {state}")
    by_key = {row.key: row for row in rows}
    # The references are as large as the weights' gradients in float32, and are not needed any more.
    if hasattr(problem, "expected"):
        problem.expected = {}
    _release(options.device)
    _time_all(by_key, cases, plan, options, timer)
    for case in cases.values():
        case.clear_grads()
    return rows


def _prepare(entry: Entry, problem: Any, plan: Plan, options: Options) -> tuple[Row, Case | None]:
    """Build, verify and take what is not a time."""
    row = Row(entry.key, entry.label, entry.ours)
    case = None
    try:
        case = entry.build(problem)
        row.errors = case.verify()
        row.bytes_forward, row.bytes_backward = case.bytes_forward, case.bytes_backward
        if plan.memory:
            memory = measure_memory(case, options.device)
            if memory is not None:
                row.activation_bytes, row.peak_bytes = memory
        if options.count_syncs:
            row.host_syncs = count_host_syncs(lambda: _once(case), options.device)
    except Exception as err:
        row.status = "wrong" if isinstance(err, WrongResult) else "failed"
        row.error = _short(err)
        # The traceback holds every tensor of the failed call.
        err.__traceback__ = None
        if case is not None:
            case.clear_grads()
        case = None
    _release(options.device)
    if row.status != "ok":
        _check_device(options.device, f"{entry.key}: {row.error}")
    return row, case


def _once(case: Case) -> None:
    outputs = case.forward()
    if case.leaves:
        case.backward(outputs)
        case.clear_grads()


def _time_all(
    rows: dict[str, Row], cases: dict[str, Case], plan: Plan, options: Options, timer: Timer
) -> None:
    """Fill in the times of every case."""
    limits = {"repeats": options.repeats, "budget_seconds": options.budget_seconds}

    def take(runners: dict[str, Runner], sample) -> dict[str, list[list[float]]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            samples = measure(runners, sample, **limits)
        for key in [key for key, values in samples.items() if not values]:
            reasons = [str(w.message) for w in caught if str(w.message).startswith(f"{key}: ")]
            rows[key].status, rows[key].error = "failed", "; ".join(reasons)[:300]
            cases.pop(key)
            _check_device(options.device, rows[key].error)
        return {key: values for key, values in samples.items() if values}

    if plan.infer:
        samples = take({key: inference_runner(case) for key, case in cases.items()}, timer.sample)
        for key, values in samples.items():
            rows[key].infer = Spread.of([v[0] for v in values])
    trained = {key: training_runner(case) for key, case in cases.items() if case.leaves}
    runners = dict(trained)
    if not plan.infer:
        # Rows without a backward belong into the same rotation.
        runners = {key: trained.get(key) or inference_runner(case) for key, case in cases.items()}
    for key, values in take(runners, timer.sample).items():
        rows[key].forward = Spread.of([v[0] for v in values])
        if key in trained:
            rows[key].backward = Spread.of([v[1] for v in values])
            rows[key].total = Spread.of([v[0] + v[1] for v in values])
    if plan.wall:
        trained = {key: runner for key, runner in trained.items() if key in cases}
        for key, values in take(trained, timer.sample_wall).items():
            rows[key].wall_total = Spread.of([v[0] for v in values])
        first = {k: Runner(runner.parts[:1], runner.reset) for k, runner in trained.items()}
        first = {key: runner for key, runner in first.items() if key in cases}
        for key, values in take(first, timer.sample_wall).items():
            rows[key].wall_forward = Spread.of([v[0] for v in values])


def failed_ours(rows: Iterable[Row]) -> list[Row]:
    """Rows of this library that are wrong or failed."""
    return [row for row in rows if row.ours and row.status != "ok"]


def _short(err: Exception) -> str:
    """Type and first line of an error."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if isinstance(err, WrongResult) else f"{type(err).__name__}: {text}"[:300]


def _release(device: torch.device) -> None:
    """Give memory back between rows, so that one row's fragments are not another's peak."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _check_device(device: torch.device, error: str) -> None:
    """Raise BrokenDevice where a failed row took the CUDA context with it."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError as err:
        raise BrokenDevice(error) from err
