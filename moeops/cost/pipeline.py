"""FSMoE's pipeline of an expert-parallel layer on paper: its time for a degree, and the best degree. Seconds; r chunks.

An expert per node, cut among the ranks of the node. A chunk passes five stages: it is dispatched between nodes by an
all-to-all, gathered inside the node, computed, reduce-scattered inside the node, and combined by another all-to-all.
There are three lanes, links between nodes, links inside a node, and the device, which work at the same time, and each
of them does one thing at a time:

- between nodes: dispatch of all chunks, the gradients' all-reduce if there is one, combine of all chunks;
- inside a node: all-gather of all chunks, reduce-scatter of all chunks;
- device: experts on all chunks.

Source: Pan et al. 2025, arXiv:2501.10714, sections 4 and 5. The time of the schedule is computed here without cases, by
the longest path through it; FSMoE's four cases are ``Pipeline.case``. Only the standard library is imported here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

DEGREES = range(1, 65)


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline, which takes ``call_seconds + work_seconds / r`` for each of ``r`` chunks.

    Attributes:
        call_seconds: per chunk, whatever its size; at least 0.
        work_seconds: for the rows of all chunks; at least 0.
    """

    call_seconds: float
    work_seconds: float

    def __post_init__(self) -> None:
        for name in ("call_seconds", "work_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"Stage: {name} must be finite and at least 0, got {getattr(self, name)}. Pass seconds."
                )

    def seconds(self, degree: int) -> float:
        """Seconds for one of so many chunks."""
        return self.call_seconds + self.work_seconds / degree

    def repeated(self, times: float) -> Stage:
        """The stage with so many times its calls and its work."""
        return Stage(times * self.call_seconds, times * self.work_seconds)


class Case(NamedTuple):
    """What FSMoE's Algorithm 1 says of a degree.

    Attributes:
        number: 1, the all-reduce lasts longest; 2, the experts; 3, the all-to-alls; 4, the links inside a node.
        seconds: of the pipeline.
    """

    number: int
    seconds: float


class Task(NamedTuple):
    """One thing that a lane does, in seconds since the pipeline began.

    Attributes:
        lane: "between", "inside" or "device".
        name: "dispatch", "all_gather", "experts", "reduce_scatter", "combine" or "all_reduce".
        chunk: from 0; 0 for the all-reduce, which has none.
        start: seconds.
        end: seconds.
    """

    lane: str
    name: str
    chunk: int
    start: float
    end: float


class Choice(NamedTuple):
    """A degree and the seconds that the pipeline takes with it."""

    degree: int
    seconds: float


class _Times(NamedTuple):
    """Seconds of one chunk in each stage."""

    all_to_all: float
    all_gather: float
    reduce_scatter: float
    experts: float


class _Bound(NamedTuple):
    """Seconds of one path through the schedule by the degree r: ``fixed + per_chunk * r + shared / r``."""

    fixed: float
    per_chunk: float
    shared: float

    def seconds(self, degree: float) -> float:
        return self.fixed + self.per_chunk * degree + self.shared / degree


