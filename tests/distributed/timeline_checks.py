"""Checks of what a profiler sees of ranks that exchange rows, run by every rank of a group."""

from __future__ import annotations

import pytest
from parallel_cases import uneven
from schedule_checks import integers, tokens_of

import moeops
from moeops.cost.model import CostModel
from moeops.distributed import Static
from processes import Ranks

DEGREES = (2, 3)


def check_a_profile_shows_exchanges_and_experts(ranks: Ranks) -> None:
    """As many of each as there are chunks, exchanges in a lane of their own; both pictures stand in one file."""
    record = Static(7, n_chunks=DEGREES)
    layer = integers(record, ranks)
    layer.gate.set_routing(uneven)
    layer.gate.requires_grad_(False)
    x = tokens_of(record, ranks)
    x[:, 0] = x[:, 0].abs()
    x.requires_grad_()
    trace = ranks.folder / f"trace{ranks.rank}.json.gz"
    measured = moeops.compile.measured_tasks(lambda: layer(x).square().sum(), trace=trace)
    assert measured == moeops.compile.tasks_of_trace(trace)
    for (way, tasks), degree in zip(measured.items(), DEGREES, strict=True):
        lanes = {"links": [t for t in tasks if t.lane == "links"]}
        lanes["host"] = [t for t in tasks if t.lane == "host"]
        assert len(lanes["links"]) == 2 * degree, (way, lanes["links"])
        assert all("all_to_all" in task.name for task in lanes["links"])
        if way == "forward":
            experts = [t for t in lanes["host"] if t.name == "moeops::moe_mlp"]
            assert len(experts) == degree
            assert lanes["links"][0].start < experts[0].start  # whose rows it brings
    figure = pytest.importorskip("matplotlib.figure", reason="needs the extra `examples`")
    model = CostModel.from_rates(
        products_per_second=1e9, link_bytes_per_second=1e9, memory_bytes_per_second=1e9,
        dtypes=("float64",),
    )  # fmt: skip
    predicted = moeops.compile.predicted_tasks(layer, cost_model=model)
    picture = moeops.compile.timeline(predicted, measured)
    assert isinstance(picture, figure.Figure)
    titles = [axes.get_title() for axes in picture.axes]
    assert titles == [
        f"{way}, {what}" for what in ("predicted", "measured") for way in ("forward", "backward")
    ]
