"""``python -m moeops profile``: measure this machine, on one rank or on all that torchrun started, and fit its laws."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import moeops
from moeops.cost.laws import ITEM_BYTES
from moeops.cost.model import CostModel
from moeops.planner import measure, measure_ranks
from moeops.planner.ranks import TorchrunRanks
from moeops.planner.report import model_table
from moeops.profiling import work
from moeops.profiling.clock import Clock
from moeops.profiling.fit import fit_model
from moeops.profiling.machine import describe_machine

HELP = "measure this machine for the planner; under torchrun its links too"
EPILOG = """one process measures experts, router, memory and host; torchrun adds what is between ranks:

  torchrun --nproc-per-node=2 -m moeops profile --out profile.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--out", type=Path, default=Path("profile.json"), help="default: profile.json"
    )
    parser.add_argument(
        "--dtype", help="comma list of types; default: bfloat16 on cuda, float32 on cpu"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try it out on a CPU")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="also the host's part of compiled layers, a minute more",
    )
    parser.add_argument(
        "--node-size", type=int, help="ranks per node; default: as torchrun started them"
    )
    parser.add_argument(
        "--refit", type=Path, metavar="FILE",
        help="measure nothing: fit the laws of this profile's measurements again",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure or refit; 2 for arguments that do not fit."""
    if args.refit is not None:
        return _refit(args)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = (args.dtype or ("bfloat16" if device == "cuda" else "float32")).split(",")
    unknown = sorted(set(names) - set(ITEM_BYTES))
    if unknown:
        return _refuse(f"--dtype must be from {','.join(ITEM_BYTES)}, got {','.join(unknown)}")
    if device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device must be cpu on a machine without a usable GPU, got cuda")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if args.node_size is not None and (args.node_size < 1 or world % args.node_size):
        return _refuse(f"--node-size must divide the {world} ranks, got {args.node_size}")
    ranks = TorchrunRanks(device)
    with measure.one_thread_per_rank(ranks.size if device == "cpu" else 1):
        model = _profile(args, ranks, [getattr(torch, name) for name in names])
    if ranks.rank == 0:
        model.save(args.out)
        print(f"{model_table(model)}\nwritten to {args.out}", flush=True)
    ranks.close()
    return 0


def _profile(
    args: argparse.Namespace, ranks: TorchrunRanks, dtypes: list[torch.dtype]
) -> CostModel:
    """Every measurement, then the laws; the same on all ranks."""
    sizes = measure.GPU_SIZES if ranks.device.type == "cuda" else measure.CPU_SIZES
    if args.quick:
        sizes = measure.QUICK_SIZES
    clock = Clock(ranks, sizes.samples, 3, sizes.flush_bytes)
    measurements: dict[str, list[dict[str, Any]]] = {}
    begin = time.monotonic()

    def add(name: str, rows: list[dict[str, Any]]) -> None:
        measurements.setdefault(name, []).extend(work.slowest(clock, rows))
        if ranks.rank == 0:
            print(f"  {time.monotonic() - begin:5.1f} s  {name}: {len(rows)} measured", flush=True)

    for dtype in dtypes:
        add("experts", work.measure_experts(clock, sizes.experts, dtype))
        add("router", measure.measure_router(clock, sizes, dtype))
    add("memory", work.measure_memory(clock, sizes.memory, dtypes[0]))
    if ranks.device.type == "cuda":
        add("host_copy", measure.measure_host_copy(clock))
    if ranks.size > 1:
        node_size = args.node_size or ranks.node_size
        for name, rows in measure_ranks.measure_links(clock, sizes, node_size).items():
            add(name, rows)
        add("overlap", measure_ranks.measure_overlap(clock, sizes, dtypes[0]))
    add("host", measure_ranks.measure_host(clock, dtypes[0], compiled=args.compiled))
    return fit_model(measurements, ranks.device.type, _machine(ranks, args))


def _machine(ranks: TorchrunRanks, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured on."""
    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **describe_machine(ranks.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moeops": moeops.__version__,
        "ranks": ranks.size,
        "node_size": args.node_size or ranks.node_size,
        "quick": args.quick,
    }
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        info |= {
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if ranks.size > 1 else None,
            "environment": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
        }
    return info


def _refit(args: argparse.Namespace) -> int:
    try:
        old = CostModel.load(args.refit)
    except (OSError, ValueError) as err:
        return _refuse(str(err))
    try:
        model = fit_model(old.measurements, old.device, old.machine)
    except (KeyError, TypeError, ValueError) as err:
        return _refuse(f"--refit: {args.refit} must hold whole measurements, got {err!r}")
    model.save(args.out)
    print(f"{model_table(model)}\nwritten to {args.out}")
    return 0


def _refuse(message: str) -> int:
    print(f"moeops profile: {message}", file=sys.stderr)
    return 2