@dataclass(frozen=True)
class Pipeline:
    """The stages of a layer in one direction.

    Attributes:
        all_to_all: dispatch, and combine as well, which sends as much.
        all_gather: inside a node, after dispatch.
        reduce_scatter: inside a node, before combine.
        experts: on the device.
        all_reduce_seconds: of gradients of other layers, between nodes, behind the last dispatch; 0 for none.

    Example:
        >>> pipeline = Pipeline(Stage(0.1, 4.0), Stage(0.1, 2.0), Stage(0.1, 2.0), Stage(0.0, 12.0))
        >>> pipeline.seconds(1), pipeline.seconds(4), pipeline.case(4).number
        (24.4, 15.4, 2)
        >>> best_degree(pipeline).degree
        22
    """

    all_to_all: Stage
    all_gather: Stage
    reduce_scatter: Stage
    experts: Stage
    all_reduce_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.all_reduce_seconds < math.inf:
            raise ValueError(
                f"Pipeline: all_reduce_seconds must be finite and at least 0, got {self.all_reduce_seconds}. Pass 0 "
                "where nothing is reduced."
            )

    def seconds(self, degree: int) -> float:
        """Seconds from the first dispatch to the last combine, three lanes at once: the longest path.

        A path through the experts passes each stage of one chunk, and once more for every other chunk the stage at
        which the path waits for its lane. One past them passes from the last all-gather to the first reduce-scatter on
        the links inside the node, and one stays on the links between nodes.
        """
        a2a, gather, scatter, experts = self._times(degree)
        others = degree - 1
        ends = 2 * a2a + gather + scatter
        return max(
            ends + experts + others * max(a2a, gather, scatter, experts),
            ends + others * (max(a2a, gather) + max(a2a, scatter)),
            2 * degree * a2a + self.all_reduce_seconds,
        )

    def shared_lane_seconds(self, degree: int) -> float:
        """The same where links inside a node and between nodes take turns: one lane for both, and the device.

        A chunk's all-gather follows its dispatch, and its combine its reduce-scatter.
        """
        a2a, gather, scatter, experts = self._times(degree)
        there, back = a2a + gather, scatter + a2a
        return max(
            there + experts + back + (degree - 1) * max(there, experts, back),
            degree * (there + back) + self.all_reduce_seconds,
        )

    def window(self, degree: int) -> float:
        """Seconds of an all-reduce that the pipeline hides: its lane is idle between dispatch and combine."""
        idle = replace(self, all_reduce_seconds=0.0)
        return idle.seconds(degree) - 2 * degree * self.all_to_all.seconds(degree)

    def shared_lane_window(self, degree: int) -> float:
        """The same for ``shared_lane_seconds``."""
        a2a, gather, scatter, _ = self._times(degree)
        idle = replace(self, all_reduce_seconds=0.0)
        return idle.shared_lane_seconds(degree) - degree * (2 * a2a + gather + scatter)

    def case(self, degree: int) -> Case:
        """The case of FSMoE's Algorithm 1, and its time.

        Equal to ``seconds`` where all-gather and reduce-scatter are both shorter than the all-to-all, or both longer
        and equally long; elsewhere never above it, and below it where a path changes its lane twice.
        """
        a2a, gather, scatter, experts = self._times(degree)
        reduce, all_experts, inside = self.all_reduce_seconds, degree * experts, gather + scatter
        others = 2 * (degree - 1) * a2a
        if a2a > gather:
            expert_bound = all_experts > others
            window = all_experts - others + inside if expert_bound else inside
            other = 3
        else:
            expert_bound = all_experts > (degree - 1) * inside
            window = (inside + all_experts if expert_bound else degree * inside) - others
            other = 4
        if reduce > window:
            return Case(1, 2 * degree * a2a + reduce)
        if expert_bound:
            return Case(2, 2 * a2a + inside + all_experts)
        if other == 3:
            return Case(3, 2 * degree * a2a + inside)
        return Case(4, 2 * a2a + degree * inside)

    def timeline(self, degree: int) -> list[Task]:
        """What each lane does when, every task as early as its lane and what it waits for allow, by lane."""
        a2a, gather, scatter, experts = self._times(degree)
        chunks = range(degree)
        dispatch = _run("between", "dispatch", a2a, [0.0] * degree, 0.0)
        gathers = _run("inside", "all_gather", gather, [task.end for task in dispatch], 0.0)
        compute = _run("device", "experts", experts, [task.end for task in gathers], 0.0)
        ends = [task.end for task in compute]
        scatters = _run("inside", "reduce_scatter", scatter, ends, gathers[-1].end)
        free = dispatch[-1].end
        reduces = []
        if self.all_reduce_seconds:
            reduces = _run("between", "all_reduce", self.all_reduce_seconds, [0.0], free)
            free = reduces[-1].end
        ends = [scatters[chunk].end for chunk in chunks]
        combines = _run("between", "combine", a2a, ends, free)
        return [*dispatch, *reduces, *combines, *gathers, *scatters, *compute]

    def _times(self, degree: int) -> _Times:
        if degree < 1:
            raise ValueError(
                f"Pipeline: degree must be at least 1, got {degree}. Use 1 for no pipeline."
            )
        stages = (self.all_to_all, self.all_gather, self.reduce_scatter, self.experts)
        return _Times(*(stage.seconds(degree) for stage in stages))

    def _bounds(self) -> Iterator[_Bound]:
        """All paths that ``seconds`` takes the longest of, by degree; every one is convex in it."""
        a2a, gather, scatter, experts = (
            self.all_to_all, self.all_gather, self.reduce_scatter, self.experts,
        )  # fmt: skip
        ends = (a2a, a2a, gather, scatter)
        for stage in (a2a, gather, scatter, experts):
            yield _path((*ends, experts), (stage,))
        for waits in itertools.product((a2a, gather), (a2a, scatter)):
            yield _path(ends, waits)
        links = a2a.repeated(2)
        yield _Bound(links.work_seconds + self.all_reduce_seconds, links.call_seconds, 0.0)


