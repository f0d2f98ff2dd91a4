"""Checks of compiled expert-parallel layers, run by every rank of a group."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.distributed as dist
from parallel_cases import (
    ROUTINGS,
    assert_equals_whole,
    batch,
    even,
    make,
    make_pair,
    token_counts,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from moeops.gates import SoftMoEGate
from processes import Ranks

CASES = (
    ("mlp", "inductor", {"dispatch": "exact"}),
    ("mlp", "inductor", {"dispatch": "static", "capacity": 12}),
    ("mlp", "aot_eager", {"dispatch": "exact", "n_chunks": (2, 3)}),
    ("composed", "aot_eager", {"dispatch": "static", "capacity": 12, "n_chunks": 2}),
    ("modules", "aot_eager", {"dispatch": "exact"}),
    ("nested", "aot_eager", {"dispatch": "exact", "n_chunks": 2}),
    ("mlp", "inductor", {"dispatch": "gather", "rows": 1.999, "max_tokens": 11}),
    ("nested", "aot_eager", {"dispatch": "gather", "rows": 1.999}),
)


def run_case(ranks: Ranks, kind: str, backend: str, options: dict) -> None:
    torch._dynamo.reset()
    if "max_tokens" in options and ranks.device == "cpu" and torch.__version__ < (2, 13):
        # For the table of the tests' gate, read for padded tokens, Inductor writes C++ that does not compile.
        backend = "aot_eager"
    part, whole = make_pair(kind, ranks, **options)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(part, fullgraph=True, backend=counter)

    def run(inp):
        for leaf in inp.values() if isinstance(inp, dict) else [inp]:
            # One graph for any number of tokens, 0 and 1 included.
            torch._dynamo.decorators.mark_unbacked(leaf, 0)
        return compiled(inp)

    equal = options.get("dispatch") == "gather" and "max_tokens" not in options
    for name, counts in token_counts(ranks.size).items():
        if equal and name not in ("equal", "none"):
            continue
        for routing in ROUTINGS:
            assert_equals_whole(run, part, whole, kind, ranks, counts, routing)
    assert counter.frame_count == 1


def check_one_graph_that_equals_one_rank(ranks: Ranks) -> None:
    for case in CASES:
        run_case(ranks, *case)


def check_slices(ranks: Ranks) -> None:
    """Ranks with the same tokens, in one graph, forward and backward."""
    torch._dynamo.reset()
    layer = make("mlp", 2, ranks.device, world_size=ranks.size, slice_group=dist.group.WORLD)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_tokens in (5, 2, 1, 0, 7):
        results = []
        for module in (layer, compiled):
            x = batch(num_tokens, ranks.device).requires_grad_()
            torch._dynamo.decorators.mark_unbacked(x, 0)
            y = module(x)
            y.square().sum().backward()
            results.append((y, x.grad))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


def check_order_of_collectives(ranks: Ranks) -> None:
    """Every rank's generated code starts the same collectives in the same order, whatever its tokens are."""
    torch._dynamo.reset()
    layer = make("mlp", 2, ranks.device, world_size=ranks.size, n_chunks=3)

    def run():
        x = batch(3 * ranks.rank + 2, ranks.device).requires_grad_()
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch.compile(layer, fullgraph=True)(x).square().sum().backward()

    _, codes = run_and_get_code(run)
    calls = [re.findall(r"torch\.ops\._c10d_functional\.(\w+)\.default\(", code) for code in codes]
    assert len(calls) == 2  # forward and backward
    for graph, extra in zip(calls, (1, 0), strict=True):
        # Of each chunk tokens, and what the gate chose for them, there, and sums back.
        assert graph.count("all_to_all_single") == 9 + extra, graph
        assert graph.count("wait_tensor") == 9 + extra, graph
    every: list = [None] * ranks.size
    dist.all_gather_object(every, calls)
    assert all(other == calls for other in every)
    sends = [name == "all_to_all_single" for name in calls[0]][
        2:
    ]  # behind the exchange of the counts
    assert sends[:6] == [True] * 6, calls[0]


def check_order_and_lost_pairs_where_ranks_gather(ranks: Ranks) -> None:
    """Two all-gathers and a reduce-scatter, one graph, and an error in the forward after one that lost pairs."""
    torch._dynamo.reset()
    layer, _ = make_pair("mlp", ranks, dispatch="gather", rows=1.0)
    layer.gate.set_routing(even)
    compiled = torch.compile(layer, fullgraph=True)
    x = batch(6, ranks.device).requires_grad_()
    _, codes = run_and_get_code(lambda: compiled(x).square().sum().backward())
    calls = [re.findall(r"torch\.ops\._c10d_functional\.(\w+)\.default\(", code) for code in codes]
    gather, scatter = ranks.gather, "reduce_scatter_tensor"
    assert (calls[0].count(gather), calls[0].count(scatter)) == (2, 1), calls[0]
    # The gradient of the sums, and of what was gathered.
    assert [name for name in calls[1] if name != "wait_tensor"] == [gather, scatter, scatter], calls
    # The tokens' all-gather begins before the gate's product, and ends behind the other one's.
    assert calls[0][0] == gather, calls[0]
    assert codes[0].index(gather) < codes[0].index("extern_kernels.addmm"), codes[0]
    every: list = [None] * ranks.size
    dist.all_gather_object(every, calls)
    assert all(other == calls for other in every)
    few, _ = make_pair("mlp", ranks, dispatch="gather", rows=0.5)
    few.gate.set_routing(even)
    compiled = torch.compile(few, fullgraph=True)
    for _ in range(2):
        compiled(x)
        with pytest.raises(RuntimeError, match="got 12 pairs without a row in the forward before"):
            compiled(x)


@torch.no_grad()
def check_numbers_of_tokens_that_differ(ranks: Ranks) -> None:
    """Where sizes are fixed by the number of tokens, other ones on other ranks are an error on every rank."""
    mixing = functools.partial(SoftMoEGate, num_slots=3, sequence_length=4)
    for options in (
        {"dispatch": "static", "capacity": 4.0, "n_chunks": 2},
        {"dispatch": "static", "capacity": 4.0, "gate": mixing, "top_k": 1},
        {"dispatch": "gather", "rows": 4.0},
    ):
        torch._dynamo.reset()
        part, whole = make_pair("mlp", ranks, **options)
        compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
        for count in (8, 16):
            unequal, equal = batch(count + 4 * ranks.rank, ranks.device), batch(count, ranks.device)
            for x in (unequal, equal):
                torch._dynamo.decorators.mark_dynamic(x, 0)
            with pytest.raises(
                ValueError, match=r"must have as many tokens .* got those for sizes"
            ):
                compiled(unequal)
            for _ in range(2):
                torch.testing.assert_close(compiled(equal), whole(equal))


def check_export_where_ranks_gather(ranks: Ranks) -> None:
    layer, _ = make_pair("mlp", ranks, dispatch="gather", rows=1.5)
    x = batch(6, ranks.device)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    for num_tokens in (6, 9):
        x = batch(num_tokens, ranks.device)
        torch.testing.assert_close(program.module()(x), layer(x))
