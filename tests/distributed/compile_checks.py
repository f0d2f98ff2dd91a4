"""Checks of compiled expert-parallel layers, run by every rank of a group."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist
from parallel_cases import ROUTINGS, assert_equals_whole, batch, make, make_pair, token_counts
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from processes import Ranks

CASES = (
    ("mlp", "inductor", {"dispatch": "exact"}),
    ("mlp", "inductor", {"dispatch": "static", "capacity": 12}),
    ("mlp", "aot_eager", {"dispatch": "exact", "n_chunks": 2}),
    ("composed", "aot_eager", {"dispatch": "static", "capacity": 12, "n_chunks": 2}),
    ("modules", "aot_eager", {"dispatch": "exact"}),
    ("nested", "aot_eager", {"dispatch": "exact", "n_chunks": 2}),
)


def run_case(ranks: Ranks, kind: str, backend: str, options: dict) -> None:
    torch._dynamo.reset()
    part, whole = make_pair(kind, ranks, **options)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(part, fullgraph=True, backend=counter)

    def run(inp):
        for leaf in inp.values() if isinstance(inp, dict) else [inp]:
            # One graph for any number of tokens, 0 and 1 included.
            torch._dynamo.decorators.mark_unbacked(leaf, 0)
        return compiled(inp)

    for counts in token_counts(ranks.size).values():
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
        assert graph.count("all_to_all_single") == 6 + extra, graph
        assert graph.count("wait_tensor") == 6 + extra, graph
    every: list = [None] * ranks.size
    dist.all_gather_object(every, calls)
    assert all(other == calls for other in every)
    sends = [name == "all_to_all_single" for name in calls[0]][
        2:
    ]  # behind the exchange of the counts
    assert sends[:3] == [True] * 3, calls[0]
