"""The Numba prototypes against the native ops: ``python -m benchmarks.bench_numba [--device cpu|cuda]``.

Every result is compared with the reference before it is timed. Prints Markdown tables and writes JSON. Exit code 1
where a prototype is wrong or a promise is broken: at most 60 us of host time per launch on CUDA; on CPU
``naive_topk`` at most twice the time of ``topk_route`` at T 8192, E 64, K 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import moeops
import moeops.numba as prototype
import moeops.numba.gates as gallery
from benchmarks import machine
from benchmarks.inputs import generator
from benchmarks.registry import WrongResult, compare, compare_exact
from examples.prototypes import expert_choice, layout
from examples.prototypes.group_limited import group_limited
from examples.prototypes.switch import switch_jitter
from moeops import reference
from moeops.reference import gates_prototypes

MAX_LAUNCH_US = 60.0
MAX_CPU_RATIO = 2.0


@dataclass
class Case:
    """One op at one size: its call, what it must give, and other functions with the same arguments."""

    title: str
    op: Any
    args: tuple[Any, ...]
    expected: Callable[..., Any]
    against: Mapping[str, Callable[..., Any]]

    def check(self) -> None:
        """Raise WrongResult unless the op gives what it must, integers exactly."""
        with torch.no_grad():
            actual = as_tuple(self.op(*self.args))
            expected = as_tuple(self.expected(*self.args))
        names = [output.name for output in self.op.signature.returned]
        for name, got, want in zip(names, actual, expected, strict=True):
            if want.is_floating_point():
                dtype = torch.float32 if got.dtype == torch.float64 else got.dtype
                compare({name: got}, {name: want.double()}, dtype)
            else:
                compare_exact({name: got}, {name: want})


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    """Outputs of an op with one or several."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def distinct_logits(T: int, E: int, device: torch.device) -> Tensor:
    """Every row a permutation of the same E quantiles: without ties the best are the same for everyone."""
    order = torch.rand(T, E, device=device, generator=generator(device)).argsort(dim=1)
    return torch.special.ndtri((order + 0.5) / E)


def cases(device: torch.device) -> list[Case]:
    """The gallery and ``examples/prototypes`` at sizes of the device."""
    cuda = device.type == "cuda"
    T, E, K, D = (32768, 128, 8, 2048) if cuda else (8192, 64, 2, 256)
    logits = distinct_logits(T, E, device)
    noise = 1 + 0.1 * torch.rand(T, E, device=device, generator=generator(device, 1))
    bias = torch.linspace(-0.01, 0.01, E, device=device)
    ids = logits.topk(K, dim=1).indices
    weights = torch.rand(T, K, device=device, generator=generator(device, 2))
    plan = moeops.sort_tokens(ids, E)
    dtype = torch.bfloat16 if cuda else torch.float32
    x = torch.randn(T, D, device=device, generator=generator(device, 3)).to(dtype)
    rows = moeops.permute_tokens(x, plan)
    few = min(T, 2048)  # a thread per expert goes through all tokens
    experts_scores = logits[:few].softmax(1).t().contiguous()
    capacity = few * K // E
    tokens = torch.arange(T, device=device)

    def unpermute(rows, weights, *plan):
        return moeops.unpermute_tokens(rows, moeops.TokenPlan(*plan), weights)

    def groups(function):
        return lambda z, k, b, n, top: function(
            z, k, score="sigmoid", bias=b, num_groups=n, top_groups=top
        )

    shape = f"T {T}, E {E}, K {K}"
    sizes = f"{shape}, D {D}, {str(dtype).removeprefix('torch.')}"
    return [
        Case(
            f"naive_topk, {shape}",
            gallery.naive_topk,
            (logits, K),
            lambda z, k: reference.topk_route(z.double(), k),
            {"topk_route": moeops.topk_route},
        ),
        Case(
            f"switch_jitter, T {T}, E {E}, K 1",
            switch_jitter,
            (logits, 1, noise),
            lambda z, k, n: reference.topk_route((z * n).double(), k, renormalize=False),
            {"topk_route": lambda z, k, n: moeops.topk_route(z * n, k, renormalize=False)},
        ),
        Case(
            f"group_limited, {shape}, 8 groups, best 4",
            group_limited,
            (logits, K, bias, 8, 4),
            groups(reference.topk_route),
            {"topk_route": groups(moeops.topk_route)},
        ),
        Case(
            f"top_p, {shape}",
            gallery.top_p,
            (logits, K, 0.8, 0.1),
            lambda z, k, *rest: gates_prototypes.top_p(z[:512].cpu().double(), k, *rest),
            {"topk_route": lambda z, k, mass, margin: moeops.topk_route(z, k)},
        ),
        Case(
            f"hash_route, T {T}, E {E}, K {K}",
            gallery.hash_route,
            (tokens, E, K),
            gates_prototypes.hash_route,
            {},
        ),
        Case(
            f"expert_choice, T {few}, E {E}, C {capacity}",
            expert_choice.expert_choice,
            (experts_scores, capacity),
            expert_choice.expert_choice_reference,
            {"torch.topk": lambda scores, c: torch.topk(scores, c, dim=1)},
        ),
        Case(
            f"sort_tokens, {shape}",
            layout.sort_tokens,
            (ids, E),
            reference.sort_tokens,
            {"sort_tokens": moeops.sort_tokens},
        ),
        Case(
            f"permute, {sizes}",
            layout.permute,
            (x, *plan),
            lambda x, *plan: reference.permute_tokens(x, moeops.TokenPlan(*plan)),
            {"permute_tokens": lambda x, *p: moeops.permute_tokens(x, moeops.TokenPlan(*p))},
        ),
        Case(
            f"unpermute, {sizes}",
            layout.unpermute,
            (rows, weights, *plan),
            lambda rows, weights, *plan: reference.unpermute_tokens(
                rows, moeops.TokenPlan(*plan), weights
            ),
            {"unpermute_tokens": unpermute},
        ),
    ]


