"""Join measurements of the gates into the table of docs/gates.md: ``python -m benchmarks.gates_table A.json B.json``.

The files are those that ``python -m benchmarks.run --only gates`` writes, one per machine, in the order of columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_gates import COMPILED, GROUP, SPECS, GateTimes, times
from benchmarks.runner import Row
from benchmarks.shapes import Shape
from benchmarks.timing import Spread


def main(paths: Sequence[str] | None = None) -> int:
    """Print the table; exit code 2 without files or without gates in one of them."""
    paths = sys.argv[1:] if paths is None else paths
    if not paths:
        print("gates_table: pass the JSON files of benchmarks.run --only gates", file=sys.stderr)
        return 2
    records = [json.loads(Path(path).read_text()) for path in paths]
    try:
        print(markdown(records))
    except LookupError as err:
        print(f"gates_table: {err.args[0]}", file=sys.stderr)
        return 2
    return 0


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Per machine: microseconds eager and compiled, and times ``topk_route`` without the router's product."""
    columns = []
    for record in records:
        result = next((r for r in record["results"] if r["group"] == GROUP and r["rows"]), None)
        if result is None:
            raise LookupError(f"no gates in the run of {record['machine']['date']}")
        columns.append((_name(record["machine"]), result["shape"], _times(result)))
    header = ["gate", "K"]
    for name, sizes, _ in columns:
        header += [
            f"us on {name}, T {sizes['T']}, E {sizes['E']}",
            "x topk_route",
            "compiled",
            "x topk_route",
        ]
    lines = [header, ["---"] * len(header)]
    names = list(dict.fromkeys(gate for _, _, found in columns for gate in found))
    for name in names:
        top_k = next(found[name].top_k for _, _, found in columns if name in found)
        label = f"`{SPECS[name].cls}`" if name in SPECS else name.partition("-")[0]
        cells = [label, str(top_k)]
        for _, _, found in columns:
            gate = found.get(name)
            cells += [_number(gate and getattr(gate, part), digits) for part, digits in _PARTS]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_PARTS = (("forward", 0), ("ratio", 1), ("compiled_forward", 0), ("compiled_ratio", 1))


def _name(machine: dict[str, Any]) -> str:
    return machine.get("gpu") or f"CPU ({machine['threads']} threads)"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(result: dict[str, Any]) -> dict[str, GateTimes]:
    sizes = result["shape"]
    shape = Shape(result["config"], sizes["T"], sizes["D"], sizes["H"], sizes["E"], sizes["K"])
    rows = []
    for saved in result["rows"]:
        row = Row(
            saved["key"], saved["label"], saved["ours"], saved["status"], saved.get("error", "")
        )
        for part in ("forward", "backward"):
            if part in saved:
                setattr(row, part, Spread(**saved[part]))
        rows.append(row)
    return {gate.name.removesuffix(COMPILED): gate for gate in times(shape, rows)}


if __name__ == "__main__":
    sys.exit(main())
