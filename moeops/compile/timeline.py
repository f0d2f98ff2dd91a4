"""Pictures of a schedule: what each lane does when, as a cost model says and as a profiler saw."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from moeops.compile.walk import exchanging_dispatchers
from moeops.compile.windows import schedule_by
from moeops.cost.model import CostModel
from moeops.cost.pipeline import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("forward", "backward")
_NUM_COLOURS = 10  # in matplotlib's cycle
_OTHER = "lightgray"
_MARK = "moeops timeline: "
_LINKS = ("gloo:",)  # what names of collectives begin with while they are under way


def measured_tasks(
    step: Callable[[], Tensor], *, trace: str | Path | None = None
) -> dict[str, list[Task]]:
    """Run a step under torch's profiler, and say what ran where: on CUDA by stream, on the CPU by thread.

    Args:
        step: a forward, compiled and warm; returns the loss, a scalar, whose backward is run. On several ranks all of
            them call this.
        trace: a file to keep the profiler's trace in, ``.json`` or ``.json.gz``, for ``tasks_of_trace``; ``None`` keeps
            none. Ranks need files of their own.

    Returns:
        What ``tasks_of_trace`` says of the trace.
    """
    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        with record_function(_MARK + "forward"):
            loss = step()
            if on_cuda:
                torch.cuda.synchronize()
        with record_function(_MARK + "backward"):
            loss.backward()
            if on_cuda:
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json" if trace is None else Path(trace)
        profiler.export_chrome_trace(str(path))
        return tasks_of_trace(path)


def predicted_tasks(
    model: nn.Module, *, cost_model: CostModel | None = None, num_tokens: int | None = None
) -> dict[str, list[Task]]:
    """Say what each lane of a model's layers does when, by a cost model: what ``timeline`` draws above a measurement.

    Args:
        model: with one layer that exchanges rows, or several, which then follow each other, in the backward the last
            one first; what else the model does takes no time here.
        cost_model: to price all layers; ``None`` for those that have chosen their chunks.
        num_tokens: ``T`` of a rank, for this cost model; ``None`` for what the layers were told.

    Raises:
        ValueError: no layer exchanges rows, or no cost model knows one of them.
    """
    layers = exchanging_dispatchers(model)
    if not layers:
        raise ValueError(
            f"predicted_tasks: model must have a layer that exchanges rows, got none in {type(model).__name__}. Pass "
            "the module that holds the layers."
        )
    found: dict[str, list[Task]] = {}
    for way, order in (("forward", layers), ("backward", layers[::-1])):
        tasks, now = list[Task](), 0.0
        for name, dispatcher in order:
            schedule = schedule_by(dispatcher, cost_model, num_tokens)
            if schedule is None:
                raise ValueError(
                    f"predicted_tasks: cost_model must know every layer, got none that knows {name!r}. Pass "
                    "cost_model= and num_tokens=."
                )
            forward, backward = dispatcher.degrees
            pipeline, degree = schedule.forward, forward
            if way == "backward":
                pipeline, degree = schedule.backward_pipeline(backward, forward), backward
            own = pipeline.timeline(degree)
            tasks += [task._replace(start=task.start + now, end=task.end + now) for task in own]
            now += max(task.end for task in own)
        found[way] = tasks
    return found


def tasks_of_trace(path: str | Path) -> dict[str, list[Task]]:
    """Read what ran where from a trace that ``measured_tasks`` has kept, on this machine or another one.

    Args:
        path: the file, ``.json`` or ``.json.gz``.

    Returns:
        By "forward" and "backward": tasks in seconds since either began. With CUDA they are kernels and copies, and
        their lanes "stream 7" and so on; without, they are ops that no other op has called, in the lane "host", and
        gloo's collectives, in the lane "links". ``chunk`` counts the tasks of a name.

    Raises:
        ValueError: it is no trace of ``measured_tasks``.  OSError: it cannot be read.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        every = json.loads(text)["traceEvents"]
    except (ValueError, KeyError, TypeError, EOFError, gzip.BadGzipFile) as err:
        raise _no_trace(path, f"no JSON of a trace: {err}") from err
    events = [event for event in every if event.get("ph") == "X"]
    marks = {
        event["name"]: event
        for event in events
        if event.get("cat") in ("user_annotation", "cpu_op")
    }
    missing = [way for way in WAYS if _MARK + way not in marks]
    if missing:
        raise _no_trace(path, f"no mark of the {missing[0]} in {len(events)} events")
    found = {}
    for way in WAYS:
        mark = marks[_MARK + way]
        begin, end = mark["ts"], mark["ts"] + mark["dur"]
        inside = [event for event in events if begin <= event["ts"] < end]
        found[way] = _tasks(_device_lanes(inside) or _host_lanes(inside), begin)
    return found


def _no_trace(path: Path, what: str) -> ValueError:
    return ValueError(
        f"tasks_of_trace: path must be a trace that measured_tasks(step, trace=...) has kept, got {what} in {path}. "
        "Record one by it."
    )


