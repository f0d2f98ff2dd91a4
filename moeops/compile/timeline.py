"""Pictures of a schedule: what each lane does when, as a cost model says and as a profiler saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from moeops.cost.pipeline import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("forward", "backward")
_NUM_COLOURS = 10  # in matplotlib's cycle
_OTHER = "lightgray"
_MARK = "moeops timeline: "
_LINKS = ("nccl", "gloo:", "c10d")  # what names of collectives begin with or hold, by backend


def measured_tasks(step: Callable[[], Tensor]) -> dict[str, list[Task]]:
    """Run a step under torch's profiler, and say what ran where: on CUDA by stream, on the CPU by thread.

    Args:
        step: a forward, compiled and warm; returns the loss, a scalar, whose backward is run. On several ranks all of
            them call this.

    Returns:
        By "forward" and "backward": tasks in seconds since either began. On CUDA they are kernels, and their lanes
        "stream 7" and so on; on the CPU they are ops that no other op has called, in the lane "host", and gloo's
        collectives, in the lane "links". ``chunk`` counts the tasks of a name.
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
    events = list(profiler.events())
    found = {}
    for way in WAYS:
        span = next(e.time_range for e in events if e.name == _MARK + way and _is_host(e))
        inside = [e for e in events if span.start <= e.time_range.start < span.end]
        found[way] = _tasks([e for e in inside if _lane(e, on_cuda)], span.start, on_cuda)
    return found


def _tasks(events: list[Any], begin: float, on_cuda: bool) -> list[Task]:
    counts: dict[str, int] = {}
    tasks = []
    for event in sorted(events, key=lambda e: e.time_range.start):
        count = counts.setdefault(event.name, 0)
        counts[event.name] += 1
        start, end = ((t - begin) * 1e-6 for t in (event.time_range.start, event.time_range.end))
        tasks.append(Task(str(_lane(event, on_cuda)), event.name, count, start, end))
    return tasks


def _is_host(event: Any) -> bool:
    return event.device_type == DeviceType.CPU


def _lane(event: Any, on_cuda: bool) -> str | None:
    """The lane of an event, ``None`` for one that is not drawn."""
    if event.name.startswith(_MARK):
        return None
    if not _is_host(event):
        return f"stream {event.device_resource_id}"
    if on_cuda:
        return None
    if any(part in event.name for part in _LINKS):
        return "links"
    parent = event.cpu_parent
    is_outermost = parent is None or parent.name.startswith(_MARK)
    return "host" if is_outermost else None


def timeline(
    predicted: Mapping[str, Sequence[Task]],
    measured: Mapping[str, Sequence[Task]] | None = None,
    *,
    path: str | Path | None = None,
) -> Figure:
    """Draw what lanes do when: forward and backward side by side, the prediction above what was measured.

    Args:
        predicted: by "forward" and "backward": ``Pipeline.timeline(degree)`` of either.
        measured: the same from ``measured_tasks``; ``None`` draws the prediction alone.
        path: a file to save the picture in, by its ending: PNG, SVG, PDF; ``None`` saves nothing.

    Returns:
        The figure: a row for each lane, a colour for each of the ten names that take the most time, milliseconds with
        the same scale for prediction and measurement of a way.

    Raises:
        ImportError: matplotlib is missing.  ValueError: there is another way than forward and backward, or none.

    Example::

        schedule = {"forward": forward.timeline(4), "backward": backward.timeline(4)}
        moeops.compile.timeline(schedule, moeops.compile.measured_tasks(step), path="timeline.png")
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
