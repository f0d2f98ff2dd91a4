"""Where the expert block's time goes: ``python -m benchmarks.profile --config qwen3_30b``.

Runs moe_mlp forward and backward under torch.profiler and prints kernels by time, copies to the host included.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_moe_mlp, report, shapes
from benchmarks.inputs import ROUTINGS, make_block
from benchmarks.registry import Case, entries
from benchmarks.run import DTYPES
from benchmarks.timing import synchronize

# Calls of the CUDA runtime that make the host wait.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--config", required=True, choices=sorted(shapes.SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--peer", default="moeops", help="row of the block's table")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--trace", help="also write a Chrome trace to this file")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]

    shape = shapes.SHAPES[args.config]
    rows = entries(bench_moe_mlp.GROUP, device.type, [args.peer])
    if not rows:
        parser.error(f"--peer: no row {args.peer!r} in the block's table")
    problem = make_block(shape, device, dtype, args.routing, with_reference=False)
    case = rows[0].build(problem)
    for _ in range(3):
        _step(case)
    synchronize(device)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(args.iterations):
            _step(case)
        synchronize(device)
    if args.trace:
        profiler.export_chrome_trace(args.trace)
    print(f"{shape} {dtype} {args.routing} on {device}: {rows[0].label}, per iteration")
    print(_table(profiler, args.iterations, device), flush=True)
    return 0


def _step(case: Case) -> None:
    outputs = case.forward()
    case.backward(outputs)
    case.clear_grads()


def _table(profiler: profile, iterations: int, device: torch.device) -> str:
    """Kernels on CUDA, ops by their own time on CPU."""
    time_us: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    waits: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA:
            if event.is_user_annotation:
                continue
            time_us[event.name] += event.time_range.elapsed_us()
            count[event.name] += 1
        elif device.type == "cpu":
            time_us[event.name] += event.self_cpu_time_total
            count[event.name] += 1
        elif event.name in WAITS:
            waits[event.name] += 1
    total = sum(time_us.values()) or 1.0
    lines = [
        [
            name[:100],
            f"{count[name] / iterations:.4g}",
            f"{spent / iterations:.1f}",
            f"{spent / count[name]:.1f}",
            f"{100 * spent / total:.1f}",
        ]
        for name, spent in sorted(time_us.items(), key=lambda item: -item[1])
        if spent > 0
    ]
    lines.append(["total", "", f"{total / iterations:.1f}", "", "100.0"])
    text = report.table(
        ("kernel" if device.type == "cuda" else "op", "count", "us", "us each", "%"), lines
    )
    if device.type == "cuda":
        copies = sum(n for name, n in count.items() if "DtoH" in name)
        # The final synchronisation of the run is one of the waits.
        text += (
            f"\ncopies to the host: {copies}; waits of the host in all iterations: {dict(waits)}"
        )
    return text


if __name__ == "__main__":
    sys.exit(main())
