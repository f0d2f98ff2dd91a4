"""FastMoE's experiments on this machine, beside its own numbers: ``python -m benchmarks.fastmoe [--device cpu|cuda]``.

He et al. 2021, arXiv:2103.13262: one layer on one GPU with more and more experts (figure 5), four experts on each of
several GPUs (figure 6), and a GPT of 12 layers with 96 experts against a dense one (figure 7). The lanes are run by
what the project has for them: ``benchmarks.run``'s lane, ``benchmarks.parallel`` and ``examples/train_lm.py``. On a CPU
all sizes are tiny, and prove that the code works. Exit code 1 when a row failed.

T tokens of a rank, D model width, H hidden width of an expert, E experts, K experts per token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import bench_fastmoe_lane, machine, shapes
from benchmarks.report import table
from benchmarks.runner import Options, Plan, Row, run_group
from benchmarks.timing import Timer

LANES = ("single", "scaling", "gpt")
EXPERTS = {"cuda": (1, 2, 4, 8, 16, 32, 64), "cpu": (1, 2, 4)}
PEERS = {
    "cuda": ("loop", "moeops", "moeops-compiled", "moeops-graphed", "dense"),
    "cpu": ("loop", "moeops"),
}
LABELS = ("one rank", "exact", "gather")
# train_lm's options: FastMoE's layers, experts and K, no balance loss, H half of a dense MLP's; the rest is smaller.
GPT = {
    "cuda": ("--layers 12 --experts 96 --top-k 2 --d-model 512 --d-hidden 1024 --heads 8 --context 512 --batch 16 "
             "--lr 1e-3 --steps 2000 --eval-every 100"),
    "cpu": "--quick --eager --experts 4 --top-k 2 --steps 20 --eval-every 10",
}  # fmt: skip
PAPER = {
    "single": "FastMoE, figure 5: V100 PCIe, T 4096, D 1024, H 4096, K 2; the forward of a PyTorch loop grows with E, "
    "FastMoE's stays flat. The paper prints bars, no numbers.",
    "scaling": "FastMoE, figure 6: a V100 per node, InfiniBand EDR, 4 experts per GPU, the sizes of figure 5; in all "
    "about 10 TFLOP/s on 2 GPUs and 25 on 8; from 1 to 2 GPUs a GPU's speed halves.",
    "gpt": "FastMoE, figure 7: GPT, 12 layers, 96 experts, K 2, H halved, 8 V100, 70 hours; dense is about 3 times as "
    "fast per step, MoE is better at equal steps and at equal time; no balance loss.",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with their defaults filled in for the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fastmoe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--lanes", default=",".join(LANES), help="default: all")
    parser.add_argument("--ranks", type=int, help="of scaling; default: 2, or the GPUs there are")
    parser.add_argument("--repeats", type=int, default=16, help="samples, default 16, as FastMoE")
    parser.add_argument(
        "--gpt-options", default="", help="options of train_lm.py that replace some"
    )
    parser.add_argument("--json", type=Path, help="default: runs/fastmoe_<device>.json")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.lanes = args.lanes.split(",")
    if not set(args.lanes) <= set(LANES):
        parser.error(f"--lanes must be from {LANES}, got {args.lanes}")
    if args.ranks is None:
        args.ranks = min(2, torch.cuda.device_count()) if args.device == "cuda" else 2
    if args.ranks not in (1, 2):
        parser.error(f"--ranks must be 1 or 2, got {args.ranks}")
    args.json = args.json or machine.ROOT / "runs" / f"fastmoe_{args.device}.json"
    return args


def single_lane(args: argparse.Namespace) -> dict[str, Any]:
    """One layer with its gate on this device, for each number of experts."""
    device = torch.device(args.device)
    on_cuda = args.device == "cuda"
    timer = Timer(device, lead_passes=12 if on_cuda else 1)
    options = Options(device, PEERS[args.device], args.repeats, 30.0, lambda text: None, False)
    sizes = (4096, 1024, 4096) if on_cuda else (48, 32, 16)
    dtype = torch.bfloat16 if on_cuda else torch.float32
    records, lines = [], []
    for num_experts in EXPERTS[args.device]:
        shape = shapes.LaneShape(f"e{num_experts}", *sizes, num_experts, min(2, num_experts))
        problem = bench_fastmoe_lane.make(shape, device, dtype, "gate")
        rows = run_group(
            bench_fastmoe_lane.GROUP, problem, Plan(infer=False, wall=True), options, timer
        )
        for row in rows:
            records.append({"num_experts": num_experts, "top_k": shape.top_k, **row.as_json()})
            lines.append((f"E {num_experts}", row.label, *_milliseconds(row)))
        recorded = bench_fastmoe_lane.FASTMOE_MS.get(f"fastmoe_e{num_experts}") if on_cuda else None
        for label, times in (recorded or {}).items():
            lines.append((f"E {num_experts}", f"{label} (recorded on an H200)", *_recorded(times)))
    text = table(("", "row", "device fwd", "fwd+bwd", "wall fwd", "wall fwd+bwd"), lines)
    note = (
        f"T {sizes[0]}, D {sizes[1]}, H {sizes[2]}, K 2 (1 for one expert), {dtype}, milliseconds"
    )
    return {"text": f"{text}\n{note}", "rows": records, "failed": _failed(records)}


def _milliseconds(row: Row) -> tuple[str, ...]:
    """Cells of a row; of one that failed, why."""
    if row.status != "ok":
        return row.error, "", "", ""
    spreads = (row.forward, row.total, row.wall_forward, row.wall_total)
    return tuple("-" if spread is None else f"{spread.median / 1e3:.3f}" for spread in spreads)


def _recorded(times: tuple[float, float]) -> tuple[str, ...]:
    return "-", "-", f"{times[0]:.3f}", f"{times[1]:.3f}"


def scaling_lane(args: argparse.Namespace) -> dict[str, Any]:
    """Four experts per rank on one rank and on several, by ``benchmarks.parallel``."""
    size = "" if args.device == "cuda" else "tiny_"
    configs = [f"fastmoe_{size}4x{ranks}" for ranks in range(1, args.ranks + 1)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "parallel.json")
        modes = "eager,compiled" if args.device == "cuda" else "eager"
        options = ["--device", args.device, "--only", "layers", "--configs", ",".join(configs)]
        options += ["--labels", ";".join(LABELS), "--modes", modes]
        options += ["--repeats", str(args.repeats), "--json", str(out)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
        _run([*torchrun, "-m", "benchmarks.parallel", *options])
        rows = json.loads(out.read_text())["layers"]
    lines, kept = [], []
    for row in rows:
        ranks = int(row["shape"].rpartition("x")[2])
        # One rank has all its experts, several share theirs.
        if (row["label"] == "one rank") != (ranks == 1):
            continue
        kept.append({**row, "ranks": ranks})
        if row.get("error"):
            cells = (row["error"], "", "")
        else:
            total = ranks * row["flops_total"] / row["total"]["median"] / 1e6
            forward = ranks * row["flops_forward"] / row["forward"]["median"] / 1e6
            cells = (f"{forward:.4g}", f"{total:.4g}", f"{total / ranks:.4g}")
        lines.append((f"{ranks} x 4 experts", f"{row['label']}, {row['mode']}", *cells))
    header = ("ranks", "dispatch", "TFLOP/s fwd", "fwd+bwd", "fwd+bwd per rank")
    failed = [f"{r['shape']} {r['label']}: {r['error']}" for r in kept if r.get("error")]
    return {"text": table(header, lines), "rows": kept, "failed": failed}


def gpt_lane(args: argparse.Namespace) -> dict[str, Any]:
    """A GPT with experts and a dense one with as wide MLPs as a token's experts, by ``train_lm.py``."""
    options = ["--gate", "naive", "--aux-loss-weight", "0", "--no-checkpoint"]
    options += GPT[args.device].split()
    options += args.gpt_options.split()
    script = str(machine.ROOT / "examples" / "train_lm.py")
    with tempfile.TemporaryDirectory() as folder:
        printed = _run([script, "--device", args.device, *options, "--out", folder])
        runs = json.loads(Path(folder, "metrics.json").read_text())["runs"]
    start = printed.index("             held-out")
    text = printed[start:].rpartition("\nwrote ")[0]
    moe, dense = (
        runs[name]["seconds"][-1][1] / runs[name]["seconds"][-1][0] for name in ("moe", "dense")
    )
    text += f"\na dense step is {moe / dense:.2f} times as fast"
    text += f"\nscaled: bytes of text instead of words, and train_lm.py {' '.join(options)}"
    return {"text": text, "rows": runs, "failed": []}


