"""Check, time and compare: ``python -m benchmarks.run [--device cpu|cuda] [--configs NAMES] [--only KINDS]``.

Prints one table per configuration as soon as it is measured and writes everything to JSON. Exit code 1 when a row of
moeops is wrong or failed; baselines may fail, their error stands in their row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bench_fastmoe_lane,
    bench_gates,
    bench_moe_mlp,
    bench_permute,
    bench_routing,
    bench_sorting,
    machine,
    report,
    shapes,
)
from benchmarks.inputs import ROUTINGS, make_block
from benchmarks.registry import known_keys
from benchmarks.runner import BrokenDevice, Options, Plan, Row, failed_ours, run_group
from benchmarks.timing import Timer, sync_counter_works

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
}
KINDS = ("stages", "block", "lane", "gates")
DEFAULT_KINDS = ("stages", "block", "lane")  # the gates take minutes to compile
# Group, how its inputs are made, which problem several groups may share.
STAGES = (
    (bench_routing.GROUP, bench_routing.make),
    (bench_sorting.GROUP, bench_sorting.make),
    (bench_permute.PERMUTE, bench_permute.make),
    (bench_permute.UNPERMUTE, bench_permute.make),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with their defaults filled in for the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--configs", help="comma list of configurations and lanes, or all")
    parser.add_argument("--only", help=f"comma list of {', '.join(KINDS)}; default: all but gates")
    parser.add_argument(
        "--peers", help=f"comma list of rows, from: {', '.join(sorted(known_keys()))}"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="default: bf16 on cuda, fp32 on cpu"
    )
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform", help="default: uniform")
    parser.add_argument("--repeats", type=int, default=30, help="samples per time, default 30")
    parser.add_argument(
        "--budget-seconds", type=float, default=1.5,
        help="per time and row; slow rows get fewer samples, at least 3 (default 1.5)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="default: runs/benchmark_<device>.json")
    parser.add_argument("--commit", help="recorded where the checkout has no git")
    args = parser.parse_args(argv)

    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = args.device.type
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none")
    if args.repeats < 3:
        parser.error(f"--repeats must be at least 3, got {args.repeats}")

    def choose(name: str, text: str | None, known: set[str]) -> tuple[str, ...] | None:
        if text in (None, "all"):
            return None
        chosen = tuple(part.strip() for part in text.split(",") if part.strip())
        unknown = sorted(set(chosen) - known)
        if unknown or not chosen:
            parser.error(f"--{name}: unknown {unknown}, choose from {sorted(known)}")
        return chosen

    every = KINDS if args.only == "all" else DEFAULT_KINDS
    args.only = choose("only", args.only, set(KINDS)) or every
    args.peers = (
        tuple(known_keys()) if args.peers == "all" else choose("peers", args.peers, known_keys())
    )
    known = set(shapes.SHAPES) | set(shapes.LANES) | set(shapes.GATES)
    names = choose("configs", args.configs, known)
    if names is None:
        blocks = shapes.CUDA_SHAPES if kind == "cuda" else shapes.CPU_SHAPES
        lanes = shapes.CUDA_LANES if kind == "cuda" else shapes.CPU_LANES
        gates = shapes.CUDA_GATES if kind == "cuda" else shapes.CPU_GATES
    else:
        blocks = tuple(shapes.SHAPES[name] for name in names if name in shapes.SHAPES)
        lanes = tuple(shapes.LANES[name] for name in names if name in shapes.LANES)
        gates = tuple(shapes.GATES[name] for name in names if name in shapes.GATES)
    args.blocks, args.lanes, args.gates = blocks, lanes, gates
    args.dtype = DTYPES[args.dtype or ("bf16" if kind == "cuda" else "fp32")]
    args.json = args.json or machine.ROOT / "runs" / f"benchmark_{kind}.json"
    return args


class Session:
    """One run: measures, prints, and keeps the JSON file up to date."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        on_cuda = args.device.type == "cuda"
        if on_cuda and args.device.index is not None:
            torch.cuda.set_device(args.device)
        counts = on_cuda and sync_counter_works(args.device)
        if on_cuda and not counts:
            say("host syncs are not counted: torch's sync debug mode missed the ones it was given")
        self.options = Options(
            args.device, args.peers, args.repeats, args.budget_seconds, say, count_syncs=counts
        )
        self.results: list[dict[str, Any]] = []
        self.bad: list[str] = []
        self.record = {
            "machine": machine.describe(args.device, args.commit),
            "dtype": str(args.dtype).removeprefix("torch."),
            "routing": args.routing,
            "command": ["python", "-m", "benchmarks.run", *sys.argv[1:]],
            "units": {"times": "microseconds", "memory": "bytes"},
            "results": self.results,
        }
        # The host queues a sample behind this work, as it runs ahead in a training loop: 12 passes are about 1.8 ms on
        # an H200, more than any row needs to queue. The lane's wall times show the host as well.
        self.block_timer = Timer(args.device, lead_passes=12 if on_cuda else 1)
        self.stage_timer = Timer(args.device, lead_passes=3 if on_cuda else 1)
        # A gate in eager mode queues tens of kernels, each with its share of autograd's bookkeeping.
        self.gate_timer = Timer(args.device, lead_passes=40 if on_cuda else 1)

    def run(self) -> None:
        """Everything that was asked for, quick things first."""
        say(" ".join(f"{k}={v}" for k, v in self.record["machine"].items() if v is not None))
        if "stages" in self.args.only:
            for shape in self.args.blocks:
                self._stages(shape)
        if "block" in self.args.only:
            for shape in self.args.blocks:
                self._block(shape)
        if "lane" in self.args.only:
            for shape in self.args.lanes:
                self._lane(shape)
        if "gates" in self.args.only:
            for shape in self.args.gates:
                self._gates(shape)

    def _stages(self, shape: shapes.Shape) -> None:
        begin = self._begin("stages", shape)
        for group, make in STAGES:
            rows = self._rows(group, shape, make, Plan(infer=False), self.stage_timer)
            if rows:
                self._keep(shape, group, rows, report.stage_table(group, rows))
        self._end(begin)

    def _block(self, shape: shapes.Shape) -> None:
        begin = self._begin("block", shape)
        rows = self._rows(
            bench_moe_mlp.GROUP, shape, make_block, Plan(memory=True), self.block_timer
        )
        if rows:
            self._keep(shape, bench_moe_mlp.GROUP, rows, report.block_table(shape, rows))
        self._end(begin)

    def _gates(self, shape: shapes.Shape) -> None:
        begin = self._begin("gates", shape)
        group = bench_gates.GROUP
        rows = self._rows(group, shape, bench_gates.make, Plan(infer=False), self.gate_timer)
        if rows:
            self._keep(shape, group, rows, report.gate_table(bench_gates.times(shape, rows)))
        self._end(begin)

    def _lane(self, shape: shapes.LaneShape) -> None:
        begin = self._begin("lane", shape)
        lane = bench_fastmoe_lane
        rows = self._rows(
            lane.GROUP, shape, lane.make, Plan(memory=True, wall=True), self.block_timer
        )
        # Their times hold for bfloat16 on an H200 and for nothing else.
        comparable = self.args.device.type == "cuda" and self.args.dtype == torch.bfloat16
        recorded = lane.FASTMOE_MS.get(shape.name, {}) if comparable else {}
        if rows:
            self._keep(shape, lane.GROUP, rows, report.lane_table(shape, rows, recorded))
            result = self.results[-1]
            result["recorded_elsewhere_ms"] = {name: list(ms) for name, ms in recorded.items()}
            for row, entry in zip(rows, result["rows"], strict=True):
                if row.ours:
                    speedups = {name: report.ratios(row, ms) for name, ms in recorded.items()}
                    entry["times_faster_fwd_total"] = {k: v for k, v in speedups.items() if v}
            self._write()
        self._end(begin)

    def _rows(self, group: str, shape: shapes.Shape, make, plan: Plan, timer: Timer) -> list[Row]:
        """Rows of one group; inputs that cannot be made fail the group and leave the rest of the run alone."""
        args = self.args
        try:
            problem = make(shape, args.device, args.dtype, args.routing)
        except Exception as err:
            text = f"{type(err).__name__}: {str(err).strip().partition(chr(10))[0]}"
            say(f"  FAILED {group}: inputs: {text}")
            self.bad.append(f"{shape.name}/{group}: {text}")
            self.results.append({"config": shape.name, "group": group, "error": text, "rows": []})
            self._write()
            return []
        return run_group(group, problem, plan, self.options, timer)

    def _keep(self, shape: shapes.Shape, group: str, rows: list[Row], text: str) -> None:
        """Print a table and add it to the record."""
        say(text)
        sizes = {
            "T": shape.num_tokens, "D": shape.d_model, "H": shape.d_hidden,
            "E": shape.num_experts, "K": shape.top_k, "activation": shape.activation,
        }  # fmt: skip
        result: dict[str, Any] = {"config": shape.name, "group": group, "shape": sizes}
        if group in (bench_moe_mlp.GROUP, bench_fastmoe_lane.GROUP):
            result |= {"flops_forward": shape.flops_forward, "flops_total": shape.flops_total}
        result["rows"] = [row.as_json() for row in rows]
        self.results.append(result)
        self.bad += [f"{shape.name}/{group}/{row.key}: {row.error}" for row in failed_ours(rows)]
        self._write()

    def _write(self) -> None:
        """The file is whole at any time, also when the run is stopped."""
        path = self.args.json
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + ".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(partial, path)

    def _begin(self, kind: str, shape: shapes.Shape) -> float:
        dtype = self.record["dtype"]
        say(f"\n== {kind} {shape} {dtype} {self.args.routing} on {self.args.device}")
        return time.perf_counter()

    def _end(self, begin: float) -> None:
        say(f"  ({time.perf_counter() - begin:.1f} s)")


def say(text: str) -> None:
    """Print at once: a run may be cut short."""
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 when a row of moeops is wrong or failed."""
    session = Session(parse(argv))
    try:
        session.run()
    except BrokenDevice as err:
        session.bad.append(f"the CUDA context broke, the run was stopped: {err}")
    except KeyboardInterrupt:
        session.bad.append("interrupted")
    session.record["problems"] = session.bad
    session._write()
    say(f"\nwritten to {session.args.json}")
    for problem in session.bad:
        say(f"PROBLEM {problem}")
    return 1 if session.bad else 0


if __name__ == "__main__":
    sys.exit(main())
