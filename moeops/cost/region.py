"""The pipeline of a layer as its region runs it: in one order for the device and for who sends. Seconds; r chunks.

FSMoE's pipeline (``moeops.cost.pipeline``) begins every task as early as its lane allows. A region has one queue, in
which it begins to send, waits, and computes: see ``moeops.dispatch.region``. With one link both take the same time;
with two, whoever sends a chunk on over the second link waits for the first one, and what is queued behind waits too.
Only the standard library is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moeops.cost.pipeline import Case, Pipeline, Stage, Task

NOTHING = Stage(0.0, 0.0)


@dataclass(frozen=True)
class RegionPipeline(Pipeline):
    """The stages of a region in one direction; without stages inside a node, there is one link.

    Attributes:
        weight_gradients: the part of the experts' work that answers do not wait for: it runs behind that of all chunks,
            beside the exchange of the last answers.
        inside_first: chunks pass the links inside the node first, and last on their way back; otherwise the other way
            round.

    Example:
        >>> link, experts = Stage(0.0, 2.0), Stage(0.0, 4.0)
        >>> RegionPipeline(link, NOTHING, NOTHING, experts, weight_gradients=experts).seconds(1)
        10.0
    """

    weight_gradients: Stage = NOTHING
    inside_first: bool = False

    def seconds(self, degree: int) -> float:
        """Seconds from the first dispatch until answers and gradients are there."""
        return max(task.end for task in self.timeline(degree))

    def case(self, degree: int) -> Case:
        """FSMoE's case, which knows the experts' work as one."""
        return Pipeline.case(self.undivided(), degree)

    def undivided(self) -> RegionPipeline:
        """The same where answers wait for gradients of weights, too."""
        experts, weights = self.experts, self.weight_gradients
        whole = Stage(
            experts.call_seconds + weights.call_seconds, experts.work_seconds + weights.work_seconds
        )
        return replace(self, experts=whole, weight_gradients=NOTHING)

    def busy_seconds(self, degree: int) -> float:
        """Seconds of all lanes together, the all-reduce left out."""
        tasks = self.timeline(degree)
        return sum(task.end - task.start for task in tasks if task.name != "all_reduce")

    def window(self, degree: int) -> float:
        """Seconds of an all-reduce that the pipeline hides."""
        idle = replace(self, all_reduce_seconds=0.0).seconds(degree)
        # An all-reduce that takes as long as all the rest is what its lane waits for.
        return 2 * idle - replace(self, all_reduce_seconds=idle).seconds(degree)

    def timeline(self, degree: int) -> list[Task]:
        """What each lane does when, in the region's order."""
        return _Run(self, degree).tasks


class _Run:
    """A region's order, played; ``now`` is where its queue has come to."""

    def __init__(self, pipeline: RegionPipeline, degree: int) -> None:
        a2a, gather, scatter, experts = pipeline._times(degree)
        weights = pipeline.weight_gradients.seconds(degree)
        self.tasks: list[Task] = []
        self.now = 0.0
        self._free: dict[str, float] = {}
        between = ("between", "dispatch", a2a), ("between", "combine", a2a)
        inside = ("inside", "all_gather", gather), ("inside", "reduce_scatter", scatter)
        links = [between]
        if gather or scatter:
            links = [inside, between] if pipeline.inside_first else [between, inside]
        # Ends of what is under way, by chunk: the first link there, the second, and the same on the way back.
        there = [self._send(links[0][0], chunk, 0.0) for chunk in range(degree)]
        reduce = pipeline.all_reduce_seconds
        if reduce and links[0] is between:
            self._send(("between", "all_reduce", reduce), 0, 0.0)
        num_on = degree if len(links) == 1 else 0
        back: list[float] = []
        num_back = 0
        for chunk in range(degree):
            ahead = degree if pipeline.inside_first else min(chunk + 2, degree)
            while num_on < ahead:
                there[num_on] = self._send_on(links[1][0], num_on, there[num_on])
                num_on += 1
                if reduce and num_on == degree and links[1] is between:
                    self._send(("between", "all_reduce", reduce), 0, 0.0)
            self.now = max(self.now, there[chunk])
            self._compute("experts", chunk, experts)
            back.append(self._send(links[-1][1], chunk, self.now))
            while len(links) > 1 and num_back < chunk:
                self._send_on(links[0][1], num_back, back[num_back])
                num_back += 1
        # What goes back last travels beside gradients of weights; it is sent on before them if the short link is first.
        if len(links) > 1 and not pipeline.inside_first:
            self._send_on(links[0][1], degree - 1, back[-1])
        for chunk in range(degree):
            self._compute("weight_gradients", chunk, weights)
        if len(links) > 1 and pipeline.inside_first:
            self._send_on(links[0][1], degree - 1, back[-1])

    def _send(self, link: tuple[str, str, float], chunk: int, ready: float) -> float:
        """Begin on a lane as soon as that is free; return when it is over."""
        lane, name, seconds = link
        start = max(ready, self.now, self._free.get(lane, 0.0))
        self._free[lane] = start + seconds
        self.tasks.append(Task(lane, name, chunk, start, start + seconds))
        return start + seconds

    def _send_on(self, link: tuple[str, str, float], chunk: int, arrival: float) -> float:
        """Wait for what a lane has brought, and send it on over another one."""
        self.now = max(self.now, arrival)
        return self._send(link, chunk, self.now)

    def _compute(self, name: str, chunk: int, seconds: float) -> None:
        if name == "experts" or seconds:
            self.tasks.append(Task("device", name, chunk, self.now, self.now + seconds))
        self.now += seconds
