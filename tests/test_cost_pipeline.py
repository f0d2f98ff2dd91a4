"""FSMoE's pipeline on paper: times by hand and by walking all waits, degrees by trial, the grid's schedules."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from dataclasses import replace

import pytest

from benchmarks import fsmoe
from moeops.cost.pipeline import (
    DEGREES,
    Pipeline,
    Stage,
    best_degree,
    best_degree_in_closed_form,
)


def fixed(a2a: float, gather: float, scatter: float, experts: float, reduce: float = 0.0):
    """A pipeline whose chunks take these seconds at every degree."""
    return Pipeline(*(Stage(s, 0.0) for s in (a2a, gather, scatter, experts)), reduce)


def random_pipelines(count: int) -> list[Pipeline]:
    """Stages with and without a time per call, from nothing to much longer than the others."""
    draw = random.Random(20)
    return [
        Pipeline(
            *(
                Stage(draw.choice([0.0, 1.0, 1.0]) * draw.expovariate(10), draw.expovariate(0.3))
                for _ in range(4)
            ),
            draw.choice([0.0, draw.expovariate(0.2)]),
        )
        for _ in range(count)
    ]


def walked(pipeline: Pipeline, degree: int, *, shared: bool) -> float:
    """Seconds by the waits of every task: for the one before it on its lane, and for its own chunk."""
    stages = {
        "dispatch": pipeline.all_to_all,
        "gather": pipeline.all_gather,
        "experts": pipeline.experts,
        "scatter": pipeline.reduce_scatter,
        "combine": pipeline.all_to_all,
    }
    cost = {
        name: stage.call_seconds + stage.work_seconds / degree for name, stage in stages.items()
    }
    cost["reduce"] = pipeline.all_reduce_seconds
    chunks = range(degree)
    device = [("experts", i) for i in chunks]
    if shared:
        there = [(name, i) for i in chunks for name in ("dispatch", "gather")]
        back = [(name, i) for i in chunks for name in ("scatter", "combine")]
        lanes = [[*there, ("reduce", 0), *back], device]
    else:
        between = [("dispatch", i) for i in chunks], [("combine", i) for i in chunks]
        inside = [(name, i) for name in ("gather", "scatter") for i in chunks]
        lanes = [[*between[0], ("reduce", 0), *between[1]], inside, device]
    before = {task: lane[i - 1] for lane in lanes for i, task in enumerate(lane) if i}
    order = list(stages)

    @functools.cache
    def end(task) -> float:
        name, chunk = task
        waits = [end(before[task])] if task in before else [0.0]
        if name in order[1:]:
            waits.append(end((order[order.index(name) - 1], chunk)))
        return max(waits) + cost[name]

    return max(end(task) for lane in lanes for task in lane)


@pytest.mark.parametrize(
    ("pipeline", "number", "seconds"),
    [
        (fixed(4, 1, 1, 2, reduce=5), 1, 2 * 3 * 4 + 5),
        (fixed(1, 2, 2, 2, reduce=20), 1, 2 * 3 * 1 + 20),
        (fixed(2, 1, 1, 9), 2, 2 * 2 + 1 + 1 + 3 * 9),
        (fixed(1, 2, 2, 9), 2, 2 * 1 + 2 + 2 + 3 * 9),
        (fixed(4, 1, 2, 3, reduce=3), 3, 2 * 3 * 4 + 1 + 2),
        (fixed(1, 3, 4, 2, reduce=3), 4, 2 * 1 + 3 * (3 + 4)),
    ],
)
def test_four_cases_by_hand(pipeline, number, seconds):
    assert pipeline.case(3) == (number, seconds)
    assert pipeline.seconds(3) == seconds


def test_the_case_is_short_where_a_path_changes_its_lane():
    # Three dispatches, the last all-gather, three reduce-scatters and the last combine. The case has six all-to-alls.
    pipeline = fixed(3, 1, 4, 0)
    assert pipeline.seconds(3) == 3 + 3 + 3 + 1 + 3 * 4 + 3 == walked(pipeline, 3, shared=False)
    assert pipeline.case(3) == (3, 2 * 3 * 3 + 1 + 4)


def test_seconds_are_those_of_every_task_after_what_it_waits_for():
    for pipeline in random_pipelines(200):
        for degree in (1, 2, 3, 7):
            expected = walked(pipeline, degree, shared=False)
            assert pipeline.seconds(degree) == pytest.approx(expected, rel=1e-12)
            assert pipeline.case(degree).seconds <= expected * (1 + 1e-12)
            shared = walked(pipeline, degree, shared=True)
            assert pipeline.shared_lane_seconds(degree) == pytest.approx(shared, rel=1e-12)
            tasks = pipeline.timeline(degree)
            assert max(task.end for task in tasks) == pytest.approx(expected, rel=1e-12)
            assert len(tasks) == 5 * degree + (pipeline.all_reduce_seconds > 0)
            for lane in ("between", "inside", "device"):
                mine = [task for task in tasks if task.lane == lane]
                assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


def test_symmetric_links_are_what_the_cases_are_for():
    for pipeline in random_pipelines(200):
        even = replace(pipeline, reduce_scatter=pipeline.all_gather)
        for degree in (1, 2, 5, 16):
            assert even.case(degree).seconds == pytest.approx(even.seconds(degree), rel=1e-12)


def test_a_window_is_the_longest_all_reduce_that_costs_nothing():
    for pipeline in random_pipelines(100):
        idle = replace(pipeline, all_reduce_seconds=0.0)
        for degree in (1, 4):
            for shared, window in (
                (False, pipeline.window(degree)),
                (True, pipeline.shared_lane_window(degree)),
            ):
                alone = walked(idle, degree, shared=shared)
                fits = replace(pipeline, all_reduce_seconds=max(window, 0.0))
                longer = replace(pipeline, all_reduce_seconds=max(window, 0.0) + 1)
                assert walked(fits, degree, shared=shared) == pytest.approx(alone, rel=1e-12)
                assert walked(longer, degree, shared=shared) == pytest.approx(alone + 1, rel=1e-12)


def test_the_closed_form_finds_the_best_of_all_degrees():
    found = set()
    for pipeline in random_pipelines(500):
        times = {degree: pipeline.seconds(degree) for degree in range(1, 41)}
        chosen = best_degree_in_closed_form(pipeline, limit=40)
        assert chosen.seconds == pytest.approx(min(times.values()), rel=1e-12)
        assert chosen.seconds == times[chosen.degree]
        found.add(chosen.degree)
    assert len(found) > 20  # ends, and much between them
    assert best_degree(fixed(1, 1, 1, 1)).degree == 1
    free = Pipeline(*(Stage(0.0, 1.0),) * 4)
    assert best_degree(free).degree == best_degree_in_closed_form(free).degree == DEGREES[-1]
    assert best_degree(free, (2, 4)).degree == 4


def test_degrees_and_times_that_cannot_be():
    pipeline = fixed(1, 1, 1, 1)
    with pytest.raises(ValueError, match="degree must be at least 1, got 0"):
        pipeline.seconds(0)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        best_degree_in_closed_form(pipeline, 0)
    with pytest.raises(ValueError, match="work_seconds must be finite and at least 0, got nan"):
        Stage(0.0, math.nan)
    with pytest.raises(
        ValueError, match="all_reduce_seconds must be finite and at least 0, got -1"
    ):
        replace(pipeline, all_reduce_seconds=-1.0)


def test_the_grid_has_the_papers_layers():
    for cluster in fsmoe.CLUSTERS:
        shapes = list(fsmoe.shapes(cluster))
        assert len(shapes) == len(set(shapes)) == 1458


def test_the_laws_give_the_papers_own_times_of_an_all_reduce():
    # 5.26 ms for the 3 D^2 parameters of GPT2-XL's attention on 8 ranks, 26.45 ms for Mixtral's with grouped heads.
    law = fsmoe.CLUSTERS[0].all_reduce
    assert law.stage(3 * 1600**2 / 8).seconds(1) * 1e3 == pytest.approx(5.26, abs=0.01)
    grouped = 2 * 4096**2 + 2 * 4096 * 1024
    assert law.stage(grouped / 8).seconds(1) * 1e3 == pytest.approx(26.45, abs=0.02)


@pytest.mark.parametrize("reading", fsmoe.READINGS, ids=str)
def test_schedules_by_trying_every_slice(reading):
    """No slice of a fine comb beats the few that are tried; each schedule is at least as fast as what it adds to."""
    for cluster in fsmoe.CLUSTERS:
        for shape in list(fsmoe.shapes(cluster))[::131]:
            layer = fsmoe.layer_of(cluster, shape, reading)
            degrees = (1, 2, 3, 6)
            for schedule, shared in ((fsmoe.fsmoe, False), (fsmoe.no_overlap_of_links, True)):
                comb = [
                    max(walked_backward(layer, degree, share / 50, shared), 0.0)
                    for degree in degrees
                    for share in range(51)
                ]
                forward = min(walked(layer.forward, degree, shared=shared) for degree in degrees)
                forward += layer.dense_forward
                got = schedule(layer, degrees)
                assert got <= (forward + min(comb)) * (1 + 1e-12)
                assert got >= forward + min(comb) - layer.all_reduce.work_seconds / 50
            times = [schedule(layer, degrees) for schedule in fsmoe.SCHEDULES.values()]
            assert times[0] >= times[1] >= times[2] * (1 - 1e-12) >= times[3] * (1 - 2e-12)


def walked_backward(layer, degree: int, share: float, shared: bool) -> float:
    law = layer.all_reduce
    parts = [
        law.call_seconds + part * law.work_seconds if part else 0.0 for part in (share, 1 - share)
    ]
    beside = replace(layer.backward, all_reduce_seconds=parts[0])
    return walked(beside, degree, shared=shared) + max(layer.dense_backward, parts[1])


def test_the_command_prints_a_table_and_writes_it(tmp_path, capsys):
    assert fsmoe.main(["--every", "500", "--json", str(tmp_path / "fsmoe.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("forward and backward want different degrees") == len(fsmoe.READINGS)
    record = json.loads((tmp_path / "fsmoe.json").read_text())
    for by_cluster in record.values():
        for result in by_cluster.values():
            assert result["num_layers"] == 3
            assert result["closed_form"] == 6
            assert result["speedups"]["Tutel"] == 1.0
    with pytest.raises(SystemExit):
        fsmoe.main(["--every", "0"])