def check_top_p(case: Case) -> None:
    """The reference of top_p goes token by token: the first 512 are compared."""
    args = (case.args[0][:512], *case.args[1:])
    weights, ids = (out.cpu() for out in case.op(*args))
    want_weights, want_ids = case.expected(*args)
    compare({"weights": weights}, {"weights": want_weights}, torch.float32)
    compare_exact({"ids": ids}, {"ids": want_ids})


def gallery_table(device: torch.device, seconds: float) -> tuple[list[dict], list[str]]:
    """Rows of the timing table, and what went wrong."""
    rows, problems = [], []
    for case in cases(device):
        try:
            (check_top_p if case.op is gallery.top_p else Case.check)(case)
        except WrongResult as err:
            problems.append(f"{case.title}: {err}")
            continue
        timings = prototype.bench(
            case.op, *case.args, against=case.against, seconds=seconds, show=False
        )
        own = timings[0].device or timings[0].host
        native = timings[-1].device or timings[-1].host if case.against else None
        rows.append(
            {
                "case": case.title,
                "prototype_us": own,
                "against": next(iter(case.against), ""),
                "against_us": native,
                "host_us": timings[0].host,
            }
        )
        ratio = "" if native is None else f"{own / native:.2f}"
        other = "" if native is None else f"{native:.1f}"
        print(
            f"| {case.title} | {own:.1f} | {rows[-1]['against']} | {other} | {ratio} |", flush=True
        )
        if device.type == "cpu" and case.op is gallery.naive_topk and own > MAX_CPU_RATIO * native:
            problems.append(f"{case.title}: {own / native:.2f} times the native op's time")
    return rows, problems


def launch_table(seconds: float) -> tuple[list[dict], list[str]]:
    """Host time per call on CUDA, prototype and native; without and with gradients recorded."""
    rows, problems = [], []
    logits = distinct_logits(4096, 64, torch.device("cuda"))
    for grad in (False, True):
        leaf = logits.clone().requires_grad_(grad)
        with torch.enable_grad():
            timings = host_times(
                {
                    "naive_topk": lambda leaf=leaf: gallery.naive_topk(leaf, 2),
                    "native topk_route": lambda leaf=leaf: moeops.topk_route(leaf, 2),
                },
                seconds,
            )
        for name, host in timings.items():
            rows.append({"case": name, "grad": grad, "host_us": host})
            print(f"| {name} | {'yes' if grad else 'no'} | {host:.1f} |", flush=True)
        if timings["naive_topk"] > MAX_LAUNCH_US:
            problems.append(f"launch: {timings['naive_topk']:.1f} us of host time per call")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            captured = gallery.naive_topk(logits, 2)
    graph.replay()
    expected = gallery.naive_topk(logits, 2)
    if not all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True)):
        problems.append("launch: a replayed CUDA graph gives another result")
    (replay,) = host_times({"replay": graph.replay}, seconds, calls=1).values()
    torch.cuda.synchronize()
    rows.append({"case": "in a CUDA graph of 20 calls", "grad": False, "host_us": replay / 20})
    print(f"| in a CUDA graph of 20 calls | no | {replay / 20:.1f} |", flush=True)
    return rows, problems


def host_times(
    functions: Mapping[str, Callable[[], Any]], seconds: float, calls: int = 20
) -> dict[str, float]:
    """Median host microseconds per call, the queue empty before each stretch of calls."""
    result = {}
    for name, function in functions.items():
        for _ in range(20):
            function()
        times = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times) < 5:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            times.append(1e6 * (time.perf_counter() - begin) / calls)
        result[name] = median(times)
    return result


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_numba")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=0.5, help="per row [%(default)s]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    unit = "device us" if device.type == "cuda" else "us"
    record, problems = {"machine": machine.describe(device)}, []
    if device.type == "cuda":
        print("| host cost of a call, T 4096, E 64, K 2 | grad | host us |\n|---|---|---|")
        record["launch"], problems = launch_table(args.seconds)
        print()
    print(f"| prototype | {unit} | native | {unit} | ratio |\n|---|---|---|---|---|")
    record["gallery"], more = gallery_table(device, args.seconds)
    record["problems"] = problems = problems + more
    path = args.json or machine.ROOT / "runs" / f"numba_{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    for problem in problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
