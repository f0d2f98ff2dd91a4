"""``python -m benchmarks.parallel_each --ranks 2``: ``benchmarks.parallel`` once per dispatcher and model, apart.

Each run has processes of its own and its own time limit, so that one that hangs or ends takes nothing with it, and its
own layer with all experts on one rank to compare with. A run that is late is killed with its ranks. Prints one table
with what there is, writes every run's JSON, and exits with 1 when a row failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bench_parallel import BY_PAIR, ONE_RANK
from benchmarks.report import MIB, table

LABELS = (BY_PAIR, "exact", "gather", "gather, 1.25 rows")
CONFIGS = ("qwen3_30b", "mixtral_8x7b")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parallel_each",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes, default 2")
    parser.add_argument("--labels", default=";".join(LABELS), help="list with ;")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="comma list of models")
    parser.add_argument("--seconds", type=float, default=90, help="for each run, default 90")
    parser.add_argument("--folder", type=Path, default=machine.ROOT / "runs" / "parallel_each")
    parser.add_argument("rest", nargs="*", help="behind --: arguments of benchmarks.parallel")
    return parser.parse_args(argv)


def run_ranks(command: list[str], seconds: float) -> str:
    """Run a command with all processes that it starts; "" or why it did not end well."""
    process = subprocess.Popen(command, start_new_session=True, cwd=machine.ROOT)
    try:
        code = process.wait(timeout=seconds)
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        # torchrun ends its ranks, which are in sessions of their own, before itself.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=45)
        return f"killed after {seconds:g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_one(args: argparse.Namespace, config: str, label: str) -> dict[str, Any]:
    """One model with one dispatcher: what it wrote, and why it did not end well in ``problems``."""
    path = args.folder / f"{config}_{label.replace(', ', '_').replace(' ', '_')}.json"
    path.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={args.ranks}"),
        *("--standalone", "-m", "benchmarks.parallel", "--only", "layers", "--configs", config),
        *("--labels", f"{ONE_RANK};{label}", "--seconds", str(args.seconds), "--json", str(path)),
        *args.rest,
    ]
    # The run ends by itself when its time is over; what cannot is killed.
    problem = run_ranks(command, args.seconds + 30)
    record = json.loads(path.read_text()) if path.exists() else {"layers": [], "problems": []}
    if problem and not record["problems"]:
        record["problems"] = [f"{config} {label}: {problem}"]
    return record


def summary(records: list[dict[str, Any]]) -> str:
    """Milliseconds, TFLOP/s per rank and throughput over one rank."""
    header = (
        "layer", "mode", "fwd ms", "f+b ms", "fwd TF/s", "f+b TF/s", "fwd x", "f+b x", "peak MB",
    )  # fmt: skip
    lines = []
    for record in records:
        for row in record["layers"]:
            label = f"{row['shape']} {row['label']}"
            if "total" not in row:
                lines.append([label, row["mode"], "FAILED", *[""] * (len(header) - 3)])
                continue
            forward, total = row["forward"]["median"], row["total"]["median"]
            numbers = [f"{forward / 1e3:.3f}", f"{total / 1e3:.3f}"]
            numbers += [f"{row[f'flops_{part}'] / time / 1e6:.4g}"
                        for part, time in (("forward", forward), ("total", total))]  # fmt: skip
            numbers += [
                f"{row[key]:.2f}" if key in row else "-"
                for key in ("speedup_forward", "speedup_total")
            ]
            peak = row.get("peak_bytes")
            numbers.append("-" if peak is None else f"{peak / MIB:.0f}")
            lines.append([label, row["mode"], *numbers])
    return table(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all; 1 when a row failed."""
    args = parse(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    records = []
    for config in args.configs.split(","):
        for label in args.labels.split(";"):
            records.append(run_one(args, config, label))
            print(summary(records[-1:]), flush=True)
    problems = [problem for record in records for problem in record["problems"]]
    print(f"\n{summary(records)}\nwritten to {args.folder}")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
