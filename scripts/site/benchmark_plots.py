"""Plots of the JSON that benchmarks write: ``python scripts/site/benchmark_plots.py RUN.json ... --out FOLDER``.

The site draws the recorded runs of ``docs/data``, which are those of ``docs/benchmarks.md``. Files of
``benchmarks.run`` (expert blocks and FastMoE's lane), ``benchmarks.parallel`` and ``benchmarks.whole_model`` are known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from pictures import LIMIT, OTHERS, OURS, new_figure, save, styled

Record = dict[str, Any]
BAR_AREA = 0.8  # of the space of a group of bars
LABELS = {"dense": "the same products, dense", "bmm": "equal groups, bmm", "moeops": "moeops"}


class Plot(NamedTuple):
    """A picture of one record.

    Attributes:
        name: file name without its ending.
        title: what it compares.
        draw: draws the record on axes.
        height: inches.
    """

    name: str
    title: str
    draw: Callable[[Axes, Record], None]
    height: float = 3.2


def plots_of(record: Record) -> list[Plot]:
    """What can be drawn of a record.

    Raises:
        ValueError: nothing can: the file is of another benchmark.
    """
    if "layers" in record:
        return [Plot("ranks", "Throughput of all GPUs over one GPU", _ranks)]
    if "results" not in record and "rows" in record:
        return [Plot("model", "Training a whole model, thousand tokens/s", _model, 2.8)]
    plots = []
    if _with_totals(record):
        plots.append(Plot("speed", "Expert block, forward + backward", _speed))
    if _decoding(record):
        plots.append(Plot("decode", "Expert block of qwen3_30b, inference of few tokens", _decode))
    if any(result["group"] == "lane" for result in record.get("results", ())):
        plots.append(Plot("lane", "Whole layer against FastMoE v1.1, times as fast", _lane))
    if not plots:
        raise ValueError(
            "benchmark_plots: a file must hold expert blocks, a lane, layers on ranks or whole models, got the keys "
            f"{sorted(record)}. Pass the JSON of benchmarks.run, benchmarks.parallel or benchmarks.whole_model."
        )
    return plots


def draw_all(path: Path, folder: Path) -> list[tuple[Plot, Path]]:
    """Draw one file's plots into ``folder``; returns them with the pictures' paths."""
    record = json.loads(path.read_text())
    drawn = []
    with styled():
        for plot in plots_of(record):
            figure = new_figure(7.2, plot.height)
            plot.draw(figure.add_subplot(), record)
            target = folder / f"{path.stem}_{plot.name}.svg"
            save(figure, target)
            drawn.append((plot, target))
    return drawn


def _bars(
    axes: Axes,
    groups: Sequence[str],
    series: dict[str, list[float | None]],
    colors: dict[str, str],
    digits: int = 0,
) -> None:
    """Groups of bars with their values on top; None is a bar that is not there."""
    width = BAR_AREA / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [g - BAR_AREA / 2 + (index + 0.5) * width for g in range(len(groups))]
        known = [(place, value) for place, value in zip(places, values, strict=True) if value]
        bars = axes.bar(
            [place for place, _ in known],
            [value for _, value in known],
            width * 0.94,
            color=colors[name],
            label=name,
        )
        axes.bar_label(bars, fmt=f"%.{digits}f", padding=1, fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    axes.figure.legend(loc="outside upper left", ncols=3, frameon=False)


def _colors(names: Sequence[str]) -> dict[str, str]:
    others = iter(OTHERS)
    fixed = {LABELS["dense"]: LIMIT, LABELS["moeops"]: OURS}
    return {name: fixed[name] if name in fixed else next(others) for name in names}


def _with_totals(record: Record) -> list[Record]:
    """Expert blocks with a forward and backward, and with a limit to compare with."""
    return [
        result
        for result in record.get("results", ())
        if result["group"] == "block"
        and any(row["key"] == "dense" and "total" in row for row in result["rows"])
    ]


def _speed(axes: Axes, record: Record) -> None:
    results = _with_totals(record)
    keys = dict.fromkeys(row["key"] for result in results for row in result["rows"])
    series: dict[str, list[float | None]] = {}
    for key in keys:
        values: list[float | None] = []
        for result in results:
            row = next((row for row in result["rows"] if row["key"] == key), {})
            time = row.get("total", {}).get("median")
            values.append(result["flops_total"] / time / 1e6 if time else None)
        label = next(
            row["label"] for result in results for row in result["rows"] if row["key"] == key
        )
        series[LABELS.get(key, label)] = values
    unit = "TFLOP/s"
    if max(value for values in series.values() for value in values if value) < 1:
        unit = "GFLOP/s"
        series = {
            name: [value and 1e3 * value for value in values] for name, values in series.items()
        }
    _bars(axes, [r["config"] for r in results], series, _colors(list(series)))
    axes.set_ylabel(unit)


def _decoding(record: Record) -> list[Record]:
    """Blocks of few tokens, of which inference alone is of interest, by number of tokens."""
    results = [
        result
        for result in record.get("results", ())
        if result["group"] == "block"
        and result["shape"]["T"] <= 512
        and "cuda" in record["command"]
        and any(row["key"] == "moeops" and "infer" in row for row in result["rows"])
    ]
    return sorted(results, key=lambda r: r["shape"]["T"]) if len(results) > 1 else []


def _decode(axes: Axes, record: Record) -> None:
    results = _decoding(record)
    keys = dict.fromkeys(row["key"] for result in results for row in result["rows"])
    series = {}
    for key in sorted(keys, key=lambda key: key != "moeops"):
        rows = [next((r for r in result["rows"] if r["key"] == key), {}) for result in results]
        label = next(row["label"] for row in rows if row)
        series[LABELS.get(key, label)] = [
            row["infer"]["median"] if "infer" in row else None for row in rows
        ]
    tokens = [str(result["shape"]["T"]) for result in results]
    _bars(axes, tokens, series, _colors(list(series)))
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds, less is better")


def _lane(axes: Axes, record: Record) -> None:
    results = [result for result in record["results"] if result["group"] == "lane"]
    groups, series = [], {"forward": [], "forward + backward": []}
    for result in results:
        peer = next(iter(result["recorded_elsewhere_ms"].values()), None)
        for row in result["rows"]:
            if not row["ours"] or peer is None:
                continue
            name = row["label"].removeprefix("FMoETransformerMLP, ").replace(", ", ",\n")
            groups.append(f"{name}\nE {result['shape']['E']}")
            for part, recorded, time in zip(
                series, peer, ("wall_forward", "wall_total"), strict=True
            ):
                series[part].append(1e3 * recorded / row[time]["median"])
    _bars(axes, groups, series, dict(zip(series, (OURS, OTHERS[0]), strict=True)), 1)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("FastMoE's time / moeops' time")


def _model(axes: Axes, record: Record) -> None:
    names = {
        "moeops": "moeops",
        "grouped_mm": "transformers, grouped_mm",
        "eager": "transformers, loop",
    }
    modes = {True: "compiled", False: "eager"}
    series = {
        names[experts]: [
            next(
                (
                    row["train_tokens_per_s"] / 1e3
                    for row in record["rows"]
                    if (row["experts"], row["compiled"]) == (experts, compiled)
                ),
                None,
            )
            for compiled in modes
        ]
        for experts in dict.fromkeys(row["experts"] for row in record["rows"])
        if experts in names
    }
    _bars(axes, list(modes.values()), series, _colors(list(series)), 1)
    axes.set_ylabel("thousand tokens/s")


def _ranks(axes: Axes, record: Record) -> None:
    rows = [row for row in record["layers"] if "speedup_total" in row]
    groups = dict.fromkeys(f"{row['shape']}, {row['mode']}" for row in rows)
    series = {
        label: [
            next(
                (
                    row["speedup_total"]
                    for row in rows
                    if (f"{row['shape']}, {row['mode']}", row["label"]) == (group, label)
                ),
                None,
            )
            for group in groups
        ]
        for label in dict.fromkeys(row["label"] for row in rows)
    }
    colors = dict(zip(series, (OTHERS[0], OTHERS[1], OURS, OTHERS[2], *OTHERS[3:]), strict=False))
    _bars(axes, list(groups), series, colors, 2)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set_ylabel("x one GPU, forward + backward")


def title(record: Record) -> str:
    """What was measured, and on what kind of machine."""
    if "layers" in record:
        subject = "Experts on several GPUs"
    elif "results" not in record:
        subject = "A whole model"
    elif any(result["group"] == "lane" for result in record["results"]):
        subject = "FastMoE's lane"
    else:
        subject = "The expert block"
    machine = record["machine"]
    return f"{subject}, {machine.get('gpu') or 'CPU'}"


def describe(record: Record) -> str:
    """One line: on what, with what, at which commit."""
    machine = record["machine"]
    parts = [
        f"{machine['gpus']} x {machine['gpu']}"
        if "gpus" in machine
        else machine.get("gpu") or machine["cpu"]
    ]
    parts += [
        f"{key} {machine[key]}"
        for key in ("torch", "transformers", "driver", "nccl")
        if machine.get(key)
    ]
    parts += [record["dtype"]] if "dtype" in record else []
    return ", ".join([*parts, f"commit {machine['commit']}"])


def main() -> int:
    """Draw the files that are named; 2 for one that cannot be drawn."""
    parser = argparse.ArgumentParser(
        prog="benchmark_plots.py", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of benchmarks")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder [%(default)s]")
    options = parser.parse_args()
    try:
        for path in options.files:
            for plot, picture in draw_all(path, options.out):
                print(f"{picture}: {plot.title}")
    except (OSError, ValueError) as err:
        print(f"benchmark_plots: {path}: {err}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
