"""FSMoE's scheduler on paper: ``python -m benchmarks.fsmoe``; nothing is run but arithmetic, for some 15 s.

Four schedules of one transformer layer with experts, forward and backward with the all-reduce of its dense gradients,
over the grid of 1458 layers of Pan et al. 2025 (arXiv:2501.10714, section 6) on its two clusters, with the paper's own
constants. The paper does not say in all detail what it counts; each reading of it is a table of its own.

T tokens of a rank, K experts per token, D model width, H hidden width, L ranks per node.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import table
from moeops.cost.pipeline import (
    DEGREES,
    Pipeline,
    Stage,
    best_degree,
    best_degree_in_closed_form,
)

TOP_K = 2
POWERS = (1, 2, 4, 8)  # what FSMoE's public solver snaps degrees to
CLOSE = 1e-9  # of the seconds: equal but for rounding
PAPER = {  # mean speed-ups over Tutel, and layers whose two directions want different degrees
    "A": {"Tutel-Improved": 1.09, "no-IIO": 1.12, "FSMoE": 1.18},
    "B": {"Tutel-Improved": 1.08, "no-IIO": 1.16, "FSMoE": 1.22},
}
PAPER_DIFFERENT = 912


class Law(NamedTuple):
    """Milliseconds as the paper prints them: per call, and per element or multiply-add."""

    call: float
    unit: float

    def stage(self, units: float) -> Stage:
        """A stage of so many units in all, in seconds."""
        return Stage(self.call / 1e3, self.unit * units / 1e3)


@dataclass(frozen=True)
class Cluster:
    """One of the paper's clusters: nodes, ranks of each, sequence lengths of its grid, and fitted laws."""

    name: str
    num_nodes: int
    node_size: int
    lengths: tuple[int, ...]
    gemm: Law
    all_to_all: Law
    all_gather: Law
    reduce_scatter: Law
    all_reduce: Law


# The paper prints 2.32e-6 for A's all-gather: ten times its reduce-scatter, and ten times what its table of times says.
PRINTED_GATHER = Law(3.37e-1, 2.32e-6)
CLUSTERS = (
    Cluster(
        "A",
        6,
        8,
        (512, 1024, 2048),
        gemm=Law(4.26e-2, 2.29e-11),
        all_to_all=Law(2.87e-1, 2.21e-7),
        all_gather=Law(3.37e-1, 2.32e-7),
        reduce_scatter=Law(3.95e-1, 2.34e-7),
        all_reduce=Law(5.11e-1, 4.95e-6),
    ),
    Cluster(
        "B",
        8,
        4,
        (256, 512, 1024),
        gemm=Law(9.24e-2, 4.42e-11),
        all_to_all=Law(1.75e-1, 3.06e-7),
        all_gather=Law(3.20e-2, 1.68e-7),
        reduce_scatter=Law(3.91e-2, 1.67e-7),
        all_reduce=Law(8.37e-2, 5.99e-7),
    ),
)


class Shape(NamedTuple):
    """A layer of the grid. Heads are in its 1458 layers, but in no time of the model."""

    batch: int
    num_heads: int
    length: int
    d_model: int
    widening: int  # H / D
    factor: float  # of the capacity; 1 where nothing is dropped: loads are even
    num_projections: int


@dataclass(frozen=True)
class Reading:
    """What the paper leaves open.

    Attributes:
        own_rows: every rank of a node brings rows of its own, so that an expert sees those of all of them; else they
            bring the same, as tensor parallelism before the layer has it, each sends a share of them, and the gather
            brings them together.
        printed_gather: take the all-gather of cluster A as it is printed.
    """

    own_rows: bool = True
    printed_gather: bool = False

    def __str__(self) -> str:
        rows = (
            "rows of its own per rank" if self.own_rows else "the same rows on all ranks of a node"
        )
        return f"{rows}, {'all-gather of A as printed' if self.printed_gather else 'all-gather of A / 10'}"


READINGS = (Reading(), Reading(own_rows=False), Reading(printed_gather=True))


class Layer(NamedTuple):
    """A layer in seconds: both directions of its experts, of what is dense, and its gradients' all-reduce."""

    forward: Pipeline
    backward: Pipeline
    dense_forward: float
    dense_backward: float
    all_reduce: Stage  # of the whole gradient; a slice is a share of the work


def shapes(cluster: Cluster) -> Iterator[Shape]:
    """The grid: 3^6 x 2."""
    return (
        Shape(*sizes)
        for sizes in itertools.product(
            (1, 2, 4), (8, 16, 32), cluster.lengths, (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, 1.0), (2, 3)
        )
    )  # fmt: skip


