"""Checks of regions whose chunks pass two links, run by every rank of a group. Four ranks are two nodes of two."""

from __future__ import annotations

import itertools
import unittest.mock

import pytest
import torch
import torch.distributed as dist
from parallel_cases import batch, dropped, uneven
from schedule_checks import PAIRS, D, H, integers, one_step
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._python_dispatch import TorchDispatchMode

from moeops import compile as schedule
from moeops.distributed import AutoChunks, Exact, Hierarchy, Static, build_hierarchy
from moeops.profiling.job import JobLayer, job_model
from processes import Ranks

_built: list[Hierarchy] = []
RECORDS = (Exact, Static)


def hierarchy_of(ranks: Ranks) -> Hierarchy:
    """Two nodes of two ranks."""
    if not _built:
        _built.append(build_hierarchy(dist.group.WORLD, ranks.size // 2))
    return _built[0]


def records(hierarchy: Hierarchy | None, n_chunks=1) -> list:
    """Tokens that go to nodes once, and buffers, of a known size and of one that ranks agree on."""
    options = {"hierarchy": hierarchy, "n_chunks": n_chunks}
    return [Exact(**options), Static(7, **options), Static(1.25, **options)]


def tokens_of(ranks: Ranks) -> torch.Tensor:
    """Integers, other numbers of tokens on other ranks."""
    return batch(11 - 3 * ranks.rank, ranks.device).mul(2).round()


class Collectives(TorchDispatchMode):
    """Links and experts in the order in which they begin: "inside", "across", "experts"; "all" for the whole group."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        super().__init__()
        self.names = {hierarchy.inside.name: "inside", hierarchy.across.name: "across"}
        self.events: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.events.append(self.names.get(args[3], "all"))
        elif "moe_mlp" in str(func):
            self.events.append("experts")
        return func(*args, **(kwargs or {}))


def check_all_pairs_of_degrees_equal_the_flat_exchange(ranks: Ranks) -> None:
    """Outputs and all gradients, to the bit: with integers no order of sums matters."""
    hierarchy = hierarchy_of(ranks)
    pairs = zip(records(None), records(hierarchy), strict=True)
    for (flat, staged), routing in itertools.product(pairs, (uneven, dropped)):
        layer = integers(flat, ranks)
        x = tokens_of(ranks)
        expected = one_step(layer, layer, x, routing)
        assert any(value.count_nonzero() for value in expected.values())
        layer = integers(staged, ranks)
        for degrees in PAIRS:
            layer.dispatcher.set_degrees(degrees)
            actual = one_step(layer, layer, x, routing)
            for name, value in expected.items():
                assert torch.equal(actual[name], value), (staged, degrees, name)


def check_a_rank_without_tokens(ranks: Ranks) -> None:
    for flat, staged in zip(records(None)[:2], records(hierarchy_of(ranks), (3, 2)), strict=False):
        layers = [integers(record, ranks) for record in (flat, staged)]
        x = tokens_of(ranks)[: 0 if ranks.rank == 1 else None]
        expected, actual = (one_step(layer, layer, x, uneven) for layer in layers)
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (staged, name)


def check_both_links_work_at_once_in_one_order(ranks: Ranks) -> None:
    """On every rank: each link has the next chunk while the other one has this, and experts a third."""
    hierarchy = hierarchy_of(ranks)
    sent_on = {
        # Counts and choices, then chunks between nodes; one is ahead inside.
        Exact: [*["across", "inside"] * 2, *["across"] * 3, "inside", "inside", "experts"],
        Static: [*["inside"] * 3, *["across"] * 3, "experts"],
    }
    for kind, record in zip(RECORDS, records(hierarchy, 3), strict=False):
        layer = integers(record, ranks)
        x = tokens_of(ranks)
        one_step(layer, layer, x, uneven)
        leaf = x.clone()
        leaf[:, 0] = torch.arange(len(x))
        leaf.requires_grad_()
        with Collectives(hierarchy) as forward:
            y = layer(leaf)
        with Collectives(hierarchy) as backward:
            y.sum().backward()
        wanted = sent_on[kind]
        assert forward.events[: len(wanted)] == wanted, (kind, forward.events)
        first, second = ("inside", "across") if kind is Exact else ("across", "inside")
        ahead = ["inside"] if kind is Exact else []
        wanted = [first, *ahead, "experts", first, second, "experts", first, second, second]
        assert forward.events[-len(wanted) :] == wanted, (kind, forward.events)
        every: list = [None] * ranks.size
        dist.all_gather_object(every, (forward.events, backward.events))
        assert every == every[:1] * ranks.size
        assert {"inside", "across", "experts"} == set(backward.events)


class Graphs:
    """A compiler that runs what autograd has made of a graph, and notes the links in it; see ``Collectives``."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.names = Collectives(hierarchy).names
        self.orders: list[list[str]] = []
        compiler = make_boxed_compiler(self._note)
        self.backend = aot_autograd(
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=min_cut_rematerialization_partition,
        )

    def _note(self, module: torch.fx.GraphModule, _inputs) -> torch.fx.GraphModule:
        order = []
        for node in module.graph.nodes:
            if node.target is torch.ops._c10d_functional.all_to_all_single.default:
                order.append(self.names.get(node.args[3], "all"))
            elif "moe_mlp" in str(node.target):
                order.append("experts")
        self.orders.append(order)
        return module


def check_in_a_graph(ranks: Ranks) -> None:
    """Equal to eager in one graph, which has the order of eager code, the same on every rank."""
    hierarchy = hierarchy_of(ranks)
    # Counts of cells are symbols to a compiler, each of which costs it time: two cells for Exact.
    for record in (records(hierarchy, (2, 3))[1], records(hierarchy, 2)[0]):
        torch._dynamo.reset()
        layer = integers(record, ranks)
        x = tokens_of(ranks)
        with Collectives(hierarchy) as eager:
            expected = one_step(layer, layer, x, uneven)
        graphs = Graphs(hierarchy)
        compiled = torch.compile(layer, fullgraph=True, backend=graphs.backend)
        actual = one_step(layer, compiled, x, uneven)
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (record, name)
        forward, backward = graphs.orders
        assert [*forward, *backward] == eager.events, record
        every: list = [None] * ranks.size
        dist.all_gather_object(every, graphs.orders)
        assert every == every[:1] * ranks.size


def check_a_job_measures_both_links(ranks: Ranks) -> None:
    """And chooses chunks by these, the same on all ranks."""
    hierarchy = hierarchy_of(ranks)
    layer, group = JobLayer(D, H, 2, 2, "float64"), hierarchy.group
    model = job_model(
        "check",
        layer,
        group,
        torch.device(ranks.device),
        hierarchy=hierarchy,
        refresh=True,
        seconds=0.1,
    )
    for law in (model.inside_node, model.between_nodes):
        assert law.seconds(1 << 20, 1) > 0
    assert {"inside_node", "between_nodes", "all_reduce"} <= set(model.measurements)
    for record in (Exact, Static):
        with unittest.mock.patch(
            "moeops.dispatch.options.job_model", return_value=model
        ) as measure:
            n_chunks = AutoChunks(num_tokens=64)
            chosen = integers(record(hierarchy=hierarchy, n_chunks=n_chunks), ranks)
        assert measure.call_args.kwargs == {"hierarchy": hierarchy}
        every: list = [None] * ranks.size
        dist.all_gather_object(every, tuple(chosen.dispatcher.degrees))
        assert every == every[:1] * ranks.size
        assert "between nodes" in schedule.explain(chosen)
    with pytest.raises(NotImplementedError, match='hierarchy of the form "leader", got \\(1, 2\\)'):
        integers(Exact(hierarchy=hierarchy._replace(form="leader"), n_chunks=(1, 2)), ranks)
