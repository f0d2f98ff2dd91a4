"""Predictions beside measurements: ``python -m benchmarks.plan_check --profile FILE --measured FILE``.

The measured file is what ``torchrun --nproc-per-node=2 -m benchmarks.parallel`` writes. Every row of it is predicted
from the profile alone, forward and forward + backward, peak memory where it was measured, and the exchanges; the
relative errors, their median and the worst are printed and can be written as JSON. Exit code 1 when nothing could be
compared.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench_parallel import BY_PAIR, CAPACITY, ONE_RANK, PEER
from benchmarks.report import table
from benchmarks.shapes import SHAPES
from moeops.cost.model import CostModel
from moeops.planner.configuration import Choice, Configuration
from moeops.planner.memory import layer_memory
from moeops.planner.predict import predict


class Comparison(NamedTuple):
    """One number twice, in seconds or bytes."""

    kind: str  # forward, forward + backward, peak memory, exchange
    label: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative to what was measured; above 0 where the prediction is too high."""
        return self.predicted / self.measured - 1


# Rows that show what another choice would cost.
NOT_PREDICTED = (BY_PAIR, PEER, "gather, 1.25 rows")


def choice_of(label: str) -> tuple[bool, Choice]:
    """Whether a row of ``benchmarks.parallel`` has all experts on every rank, and the choice that it names."""
    found = re.fullmatch(r"(exact|gather|static)(?:, (\d+) chunks)?", label)
    if label != ONE_RANK and found is None:
        raise ValueError(f"plan_check: unknown row {label!r}.")
    return found is None, Choice("exact") if found is None else Choice(found[1], int(found[2] or 1))


def configuration_of(row: dict[str, Any], record: dict[str, Any], num_tokens: int) -> Configuration:
    """What the planner is asked for a row of ``benchmarks.parallel``."""
    shape = SHAPES[row["shape"]]
    alone, _ = choice_of(row["label"])
    ranks = 1 if alone else record["ranks"]
    return Configuration(
        world_size=ranks,
        node_size=ranks,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        d_model=shape.d_model,
        d_hidden=shape.d_hidden,
        num_tokens=num_tokens,
        dtype=record["dtype"],
        activation=shape.activation,
        capacity_factor=CAPACITY,
        mode=row["mode"],
    )


def compare_layers(model: CostModel, record: dict[str, Any]) -> tuple[list[Comparison], list[str]]:
    """Every layer that was measured; and what could not be predicted, with the reason."""
    found, skipped = [], []
    names = list(dict.fromkeys(row["shape"] for row in record["layers"]))
    tokens = dict(zip(names, record["tokens_per_rank"], strict=True))
    for row in record["layers"]:
        label = f"{row['shape']} {row['label']}, {row['mode']}"
        if "forward" not in row or "total" not in row:
            skipped.append(f"{label}: not measured: {row.get('error', '')}")
            continue
        if row["label"] in NOT_PREDICTED:
            skipped.append(f"{label}: the planner knows the defaults only")
            continue
        alone, choice = choice_of(row["label"])
        name = "local" if alone else choice.dispatcher
        if model.host_cost(row["mode"], name) is None:
            skipped.append(f"{label}: the profile has no host time of {row['mode']} {name} layers")
            continue
        config = configuration_of(row, record, tokens[row["shape"]])
        times = predict(model, config, choice)
        measured = {
            "forward": (row["forward"]["median"], times.forward.total),
            "forward + backward": (row["total"]["median"], times.total),
        }
        found += [
            Comparison(kind, label, 1e-6 * microseconds, seconds)
            for kind, (microseconds, seconds) in measured.items()
        ]
        if "peak_bytes" in row and row["mode"] == "eager":
            peak = layer_memory(config, choice).step_peak
            found.append(Comparison("peak memory", label, row["peak_bytes"], peak))
    return found, skipped


def compare_exchanges(model: CostModel, record: dict[str, Any]) -> list[Comparison]:
    """Torch's own exchange with splits: moeops' also waits for its host where little is sent."""
    return [
        Comparison(
            "exchange",
            f"{row['num_bytes'] / 2**20:g} MiB per rank",
            1e-6 * row["times"]["torch, splits"]["median"],
            model.all_to_all_seconds(row["num_bytes"], row["num_ranks"]),
        )
        for row in record["exchange"]
        if row["times"]
    ]


def summaries(comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Median and worst of the absolute relative errors, by kind."""
    result = {}
    for kind in dict.fromkeys(c.kind for c in comparisons):
        part = sorted((c for c in comparisons if c.kind == kind), key=lambda c: abs(c.error))
        errors = [abs(c.error) for c in part]
        middle = len(errors) // 2
        result[kind] = {
            "count": len(part),
            "median": (errors[middle] + errors[-1 - middle]) / 2,
            "worst": errors[-1],
            "worst_label": part[-1].label,
        }
    return result


def report(comparisons: Sequence[Comparison], skipped: Sequence[str]) -> str:
    """A row per number, then a line per kind."""
    lines = []
    for c in comparisons:
        scale, unit = (2**-20, "MiB") if c.kind == "peak memory" else (1e3, "ms")
        lines.append(
            [c.label, c.kind, f"{scale * c.measured:.3f}", f"{scale * c.predicted:.3f}", unit,
             f"{100 * c.error:+.1f} %"]
        )  # fmt: skip
    text = [table(("row", "what", "measured", "predicted", "", "error"), lines)]
    text += [
        f"{kind}: median error {100 * s['median']:.1f} %, worst {100 * s['worst']:.1f} % ({s['worst_label']}), of "
        f"{s['count']}"
        for kind, s in summaries(comparisons).items()
    ]
    return "\n".join([*text, *(f"SKIPPED {reason}" for reason in skipped)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--measured", type=Path, required=True, help="of benchmarks.parallel")
    parser.add_argument("--json", type=Path, help="write the comparison here too")
    args = parser.parse_args(argv)
    try:
        model = CostModel.load(args.profile)
        record = json.loads(args.measured.read_text())
        comparisons, skipped = compare_layers(model, record)
        comparisons = compare_exchanges(model, record) + comparisons
    except (OSError, ValueError, KeyError) as err:
        print(f"plan_check: {err}", file=sys.stderr)
        return 2
    if not comparisons:
        print("\n".join(["plan_check: nothing to compare", *skipped]), file=sys.stderr)
        return 1
    print(report(comparisons, skipped))
    if args.json is not None:
        rows = [{**c._asdict(), "error": c.error} for c in comparisons]
        text = json.dumps(
            {
                "profile": model.machine,
                "measured": record["machine"],
                "units": {"times": "seconds", "memory": "bytes"},
                "comparisons": rows,
                "summaries": summaries(comparisons),
                "skipped": skipped,
            },
            indent=1,
        )
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