def best_degree(pipeline: Pipeline, degrees: Iterable[int] = DEGREES) -> Choice:
    """The degree with the least time, by trying all; the first of those that are equal.

    Args:
        pipeline: in one direction; forward and backward have degrees of their own.
        degrees: to try, at least one.
    """
    return min((Choice(r, pipeline.seconds(r)) for r in degrees), key=lambda choice: choice.seconds)


def best_degree_in_closed_form(pipeline: Pipeline, limit: int = DEGREES[-1]) -> Choice:
    """The same for the degrees from 1 to ``limit``, without trying all.

    Every path has the time ``a + b r + c / r`` with ``c >= 0``, so the longest one is convex in ``r``: its least value
    is at 1, at ``limit``, at a path's own minimum ``sqrt(c / b)``, or where two paths take equal time, the roots of a
    quadratic. The best integer is next to that.

    Raises:
        ValueError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ValueError(
            f"best_degree_in_closed_form: limit must be at least 1, got {limit}. Pass the largest degree."
        )
    bounds = list(pipeline._bounds())
    points = [math.sqrt(bound.shared / bound.per_chunk) for bound in bounds if bound.per_chunk]
    for one, other in itertools.combinations(bounds, 2):
        points.extend(_crossings(one, other))
    near = {1, limit}
    for point in points:
        if 1 <= point <= limit:
            near.update((math.floor(point), math.ceil(point)))
    return best_degree(pipeline, sorted(near))


def _path(once: Iterable[Stage], waits: Iterable[Stage]) -> _Bound:
    """A path that passes ``once``, and ``waits`` for each of the other chunks."""
    fixed = per_chunk = shared = 0.0
    for stage in once:
        fixed += stage.call_seconds
        shared += stage.work_seconds
    for stage in waits:  # (r - 1) (call + work / r)
        fixed += stage.work_seconds - stage.call_seconds
        per_chunk += stage.call_seconds
        shared -= stage.work_seconds
    # A path waits at stages that it passes, so that only rounding can bring this below 0.
    return _Bound(fixed, per_chunk, max(shared, 0.0))


def _crossings(one: _Bound, other: _Bound) -> list[float]:
    """Degrees above 0 at which two paths take equal time."""
    a = one.per_chunk - other.per_chunk
    b = one.fixed - other.fixed
    c = one.shared - other.shared
    if a == 0:
        roots = [-c / b] if b else []
    else:
        square = b * b - 4 * a * c
        if square < 0:
            return []
        # The larger root first, so that nothing cancels in either.
        q = -(b + math.copysign(math.sqrt(square), b)) / 2
        roots = [q / a, c / q] if q else [0.0]
    return [root for root in roots if root > 0]


def _run(lane: str, name: str, seconds: float, ready: list[float], free: float) -> list[Task]:
    """A stage of all chunks, one after another on a lane that is free from then on."""
    tasks = []
    for chunk, when in enumerate(ready):
        start = max(free, when)
        free = start + seconds
        tasks.append(Task(lane, name, chunk, start, free))
    return tasks
