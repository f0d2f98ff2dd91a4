"""Layers on 1, 2, 4 ranks beside the planner: ``python -m benchmarks.scaling --profile FILE --measured FILE FILE``.

The measured files are of ``benchmarks.parallel`` on different numbers of ranks of one machine, the profile is what
``python -m moeops profile`` wrote there. Two tables: every row's forward + backward, measured and predicted, with the
throughput over one rank; and for each model and number of ranks which dispatcher was the fastest, which one the planner
recommends, and which one ``Auto(equal_tokens=True)`` takes. Where the profile has no host time of compiled layers their
prediction is the device's time alone. Exit code 1 when nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_parallel import BY_PAIR, ONE_RANK
from benchmarks.plan_check import NOT_PREDICTED, choice_of, configuration_of
from benchmarks.report import table
from benchmarks.shapes import SHAPES
from moeops.comm.groups import RankGroup
from moeops.cost.model import CostModel
from moeops.dispatch.base import ExpertRanks
from moeops.distributed import Auto
from moeops.planner.predict import choices, predict, recommend


class Point(NamedTuple):
    """A row of ``benchmarks.parallel``; milliseconds of forward + backward.

    Attributes:
        ranks: 1 for the layer with all experts on one rank.
        predicted: ``None`` where the profile knows nothing of it.
        speedup: throughput of all ranks over one rank's in the same file.
    """

    shape: str
    mode: str
    label: str
    ranks: int
    forward: float
    total: float
    predicted: float | None
    speedup: float | None


def points(model: CostModel, record: dict[str, Any]) -> Iterator[Point]:
    """What was measured, each with its prediction."""
    names = list(dict.fromkeys(row["shape"] for row in record["layers"]))
    tokens = dict(zip(names, record["tokens_per_rank"], strict=True))
    for row in record["layers"]:
        if "total" not in row:
            continue
        alone = row["label"] == ONE_RANK
        yield Point(
            row["shape"],
            row["mode"],
            row["label"],
            1 if alone else record["ranks"],
            row["forward"]["median"] / 1e3,
            row["total"]["median"] / 1e3,
            _predicted(model, row, record, tokens[row["shape"]]),
            row.get("speedup_total"),
        )


def _predicted(
    model: CostModel, row: dict[str, Any], record: dict[str, Any], num_tokens: int
) -> float | None:
    if row["label"] in NOT_PREDICTED:
        return None
    _, choice = choice_of(row["label"])
    return 1e3 * predict(model, configuration_of(row, record, num_tokens), choice).total


def curve(found: Sequence[Point]) -> str:
    """A line per model, mode and dispatcher, columns by number of ranks."""
    sizes = sorted({point.ranks for point in found})
    header = ["layer", "mode"]
    for size in sizes[1:]:
        header += [f"{size} ranks ms", "predicted", "x"]
    lines = []
    for shape, mode in dict.fromkeys((point.shape, point.mode) for point in found):
        own = [point for point in found if (point.shape, point.mode) == (shape, mode)]
        for label in dict.fromkeys(point.label for point in own if point.ranks > 1):
            line = [f"{shape} {label}", mode]
            for size in sizes[1:]:
                cell = next((p for p in own if (p.label, p.ranks) == (label, size)), None)
                line += ["-", "-", "-"] if cell is None else _cells(cell)
            lines.append(line)
        alone = [point for point in own if point.ranks == 1]
        for point in alone:
            lines.append(
                [f"{shape} {ONE_RANK}", mode, *_cells(point)[:2], *[""] * (len(header) - 4)]
            )
    return table(header, lines)


def _cells(point: Point) -> list[str]:
    predicted = "-" if point.predicted is None else f"{point.predicted:.3f}"
    speedup = "-" if point.speedup is None else f"{point.speedup:.2f}"
    return [f"{point.total:.3f}", predicted, speedup]


def picks(model: CostModel, record: dict[str, Any]) -> list[list[str]]:
    """Per model and mode: the fastest dispatcher of those measured, the planner's, and ``Auto``'s."""
    names = list(dict.fromkeys(row["shape"] for row in record["layers"]))
    tokens = dict(zip(names, record["tokens_per_rank"], strict=True))
    size, lines = record["ranks"], []
    own = [
        row
        for row in record["layers"]
        if "total" in row and row["label"] not in (ONE_RANK, BY_PAIR)
    ]
    for shape, mode in dict.fromkeys((row["shape"], row["mode"]) for row in own):
        rows = [row for row in own if (row["shape"], row["mode"]) == (shape, mode)]
        fastest = min(rows, key=lambda row: row["total"]["median"])
        predictable = next((row for row in rows if row["label"] not in NOT_PREDICTED), None)
        planned = "-"
        if predictable is not None:
            config = configuration_of(predictable, record, tokens[shape])
            planned = str(
                recommend(config, [predict(model, config, c) for c in choices(config)])[0].choice
            )
        sizes = SHAPES[shape]
        group = RankGroup("0", size, 0)
        ranks = ExpertRanks("FMoE", sizes.num_experts // size, group, top_k=sizes.top_k)
        chosen, why = Auto(equal_tokens=True).choose(ranks)
        lines.append(
            [f"{shape}, {size} ranks", mode, fastest["label"], f"{fastest['total']['median'] / 1e3:.3f}", planned,
             f"{type(chosen).__name__.lower()}: {why}"]
        )  # fmt: skip
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables; 2 for files that do not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument(
        "--measured", type=Path, nargs="+", required=True, help="of benchmarks.parallel"
    )
    args = parser.parse_args(argv)
    try:
        model = CostModel.load(args.profile)
        records = [json.loads(path.read_text()) for path in args.measured]
        found = [point for record in records for point in points(model, record)]
        chosen = [line for record in records for line in picks(model, record)]
    except (OSError, ValueError, KeyError) as err:
        print(f"scaling: {err}", file=sys.stderr)
        return 2
    if not found:
        print("scaling: nothing was measured", file=sys.stderr)
        return 1
    print(curve(found))
    header = ("layer", "mode", "fastest", "ms", "planner", "auto")
    print(f"\n{table(header, chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
