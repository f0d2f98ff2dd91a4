"""Draw the schedule of a layer on two links, predicted above measured: ``python scripts/site/timeline.py PICTURE.svg``.

Four processes on this machine, as two nodes of two ranks. Links have the speed that ``tests/timed_backend.py`` gives
them, and experts sleep, so that the picture shows the order of a region and not the machine. The step that is drawn is
the quickest of some, on the slowest rank.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "distributed")]
# Processes that are started look for modules there, too.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])

import torch
import torch.distributed as dist

from moeops.compile import timeline
from moeops.cost.pipeline import Task
from processes import launch, start_rank

DEGREES = (3, 3)
SAMPLES = 8


def record(rank: int, folder: str) -> None:
    """Measure some steps; the first rank writes down what its lanes did in the quickest one."""
    import two_link_timed_checks as checks

    start_rank(rank, 4, "gloo", folder, 60.0)
    hierarchy = checks.build_hierarchy(checks.start_group(), 2)
    expected = checks.Expected(checks.Exact)
    layer = checks.build(checks.Exact, hierarchy, DEGREES)
    best: tuple[float, dict] | None = None
    for _ in range(SAMPLES):
        seconds, tasks = one_step(checks, layer, hierarchy, expected)
        slowest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if best is None or slowest.item() < best[0]:
            best = slowest.item(), tasks
    assert best is not None
    if rank == 0:
        predicted = {way: predict(expected, way) for way in ("forward", "backward")}
        Path(folder, "tasks.json").write_text(json.dumps([predicted, best[1]]))
    dist.barrier()


def one_step(checks, layer, hierarchy, expected) -> tuple[float, dict[str, list[Task]]]:
    """Seconds of a step, and what this rank's lanes did since the first chunk was sent."""
    links = dict(zip(("inside", "between"), checks.links_of(hierarchy), strict=True))
    rows = {"inside": expected.inside_rows, "between": expected.between_rows}
    speeds = {"inside": checks.INSIDE, "between": checks.BETWEEN}
    x = torch.zeros(checks.TOKENS, checks.D)
    x[:, 0] = torch.arange(checks.TOKENS)
    x.requires_grad_()
    tasks: dict[str, list[Task]] = {}
    dist.barrier()
    begin = time.monotonic()
    y = None
    for way in ("forward", "backward"):
        for lane, link in links.items():
            link.set_link(checks.CALL, speeds[lane] / (rows[lane] * checks.ROW_BYTES))
        with checks.sleeping_experts(expected.num_rows) as slept:
            if y is None:
                y = layer(x)
            else:
                y.sum().backward()
        sent = []
        for lane, link in links.items():
            carried = link.sent[expected.num_before if way == "forward" else 0 :]
            names = names_of(expected, way, lane)
            for each, name in zip(carried, names, strict=True):
                sent.append(Task(lane, name, 0, each.started, each.ended))
        first = min(task.start for task in sent)
        tasks[way] = [
            task._replace(start=task.start - first, end=task.end - first)
            for task in (*sent, *slept)
        ]
    return time.monotonic() - begin, tasks


def predict(expected, way: str) -> list[Task]:
    """What the model says of a direction."""
    return expected.pipeline(way == "backward").timeline(DEGREES[way == "backward"])


def names_of(expected, way: str, lane: str) -> list[str]:
    """What a link carries, in order."""
    tasks = [task for task in predict(expected, way) if task.lane == lane]
    return [task.name for task in sorted(tasks, key=lambda task: task.start)]


def main() -> None:
    """Record and draw."""
    with tempfile.TemporaryDirectory() as folder:
        codes = launch(record, (folder,), 4, 300)
        assert not any(codes), codes
        predicted, measured = (
            {way: [Task(*task) for task in tasks] for way, tasks in ways.items()}
            for ways in json.loads(Path(folder, "tasks.json").read_text())
        )
    timeline(predicted, measured, path=sys.argv[1])


if __name__ == "__main__":
    main()
