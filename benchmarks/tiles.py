"""Every product of the expert block on Hopper with every tile: ``python -m benchmarks.tiles --configs qwen3_30b``.

Runs forward and backward under torch.profiler with one candidate after the other (``MOEOPS_TILES``), and prints
each product's median kernel time beside the dense product of as many FLOPs. This is what the table in
``csrc/cuda/hopper/tiles.cu`` was made from; the block's benchmark does not need it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import moeops
from benchmarks import shapes
from benchmarks.inputs import ROUTINGS, BlockProblem, make_block
from moeops import Glu

# gpt-oss has gate and up in turns.
UNITS: dict[str, str | Glu] = {
    "swiglu": "swiglu",
    "glu": Glu(alpha=1.702, limit=7.0, offset=1.0),
    "glu_in_turns": Glu(alpha=1.702, limit=7.0, offset=1.0, interleaved=True),
}


def _rows(*tiles: str) -> list[str]:
    return [
        ":".join(words) for words in itertools.product(tiles, ("small", "large"), ("skip", "whole"))
    ]


CANDIDATES = {
    "up": _rows("p192", "p192x2", "c256", "c256x2"),
    "down": _rows("p192", "p192x2", "c256", "c256x2"),
    "dh": _rows("p192", "p192x2", "p128"),
    "dx": _rows("p192", "p192x2", "c256", "c256x2"),
    "dw_up": ["p192:16", "p192:8", "p192x2:16", "c256:16", "c256:8"],
    "dw_down": ["p192:16", "p192:8", "p192x2:16", "c256:16", "c256:8"],
}


def tiles_of(product: str, unit: str) -> list[str]:
    """The tiles that exist for a product; without a choice among them there are none to force."""
    if unit != "swiglu" and product in ("up", "dh"):
        return _rows("p192", "p128") if product == "dh" else []
    return CANDIDATES[product]


def product_of(kernel: str) -> str:
    """The product that a kernel computes, from the template arguments in its name; else its own name."""
    if "weight_grad_kernel" in kernel:
        return "dw_down" if "Gathered)1" in kernel else "dw_up"
    if "rows_gemm_kernel" in kernel:
        if "Epilogue)1" in kernel:
            return "up"
        if "Epilogue)2" in kernel:
            return "dh"
        return "dx" if "false, true>" in kernel else "down"
    return kernel.split("<")[0].split("::")[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table per configuration."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--configs", default="qwen3_30b", help="comma list of block sizes")
    parser.add_argument("--products", default=",".join(CANDIDATES), help="comma list")
    parser.add_argument("--unit", choices=UNITS, default="swiglu")
    parser.add_argument(
        "--transposed",
        action="store_true",
        help="weights stored [E, in, out] in place of [E, out, in]; with --products dh",
    )
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--best", type=int, default=6, help="candidates to print of each product")
    args = parser.parse_args(argv)
    unknown = set(args.products.split(",")) - set(CANDIDATES)
    if unknown:
        parser.error(f"--products must be of {', '.join(CANDIDATES)}, got {', '.join(unknown)}")
    if args.transposed and args.products != "dh":
        parser.error("--transposed must come with --products dh: layouts tell the others apart")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    for name in args.configs.split(","):
        problem = make_block(
            dataclasses.replace(shapes.SHAPES[name], activation=UNITS[args.unit]),
            torch.device("cuda"),
            torch.bfloat16,
            args.routing,
            with_reference=False,
        )
        if args.transposed:
            problem.w_up, problem.w_down = (
                w.detach().mT.contiguous().mT for w in (problem.w_up, problem.w_down)
            )
        stored = "[E, in, out]" if args.transposed else "[E, out, in]"
        print(f"{name}, {args.unit}, {stored}, on {torch.cuda.get_device_name()}, median us")
        tiles = {p: tiles_of(p, args.unit) for p in args.products.split(",")}
        for line in table(problem, {p: t for p, t in tiles.items() if t}, args.rounds, args.best):
            print("  " + line, flush=True)
    return 0


def table(
    problem: BlockProblem, candidates: dict[str, list[str]], rounds: int, best: int
) -> Iterator[str]:
    """A line per product: the dense time, then its best candidates with their part of dense."""
    dense = {name: _time(product) for name, product in dense_products(problem).items()}
    samples = sample(problem, candidates, rounds)
    names = [*CANDIDATES, *sorted({name for name, _ in samples} - set(CANDIDATES))]
    if problem.w_down.stride(-1) != 1:
        names = [*candidates]  # kernels of other products have each other's names
    for name in names:
        ordered = sorted(
            (statistics.median(times), tile)
            for (product, tile), times in samples.items()
            if product == name
        )
        limit = dense.get(name)
        columns = [
            f"{tile} {time:.0f}" + (f" ({limit / time:.2f})" if limit else "")
            for time, tile in ordered[:best]
        ]
        yield f"{name:8s} " + (f"dense {limit:.0f}  " if limit else "") + "  ".join(columns)


def sample(
    problem: BlockProblem, candidates: dict[str, list[str]], rounds: int
) -> dict[tuple[str, str], list[float]]:
    """Kernel times in microseconds by (product, candidate); the first round warms up."""
    samples: dict[tuple[str, str], list[float]] = defaultdict(list)
    plan = moeops.sort_tokens(problem.topk_ids, problem.shape.num_experts)
    before = os.environ.get("MOEOPS_TILES")
    try:
        for number in range(rounds + 1):
            for i in range(max(map(len, candidates.values()))):
                tiles = {p: each[i % len(each)] for p, each in candidates.items()}
                os.environ["MOEOPS_TILES"] = ",".join(f"{p}={tile}" for p, tile in tiles.items())
                for kernel, time in _profile(problem, plan):
                    if number > 0:
                        product = product_of(kernel)
                        samples[product, tiles.get(product, "as built")].append(time)
    finally:
        os.environ.pop("MOEOPS_TILES")
        if before is not None:
            os.environ["MOEOPS_TILES"] = before
    return samples


def _profile(problem: BlockProblem, plan: moeops.TokenPlan) -> list[tuple[str, float]]:
    leaves = [t.requires_grad_() for t in problem.leaves.values()]
    x, weights, w_up, w_down = leaves
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        y = moeops.moe_mlp(x, plan, weights, w_up, w_down, activation=problem.shape.activation)
        torch.autograd.grad(y, leaves, problem.grad_y)
        torch.cuda.synchronize()
    return [
        (event.name, event.device_time)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]


def dense_products(problem: BlockProblem) -> dict[str, Callable[[], torch.Tensor]]:
    """Each product as one dense product of all rows with the first expert's weights."""
    w_up, w_down = problem.w_up.detach()[0], problem.w_down.detach()[0]
    rows, pre, hidden = (
        torch.randn(problem.shape.num_pairs, width, device="cuda", dtype=torch.bfloat16)
        for width in (w_up.shape[1], w_up.shape[0], w_down.shape[1])
    )
    return {
        "up": lambda: rows @ w_up.t(),
        "down": lambda: hidden @ w_down.t(),
        "dh": lambda: rows @ w_down,
        "dx": lambda: pre @ w_up,
        "dw_up": lambda: pre.t() @ rows,
        "dw_down": lambda: rows.t() @ hidden,
    }


def _time(product: Callable[[], torch.Tensor], repeats: int = 12) -> float:
    """Median microseconds."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        product()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
