"""Passes over graphs, in one process: what they change, what they leave alone, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch._inductor import config
from torch.fx import Graph, symbolic_trace

from moeops import FMoETransformerMLP
from moeops.compile import Order, SetDegrees, options
from moeops.compile.passes import LAST, Pass, PassList
from moeops.dispatch.degrees import Degrees
from moeops.dispatch.transports import TRANSPORTS


def test_options_are_those_of_inductor():
    chosen = options(FMoETransformerMLP(4, 8, 16))
    known = config.get_config_copy()
    assert set(chosen) <= set(known)
    assert chosen["reorder_for_peak_memory"] is False
    assert set(options(FMoETransformerMLP(4, 8, 16), passes=[])) == {"reorder_for_peak_memory"}


@pytest.mark.parametrize(
    ("model", "passes", "error", "message"),
    [
        (3, [], TypeError, r"options: model must be a torch.nn.Module, got 3 \(int\)"),
        (None, ["fast"], ValueError, r"options: a pass must be one of .*'order'.*, got 'fast'"),
        (None, [len], TypeError, r"options: a pass must be one of .* or a moeops.compile.Pass"),
    ],
)
def test_what_is_refused(model, passes, error, message):
    with pytest.raises(error, match=message):
        options(FMoETransformerMLP(4, 8, 16) if model is None else model, passes=passes)


class Elsewhere(Pass):
    hook = "no_such_hook"


def test_a_hook_that_is_not_there_is_refused(monkeypatch):
    layer = FMoETransformerMLP(4, 8, 16)
    with pytest.raises(ValueError, match=r"Elsewhere: hook must be one of .*, got 'no_such_hook'"):
        options(layer, passes=[Elsewhere()])
    monkeypatch.setattr("moeops.compile.passes.config", object())
    with pytest.raises(RuntimeError, match=rf"options: torch must have .*{LAST}, got torch .*2.11"):
        options(layer, passes=["order"])


@pytest.mark.parametrize("one", [Order(), SetDegrees((), Degrees(2, 3))], ids=["order", "degrees"])
def test_what_only_looks_like_a_site_is_left_alone(one):
    """Ops of the same namespaces that begin no collective and are no region."""
    ops = torch.ops._c10d_functional

    def near_miss(x):
        x = torch.ops.moeops.all_to_all_rows(ops.wait_tensor(x), [3], [3], "0")
        return torch.relu(ops.isend(x, 0, 0, "0")) + 1

    traced = symbolic_trace(near_miss)
    before = traced.graph.python_code("self").src
    assert one(traced.graph) == 0
    assert traced.graph.python_code("self").src == before


def region_graph(transport, tables, sizes, r_fwd, r_bwd, group="no such group"):
    """A graph with one region, as Dynamo would make it."""
    graph = Graph()
    x = graph.placeholder("x")
    sent = [
        graph.call_function(torch.ops._c10d_functional.all_gather_into_tensor, (x, 2, group))
        for _ in range(tables - TRANSPORTS[transport].num_tables)
    ]
    tables = [*[x] * (tables - len(sent)), *sent]
    args = (
        x,
        None,
        tables,
        sizes,
        x,
        x,
        None,
        None,
        "relu",
        1.0,
        None,
        0.0,
        False,
        transport,
        group,
        2,
        0,
        "",
        "",
        0,
        2,
        r_fwd,
        r_bwd,
    )
    graph.output(graph.call_function(torch.ops.moeops.ep_region, args))
    return graph


def degrees_of(graph):
    (region,) = (node for node in graph.nodes if node.target is torch.ops.moeops.ep_region)
    return region.args[-2:], len(region.args[2])


def test_degrees_are_set(monkeypatch):
    monkeypatch.setattr("moeops.compile.degrees.process_group", lambda name: None)
    # Chunks that are under way stay while there are as many, and are begun in the region otherwise.
    for degrees, sites, num_tables in (((2, 2), 0, 4), ((2, 3), 1, 4), ((3, 2), 1, 2)):
        graph = region_graph("gather", 4, [2, 1, -1], 2, 2)
        assert SetDegrees((), Degrees(*degrees))(graph) == sites
        assert degrees_of(graph) == (degrees, num_tables)
        gathers = [node for node in graph.nodes if "all_gather" in str(node.target)]
        assert len(gathers) == num_tables - 2
    graph = region_graph("exact", 3, [4, 6], 4, 6)
    assert SetDegrees((), Degrees(3, 2))(graph) == 1
    assert degrees_of(graph) == ((3, 2), 3)
    with pytest.raises(
        ValueError, match=r"SetDegrees: degrees must cut where .* got 5. Build the layer"
    ):
        SetDegrees((), Degrees(5, 5))(graph)
    with pytest.raises(
        RuntimeError, match=r"chunks of the model's layers, 2, \(2, 3\), got \(4, 6\)"
    ):
        SetDegrees((Degrees(2, 2), Degrees(2, 3)))(region_graph("exact", 3, [4, 6], 4, 6))


def test_chunks_that_have_passed_a_link_are_dropped_with_what_they_passed(monkeypatch):
    """Those of buffers that were sent inside a node before the region."""
    monkeypatch.setattr("moeops.compile.degrees.process_group", lambda name: None)
    graph = region_graph("static", 0, [], 2, 2)
    (region,) = (n for n in graph.nodes if n.target is torch.ops.moeops.ep_region)
    ops = torch.ops._c10d_functional
    x = next(iter(graph.nodes))
    with graph.inserting_before(region):
        begun = []
        for _ in range(2):
            inside = graph.call_function(ops.all_to_all_single, (x, [1], [1], "inside"))
            came = graph.call_function(
                torch.neg, (graph.call_function(ops.wait_tensor, (inside,)),)
            )
            begun.append(graph.call_function(ops.all_to_all_single, (came, [1], [1], "across")))
    region.update_arg(2, begun)
    assert SetDegrees((), Degrees(2, 3))(graph) == 1
    assert len(graph.nodes) == 11
    assert SetDegrees((), Degrees(3, 3))(graph) == 1
    assert degrees_of(graph) == ((3, 3), 0)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


def test_a_region_without_a_group_is_refused():
    for degrees in (None, Degrees(2, 2)):
        with pytest.raises(
            RuntimeError, match=r"SetDegrees: a region must belong to .*'no such group'"
        ):
            SetDegrees((Degrees(2, 2),), degrees)(region_graph("static", 0, [], 2, 2))


def test_a_region_without_a_group_for_one_of_its_links_is_refused(monkeypatch):
    known = []

    def find(name):
        if name not in known:
            raise ValueError("unknown")

    monkeypatch.setattr("moeops.compile.degrees.process_group", find)
    names = [argument.name for argument in torch.ops.moeops.ep_region.default._schema.arguments]
    for lacking in ("group", "inside", "across"):
        known[:] = [name for name in ("group", "inside", "across") if name != lacking]
        graph = region_graph("static", 0, [], 2, 2, group="group")
        (region,) = (n for n in graph.nodes if n.target is torch.ops.moeops.ep_region)
        for name, value in (("inside_name", "inside"), ("across_name", "across"), ("node_size", 1)):
            region.update_arg(names.index(name), value)
        with pytest.raises(RuntimeError, match=f"SetDegrees: a region must .* got '{lacking}'"):
            SetDegrees((Degrees(2, 2),))(graph)
    known[:] = ["group", "inside", "across"]
    assert SetDegrees((Degrees(2, 2),))(graph) == 0


def test_degrees_are_part_of_what_a_pass_is_known_by():
    passes = [SetDegrees(()), SetDegrees((Degrees(2, 3),)), SetDegrees((), Degrees(2, 3))]
    assert len({str(one.uuid()) for one in passes}) == 3
    assert len({pickle.dumps(PassList([one])) for one in passes}) == 3


def test_unknown_degrees_are_refused():
    layer = FMoETransformerMLP(4, 8, 16)
    for degrees, message in (
        (0, "options: n_chunks must be at least 1, got 0"),
        ((1, 2, 3), r"options: n_chunks must be one int or a pair .*, got \(1, 2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            options(layer, degrees=degrees)
    with pytest.raises(
        ValueError, match=r'options: passes must have "degrees" .* got \[\'Order\'\]'
    ):
        options(layer, passes=["order"], degrees=2)


def test_passes_are_known_by_source_and_settings():
    """Torch 2.11 keys a pass before autograd by its pickle, and all others by ``uuid``."""

    class Never(Pass):
        hook = LAST

    one, same, other = PassList([Order()]), PassList([Order()]), PassList([])
    assert one.uuid() == same.uuid() != other.uuid()
    assert pickle.dumps(one) == pickle.dumps(same) != pickle.dumps(other)
    assert pickle.loads(pickle.dumps(one)).uuid() == one.uuid()
    assert PassList([Never()]).uuid() != one.uuid()