def layer_of(cluster: Cluster, shape: Shape, reading: Reading) -> Layer:
    """Times by the paper's laws: sizes of messages in elements, of products in multiply-adds."""
    tokens, d_model = shape.batch * shape.length, shape.d_model
    local = cluster.node_size
    rows = TOP_K * shape.factor * tokens
    sent = rows if reading.own_rows else rows / local
    gathered = rows * (local if reading.own_rows else 1)
    gather = (
        PRINTED_GATHER if reading.printed_gather and cluster.name == "A" else cluster.all_gather
    )
    products = gathered * d_model * shape.widening * d_model / local  # of one projection's shard
    experts = cluster.gemm.stage(products).repeated(shape.num_projections)
    forward = Pipeline(
        cluster.all_to_all.stage(sent * d_model),
        gather.stage(sent * d_model),
        cluster.reduce_scatter.stage(sent * d_model),
        experts,
    )
    attention = (4 * tokens * d_model**2 + 2 * tokens * shape.length * d_model) / local
    dense = 5 * cluster.gemm.call / 1e3 + cluster.gemm.unit * attention / 1e3
    return Layer(
        forward,
        replace(forward, experts=experts.repeated(2)),
        dense,
        2 * dense,
        cluster.all_reduce.stage(4 * d_model**2 / local),
    )


def tutel(layer: Layer, degrees: Sequence[int]) -> float:
    """One degree for both directions, links in turns, gradients at the end."""
    both = min(
        layer.forward.shared_lane_seconds(r) + layer.backward.shared_lane_seconds(r)
        for r in degrees
    )
    return both + layer.dense_forward + layer.dense_backward + layer.all_reduce.seconds(1)


def tutel_improved(layer: Layer, degrees: Sequence[int]) -> float:
    """The same with the gradients behind the dense part's backward."""
    hidden = min(layer.all_reduce.seconds(1), layer.dense_backward)
    return tutel(layer, degrees) - hidden


def no_overlap_of_links(layer: Layer, degrees: Sequence[int]) -> float:
    """Two degrees, gradients in slices, links in turns."""
    forward = min(layer.forward.shared_lane_seconds(r) for r in degrees)
    return forward + layer.dense_forward + _backward(
        layer, degrees, Pipeline.shared_lane_seconds, Pipeline.shared_lane_window
    )  # fmt: skip


def fsmoe(layer: Layer, degrees: Sequence[int]) -> float:
    """Two degrees, gradients in slices, both links at once."""
    forward = best_degree(layer.forward, degrees).seconds
    return forward + layer.dense_forward + _backward(
        layer, degrees, Pipeline.seconds, Pipeline.window
    )  # fmt: skip


def three_lanes(layer: Layer, degrees: Sequence[int]) -> float:
    """Both links at once, and nothing else: one degree, gradients behind the dense part's backward."""
    both = min(layer.forward.seconds(r) + layer.backward.seconds(r) for r in degrees)
    exposed = max(layer.all_reduce.seconds(1), layer.dense_backward)
    return both + layer.dense_forward + exposed


SCHEDULES: dict[str, Callable[[Layer, Sequence[int]], float]] = {
    "Tutel": tutel,
    "Tutel-Improved": tutel_improved,
    "no-IIO": no_overlap_of_links,
    "FSMoE": fsmoe,
    "three lanes only": three_lanes,
}


def _backward(
    layer: Layer,
    degrees: Sequence[int],
    seconds: Callable[[Pipeline, int], float],
    window: Callable[[Pipeline, int], float],
) -> float:
    """Least seconds of a backward by its degree and by how much of the gradients goes beside the experts.

    The rest goes beside the dense part. Time is linear in the share between the points that are tried: nothing, all,
    what fills the window of the experts, and what leaves as much as the dense part hides.
    """
    law, dense = layer.all_reduce, layer.dense_backward
    least = float("inf")
    for degree in degrees:
        fits = _share(law, window(layer.backward, degree))
        for share in {0.0, 1.0, fits, 1 - _share(law, dense)}:
            beside = replace(layer.backward, all_reduce_seconds=_reduce_seconds(law, share))
            rest = _reduce_seconds(law, 1 - share)
            least = min(least, seconds(beside, degree) + max(dense, rest))
    return least


def _share(law: Stage, seconds: float) -> float:
    """The share of the gradients that is reduced in so many seconds."""
    return min(1.0, max(0.0, (seconds - law.call_seconds) / law.work_seconds))


def _reduce_seconds(law: Stage, share: float) -> float:
    """Of a slice; nothing is called for none."""
    return law.call_seconds + share * law.work_seconds if share else 0.0