def _run(command: list[str]) -> str:
    """Run Python with these arguments; what it printed, or an error with the end of it."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=machine.ROOT, check=False
    )
    if done.returncode not in (0, 1):  # 1: rows failed, and say so
        raise RuntimeError(
            f"benchmarks.fastmoe: {command} must end well, got exit code {done.returncode}: {done.stderr[-2000:]}"
        )
    return done.stdout


def _failed(records: list[dict[str, Any]]) -> list[str]:
    return [
        f"E {record['num_experts']} {record['key']}: {record['error']}"
        for record in records
        if record["status"] != "ok"
    ]


RUN = {"single": single_lane, "scaling": scaling_lane, "gpt": gpt_lane}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the lanes, print them beside the paper, write JSON; returns the exit code."""
    args = parse(argv)
    if args.device == "cpu":
        torch.set_num_threads(1)
    record: dict[str, Any] = {"machine": machine.describe(torch.device(args.device))}
    print(" ".join(f"{k}={v}" for k, v in record["machine"].items() if v is not None))
    failed = []
    for lane in args.lanes:
        print(f"\n{lane}\n{PAPER[lane]}", flush=True)
        result = RUN[lane](args)
        print(result.pop("text"), flush=True)
        record[lane] = {"paper": PAPER[lane], **result}
        failed += result["failed"]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nwrote {args.json}")
    for text in failed:
        print(f"FAILED {text}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