def _tasks(by_lane: list[tuple[str, Mapping[str, Any]]], begin: float) -> list[Task]:
    counts: dict[str, int] = {}
    tasks = []
    for lane, event in sorted(by_lane, key=lambda pair: pair[1]["ts"]):
        name = event["name"]
        count = counts.setdefault(name, 0)
        counts[name] += 1
        start = 1e-6 * (event["ts"] - begin)
        tasks.append(Task(lane, name, count, start, start + 1e-6 * event["dur"]))
    return tasks


def _device_lanes(events: list[Any]) -> list[tuple[str, Any]]:
    """Kernels and copies by their streams; none without a GPU."""
    return [
        (f"stream {event['args']['stream']}", event)
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]


def _host_lanes(events: list[Any]) -> list[tuple[str, Any]]:
    """Collectives that are under way, and ops that no other op of their thread has called."""
    lanes, ends = [], dict[Any, float]()
    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        name = event["name"]
        if name.startswith(_LINKS):
            lanes.append(("links", event))
        elif (
            event.get("cat") == "cpu_op"
            and _is_op(name)
            and event["ts"] >= ends.get(event["tid"], 0.0)
        ):
            ends[event["tid"]] = event["ts"] + event["dur"]
            lanes.append(("host", event))
    return lanes


def _is_op(name: str) -> bool:
    """Not one of autograd's nodes and functions, which ops are called by."""
    return "::" in name and not name.startswith("autograd::")


def timeline(
    predicted: Mapping[str, Sequence[Task]],
    measured: Mapping[str, Sequence[Task]] | None = None,
    *,
    path: str | Path | None = None,
) -> Figure:
    """Draw what lanes do when: forward and backward side by side, the prediction above what was measured.

    Args:
        predicted: by "forward" and "backward": from ``predicted_tasks``, or ``Pipeline.timeline(degree)`` of either.
        measured: the same from ``measured_tasks``; ``None`` draws the prediction alone.
        path: a file to save the picture in, by its ending: PNG, SVG, PDF; ``None`` saves nothing.

    Returns:
        The figure: a row for each lane, a colour for each of the ten names that take the most time, milliseconds with
        the same scale for prediction and measurement of a way.

    Raises:
        ImportError: matplotlib is missing.  ValueError: there is another way than forward and backward, or none.

    Example::

        predicted = moeops.compile.predicted_tasks(model)
        moeops.compile.timeline(predicted, moeops.compile.measured_tasks(step), path="timeline.png")
    """
    sources = {"predicted": predicted, **({} if measured is None else {"measured": measured})}
    for name, tasks in sources.items():
        if not tasks or set(tasks) - set(WAYS):
            raise ValueError(
                f'timeline: {name} must have tasks by "forward" and "backward", got {sorted(tasks)}. Pass '
                '{"forward": pipeline.timeline(degree)}.'
            )
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as err:
        raise ImportError(
            "timeline: matplotlib must be installed, got none. Run pip install matplotlib, or moeops[examples]."
        ) from err
    ways = [way for way in WAYS if any(way in tasks for tasks in sources.values())]
    every = [task for tasks in sources.values() for way in tasks.values() for task in way]
    colours = _colours(every)
    lanes = [max(len(_lanes_of(tasks.get(way, ()))) for way in ways) for tasks in sources.values()]
    figure = Figure(figsize=(6 * len(ways), 1.2 + 0.5 * sum(lanes) + 0.6 * len(sources)))
    axes = figure.subplots(
        len(sources),
        len(ways),
        squeeze=False,
        sharex="col",
        height_ratios=[max(n, 1) for n in lanes],
    )
    for row, (source, tasks) in enumerate(sources.items()):
        for column, way in enumerate(ways):
            _draw(axes[row][column], tasks.get(way, ()), colours)
            axes[row][column].set_title(f"{way}, {source}", fontsize=9)
    for column in range(len(ways)):
        axes[-1][column].set_xlabel("ms")
    shown = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=shown, loc="outside lower center", ncols=4, fontsize=7)
    figure.set_layout_engine("constrained")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _colours(tasks: Sequence[Task]) -> dict[str, str]:
    """A colour for each of the names that take the most time, in the order in which they come."""
    seconds: dict[str, float] = {}
    for task in tasks:
        seconds[task.name] = seconds.get(task.name, 0.0) + task.end - task.start
    longest = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:_NUM_COLOURS]
    names = [name for name in seconds if name in longest]
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    return colours if len(seconds) == len(names) else {**colours, "others": _OTHER}


def _lanes_of(tasks: Sequence[Task]) -> list[str]:
    """Lanes in the order of their first tasks."""
    return list(dict.fromkeys(task.lane for task in sorted(tasks, key=lambda task: task.start)))


def _draw(axes: Any, tasks: Sequence[Task], colours: Mapping[str, str]) -> None:
    """A row for each lane, a bar for each task."""
    lanes = _lanes_of(tasks)
    for task in tasks:
        axes.barh(
            lanes.index(task.lane),
            1e3 * (task.end - task.start),
            left=1e3 * task.start,
            height=0.7,
            color=colours.get(task.name, _OTHER),
            edgecolor="white",
            linewidth=0.5,
        )
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