class Result(NamedTuple):
    """What the grid on one cluster comes to.

    Attributes:
        num_layers: 1458.
        closed_form: pipelines, of two per layer, whose best degree in closed form takes what the best of all takes.
        cases: degrees of all pipelines at which FSMoE's four cases say what the schedule takes, a share.
        worst_case: the most that the cases fall short of it, a share of its seconds.
        different: layers whose forward and backward want different degrees.
        different_powers: the same among 1, 2, 4 and 8.
        speedups: mean over layers of Tutel's seconds over those of each schedule.
        slower: layers in which FSMoE's schedule takes longer than Tutel-Improved, and than no-IIO.
    """

    num_layers: int
    closed_form: int
    cases: float
    worst_case: float
    different: int
    different_powers: int
    speedups: dict[str, float]
    slower: dict[str, int]


def evaluate(cluster: Cluster, reading: Reading, every: int = 1) -> Result:
    """Compute one cluster's grid, or every so many of its layers."""
    grid = list(shapes(cluster))[::every]
    known: dict[Shape, dict[str, Any]] = {}
    rows = []
    for shape in grid:
        key = shape._replace(num_heads=0)
        if key not in known:
            known[key] = _evaluate_layer(layer_of(cluster, shape, reading))
        rows.append(known[key])
    seconds = [row["seconds"] for row in rows]
    return Result(
        len(rows),
        sum(row["closed_form"] for row in rows),
        statistics.fmean(row["cases"] for row in rows),
        max(row["worst_case"] for row in rows),
        sum(row["different"] for row in rows),
        sum(row["different_powers"] for row in rows),
        {
            name: statistics.fmean(each["Tutel"] / each[name] for each in seconds)
            for name in SCHEDULES
        },
        {
            name: sum(each["FSMoE"] > each[name] * (1 + CLOSE) for each in seconds)
            for name in ("Tutel-Improved", "no-IIO")
        },
    )


def _evaluate_layer(layer: Layer) -> dict[str, Any]:
    both = (layer.forward, layer.backward)
    best = [best_degree(pipeline) for pipeline in both]
    short = [
        1 - pipeline.case(degree).seconds / pipeline.seconds(degree)
        for pipeline in both
        for degree in DEGREES
    ]
    powers = [best_degree(pipeline, POWERS).degree for pipeline in both]
    return {
        "closed_form": sum(
            abs(best_degree_in_closed_form(pipeline).seconds - choice.seconds)
            <= CLOSE * choice.seconds
            for pipeline, choice in zip(both, best, strict=True)
        ),
        "cases": statistics.fmean(each <= CLOSE for each in short),
        "worst_case": max(short),
        "different": best[0].degree != best[1].degree,
        "different_powers": powers[0] != powers[1],
        "seconds": {name: schedule(layer, DEGREES) for name, schedule in SCHEDULES.items()},
    }


def markdown(results: dict[Reading, dict[str, Result]]) -> str:
    """A table per reading, the paper's numbers beside."""
    lines = []
    for reading, by_cluster in results.items():
        header = ["", *(f"{name}{what}" for name in by_cluster for what in ("", ", paper"))]
        columns = [_column(name, result) for name, result in by_cluster.items()]
        rows = [
            [label, *itertools.chain.from_iterable(column[label] for column in columns)]
            for label in columns[0]
        ]
        lines += [f"{reading}:", "", table(header, rows), ""]
    return "\n".join(lines)


def _column(name: str, result: Result) -> dict[str, tuple[str, str]]:
    """By row, what came out on a cluster and what the paper has."""
    cases = f"{result.cases:.2%}, short by {result.worst_case:.1%} at most"
    speedups = {
        f"{schedule}, mean speed-up over Tutel": (
            f"{speedup:.2f}",
            f"{PAPER[name][schedule]:.2f}" if schedule in PAPER[name] else "",
        )
        for schedule, speedup in result.speedups.items()
        if schedule != "Tutel"
    }
    return {
        "layers": (f"{result.num_layers}", "1458"),
        "best degree in closed form = best of 1 to 64, two directions each": (
            f"{result.closed_form} of {2 * result.num_layers}",
            "",
        ),
        "degrees at which the four cases give the schedule's time": (cases, "all"),
        "forward and backward want different degrees": (
            f"{result.different}",
            f"{PAPER_DIFFERENT}",
        ),
        "the same among 1, 2, 4, 8": (f"{result.different_powers}", ""),
        **speedups,
        "layers slower with FSMoE than with Tutel-Improved, no-IIO": (
            ", ".join(str(count) for count in result.slower.values()),
            "",
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fsmoe", description=__doc__)
    parser.add_argument(
        "--every", type=int, default=1, help="take every so many of the layers only"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args(arguments)
    if options.every < 1:
        parser.error(f"--every must be at least 1, got {options.every}")
    results = {
        reading: {c.name: evaluate(c, reading, options.every) for c in CLUSTERS}
        for reading in READINGS
    }
    print(markdown(results))
    if options.json is not None:
        record = {
            str(reading): {name: result._asdict() for name, result in by_cluster.items()}
            for reading, by_cluster in results.items()
        }
        options.json.write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
