"""Checks of exchanges in stages, run by every rank of a group. Four ranks are two nodes of two."""

from __future__ import annotations

import copy
import itertools
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from exchange_checks import DTYPES, problem, tables
from layer_checks import HostReads
from parallel_cases import (
    ROUTINGS,
    all_to_one,
    batch,
    loss_of,
    make,
    step,
    token_counts,
    uneven,
    with_record,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moeops.comm.exchange import all_to_all_rows, exchange_counts
from moeops.dispatch.base import ExpertRanks
from moeops.dispatch.options import build_dispatcher
from moeops.distributed import (
    Hierarchy,
    build_hierarchy,
    hierarchical_all_to_all,
    hierarchical_counts,
)
from processes import Ranks

_built: dict[int, Hierarchy] = {}

LAYERS = (
    {"dispatch": "exact"},
    {"dispatch": "exact", "n_chunks": 3},
    {"dispatch": "static", "capacity": 3},
    {"dispatch": "static", "capacity": 5, "n_chunks": 2},
)


def hierarchies(ranks: Ranks) -> list[Hierarchy]:
    """Nodes of one rank, one node, and with four ranks two nodes of two; in both forms."""
    for node_size in (1, ranks.size, ranks.size // 2):
        if node_size not in _built:
            _built[node_size] = build_hierarchy(dist.group.WORLD, node_size)
    return [each._replace(form=form) for each in _built.values() for form in ("2d", "leader")]


def staged(ranks: Ranks) -> list[Hierarchy]:
    """Both forms of the arrangement with most stages."""
    return hierarchies(ranks)[-2:]


def in_stages(layer, hierarchy: Hierarchy, **options):
    """A copy of a layer that exchanges in stages."""
    other = copy.deepcopy(layer)
    record = with_record({**options, "hierarchy": hierarchy})["dispatch"]
    other.dispatcher = build_dispatcher(
        record, ExpertRanks("FMoE", layer.num_expert, layer.moe_ranks)
    )
    return other


def value_and_gradient(function, rows, direction):
    rows = rows.detach().requires_grad_()
    received = function(rows)
    (grad,) = torch.autograd.grad(received, rows, direction)
    return received.detach(), grad


def assert_identical(actual, expected, what) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype, what
        assert torch.equal(one, other), what


def check_equals_flat_exchange(ranks: Ranks) -> None:
    """Rows and gradients, to the bit."""
    for name, table in tables(ranks.size).items():
        for shape in ((5,), (), (2, 3), (0,)):
            rows, sends, receives, expected = problem(ranks, table, *shape)
            direction = torch.randn(expected.shape, device=ranks.device)
            splits = (sends, receives)
            flat = value_and_gradient(
                lambda x, s=splits: all_to_all_rows(x * 3, *s, dist.group.WORLD), rows, direction
            )
            for hierarchy in hierarchies(ranks):
                counts = torch.tensor(sends, device=ranks.device)
                received_counts, middle = hierarchical_counts(counts, hierarchy)
                assert received_counts.tolist() == receives
                for known in (None, middle.tolist()):
                    staged = value_and_gradient(
                        lambda x, s=splits, h=hierarchy, m=known: hierarchical_all_to_all(
                            x * 3, *s, h, middle_splits=m
                        ),
                        *(rows, direction),
                    )
                    assert_identical(staged, flat, (name, shape, hierarchy))


def check_second_gradient(ranks: Ranks) -> None:
    rows, sends, receives, _ = problem(ranks, tables(ranks.size)["uneven"], 2)
    rows = rows.double().requires_grad_()
    for hierarchy in staged(ranks):
        cubes = hierarchical_all_to_all(rows, sends, receives, hierarchy).pow(3)
        (grad,) = torch.autograd.grad(cubes.sum(), rows, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), rows)
        torch.testing.assert_close(grad, 3 * rows.square())
        torch.testing.assert_close(second, 6 * rows)


def check_every_dtype(ranks: Ranks) -> None:
    rows, sends, receives, expected = problem(ranks, tables(ranks.size)["uneven"], 5)
    for dtype, hierarchy in itertools.product(DTYPES, staged(ranks)):
        received = hierarchical_all_to_all(rows.to(dtype), sends, receives, hierarchy)
        assert received.dtype == dtype
        assert torch.equal(received.to(torch.complex64), expected.to(dtype).to(torch.complex64))


def check_equal_parts(ranks: Ranks) -> None:
    """Nothing but rows travels."""
    for length, hierarchy in itertools.product((3, 0), hierarchies(ranks)):
        table = [[length] * ranks.size] * ranks.size
        rows, _, _, expected = problem(ranks, table, 2)
        with Collectives() as seen:
            received = hierarchical_all_to_all(rows, None, None, hierarchy)
        assert torch.equal(received, expected)
        assert len(seen.groups) == stages(hierarchy)


def check_counts(ranks: Ranks) -> None:
    counts = torch.arange(ranks.size * 6).view(ranks.size, 3, 2) + 100 * ranks.rank
    expected = exchange_counts(counts.to(ranks.device), dist.group.WORLD)
    for hierarchy in hierarchies(ranks):
        received, middle = hierarchical_counts(counts.to(ranks.device), hierarchy)
        assert_identical([received], [expected], hierarchy)
        assert middle.shape == (hierarchy.num_middle, 3, 2)


class Collectives(TorchDispatchMode):
    """The groups of the exchanges, in the order in which they begin, and that of all events."""

    def __init__(self):
        super().__init__()
        self.groups, self.events = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            self.groups.append(args[3])
            self.events.append(args[3])
        elif "moe_mlp" in str(func):
            self.events.append("experts")
        return func(*args, **(kwargs or {}))


def stages(hierarchy: Hierarchy) -> int:
    """Collectives of one exchange on this rank."""
    if hierarchy.is_flat:
        return 1
    return 3 if hierarchy.form == "leader" and hierarchy.inside.rank == 0 else 2


def check_number_of_collectives(ranks: Ranks) -> None:
    """One inside and one between nodes for "2d"; for "leader" two inside, and between nodes one of leaders only."""
    rows, sends, receives, expected = problem(ranks, tables(ranks.size)["uneven"], 2)
    rows.requires_grad_()
    for hierarchy in hierarchies(ranks):
        inside, across = hierarchy.inside.name, hierarchy.across.name
        names = [inside, across]
        if hierarchy.form == "leader":
            names = [inside, across, inside] if hierarchy.inside.rank == 0 else [inside] * 2
        if hierarchy.is_flat:
            names = [hierarchy.group.name]
        assert len(names) == stages(hierarchy)
        middle = hierarchical_counts(torch.tensor(sends, device=ranks.device), hierarchy)[1]
        with Collectives() as forward:
            received = hierarchical_all_to_all(
                rows, sends, receives, hierarchy, middle_splits=middle.tolist()
            )
        with Collectives() as backward:
            received.backward(expected)
        assert forward.groups == names
        assert backward.groups == names[::-1]
        with Collectives() as asked:
            hierarchical_all_to_all(rows, sends, receives, hierarchy)
        assert asked.groups == (names if hierarchy.is_flat else names * 2)


def sums_by_node(hierarchy: Hierarchy, options: dict) -> bool:
    """Tokens of fused experts go to each node once, and come back as its sum."""
    return options["dispatch"] == "exact" and hierarchy.form == "2d" and not hierarchy.is_flat


def check_layers_equal_flat_layers(ranks: Ranks) -> None:
    """Outputs and gradients, to the bit where no node adds up what its ranks made of a token."""
    for kind, options in zip(("mlp", "nested", "mlp", "nested"), LAYERS, strict=True):
        torch.manual_seed(1 + ranks.rank)
        flat = make(kind, 2, ranks.device, world_size=ranks.size, **options)
        layers = [in_stages(flat, hierarchy, **options) for hierarchy in staged(ranks)]
        built = make(
            kind, 2, ranks.device, world_size=ranks.size, hierarchy=staged(ranks)[0], **options
        )
        built.load_state_dict(flat.state_dict())
        layers.append(built)
        cuts = token_counts(ranks.size)
        del cuts["equal"]
        for counts, routing in itertools.product(cuts.values(), (uneven, all_to_one)):
            x = batch(counts[ranks.rank], ranks.device) + ranks.rank
            x[:, 0] -= ranks.rank
            expected = step(flat, flat, kind, x, routing)
            for layer in layers:
                actual = step(layer, layer, kind, x, routing)
                assert actual.keys() == expected.keys()
                hierarchy = layer.dispatcher.hierarchy
                what = (kind, options, hierarchy, counts, routing.__name__)
                if kind == "mlp" and sums_by_node(hierarchy, options):
                    torch.testing.assert_close(actual, expected, msg=lambda t, w=what: f"{w}: {t}")
                else:
                    assert_identical(actual.values(), expected.values(), what)


def check_one_host_copy(ranks: Ranks) -> None:
    """As many as the flat layer has."""
    for options, hierarchy in itertools.product(LAYERS, hierarchies(ranks)):
        flat = make("mlp", 2, ranks.device, world_size=ranks.size, **options)
        layer = in_stages(flat, hierarchy, **options)
        x = batch(6, ranks.device).requires_grad_()
        with HostReads() as reads:
            loss_of(layer(x)).backward()
        copies = int(options["dispatch"] == "exact")
        assert reads.names == ["cpu", "tolist"] * copies


def check_stage_between_nodes_is_in_flight(ranks: Ranks) -> None:
    """It begins for all chunks before the first expert runs, and first of all where rows return."""
    for hierarchy in staged(ranks):
        flat = make("mlp", 2, ranks.device, world_size=ranks.size)
        for options in (
            {"dispatch": "exact", "n_chunks": 2},
            {"dispatch": "static", "capacity": 6, "n_chunks": 2},
        ):
            exact = options["dispatch"] == "exact"
            if sums_by_node(hierarchy, options):
                continue  # two_link_checks.py has those
            counted = stages(hierarchy) if exact else 0
            layer = in_stages(flat, hierarchy, **options)
            with Collectives() as forward:
                layer(batch(9, ranks.device))
            if hierarchy.is_flat or (hierarchy.form == "leader" and hierarchy.inside.rank != 0):
                continue  # no stage between nodes on this rank
            events = forward.events[counted:]
            first = events.index("experts")
            # Of each chunk tokens, and for the exact dispatcher what the gate chose for them.
            assert events[:first].count(hierarchy.across.name) == (4 if exact else 2), events
            if hierarchy.form == "2d":
                assert events[first + 1] == hierarchy.across.name, events


def check_functions_compiled(ranks: Ranks) -> None:
    """Sizes known and unknown to the compiler, in one graph each; nothing hides the collectives."""
    two_d, _ = staged(ranks)
    if two_d.is_flat:
        return  # exchange_checks.py compiles that
    for hierarchy, backend in ((two_d, "inductor"),):
        torch._dynamo.reset()

        def run(rows, counts, hierarchy=hierarchy):
            received = hierarchical_counts(counts, hierarchy)[0]
            sends, receives = torch.stack([counts, received]).cpu().tolist()
            return hierarchical_all_to_all(torch.tanh(rows), sends, receives, hierarchy) * 2

        counter = CompileCounterWithBackend(backend)
        compiled = torch.compile(run, fullgraph=True, backend=counter)
        for name, table in tables(ranks.size).items():
            rows, sends, _, moved = problem(ranks, table, 5)
            counts = torch.tensor(sends, device=ranks.device)
            torch._dynamo.decorators.mark_unbacked(rows, 0)
            direction = torch.randn(moved.shape, device=ranks.device)
            expected = value_and_gradient(lambda x, c=counts: run(x, c), rows, direction)
            torch.testing.assert_close(expected[0], 2 * torch.tanh(moved))
            rows = rows.detach().requires_grad_()
            torch._dynamo.decorators.mark_unbacked(rows, 0)
            received = compiled(rows, counts)
            (grad,) = torch.autograd.grad(received, rows, direction)
            torch.testing.assert_close((received, grad), expected, msg=f"{name} {hierarchy}")
        assert counter.frame_count == 1


def check_layers_compiled(ranks: Ranks) -> None:
    """One graph for any number of tokens. Chunks that the ranks of a group sent in another order would differ."""
    two_d, leader = staged(ranks)
    if two_d.is_flat:
        return  # compile_checks.py compiles that
    cases = (
        (leader, {"dispatch": "exact", "n_chunks": 2}),
        (two_d, {"dispatch": "static", "capacity": 12}),
    )
    for hierarchy, options in cases:
        torch._dynamo.reset()
        flat = make("mlp", 2, ranks.device, world_size=ranks.size, **options)
        layer = in_stages(flat, hierarchy, **options)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)

        def run(inp, compiled=compiled):
            torch._dynamo.decorators.mark_unbacked(inp, 0)
            return compiled(inp)

        for counts, routing in zip(token_counts(ranks.size).values(), ROUTINGS, strict=False):
            x = batch(counts[ranks.rank], ranks.device)
            expected = step(flat, flat, "mlp", x, routing)
            torch.testing.assert_close(step(run, layer, "mlp", x, routing), expected)
        assert counter.frame_count == 1


def check_graph_shows_functional_collectives(ranks: Ranks) -> None:
    """Below autograd every stage is torch's own collective."""
    rows, sends, receives, _ = problem(ranks, [[2] * ranks.size] * ranks.size, 2)
    for hierarchy in hierarchies(ranks):
        middle = [2] * hierarchy.num_middle

        def run(rows, hierarchy, middle):
            return hierarchical_all_to_all(rows, sends, receives, hierarchy, middle_splits=middle)

        graph = make_fx(partial(run, hierarchy=hierarchy, middle=middle), tracing_mode="fake")(
            rows
        ).graph
        targets = [str(node.target) for node in graph.nodes]
        for name in ("all_to_all_single", "wait_tensor"):
            assert targets.count(f"_c10d_functional.{name}.default") == stages(hierarchy)


def check_arrangements_that_do_not_fit(ranks: Ranks) -> None:
    """An error on every rank, before any group is made."""
    group, last = dist.group.WORLD, ranks.rank == ranks.size - 1
    match = re.escape(
        f"node_size must divide the number of ranks, got 3 and group '0' (rank {ranks.rank}"
    )
    with pytest.raises(ValueError, match=match):
        build_hierarchy(group, 3)
    for node_size in (0, -2):
        with pytest.raises(ValueError, match=f"node_size must be at least 1, got {node_size}"):
            build_hierarchy(group, node_size)
    with pytest.raises(ValueError, match=r"form must be one of .* got '3d'"):
        build_hierarchy(group, 1, "3d")
    error = (
        (ValueError, "must divide")
        if last
        else (RuntimeError, f"an error on rank {ranks.size - 1}")
    )
    with pytest.raises(error[0], match=error[1]):
        build_hierarchy(group, 3 if last else 1)
    with pytest.raises(ValueError, match="node_size must be the same on every rank"):
        build_hierarchy(group, ranks.size if last else 1)
    with pytest.raises(ValueError, match="form must be the same on every rank"):
        build_hierarchy(group, 1, "leader" if last else "2d")


def check_wrong_arguments(ranks: Ranks) -> None:
    hierarchy = staged(ranks)[0]
    rows, sends, receives, expected = problem(ranks, tables(ranks.size)["even"], 2)
    with pytest.raises(ValueError, match="output_splits must be None exactly where input_splits"):
        hierarchical_all_to_all(rows, None, receives, hierarchy)
    with pytest.raises(ValueError, match=f"rows must be a multiple of the {ranks.size} ranks"):
        hierarchical_all_to_all(rows[1:], None, None, hierarchy)
    with pytest.raises(ValueError, match="form must be one of"):
        hierarchical_all_to_all(rows, sends, receives, hierarchy, "1d")
    with pytest.raises(ValueError, match="hierarchical_all_to_all: input_splits must add up to"):
        hierarchical_all_to_all(rows, [1] * ranks.size, receives, hierarchy)
    with pytest.raises(ValueError, match=f"hierarchical_counts|exchange_counts.*{ranks.size}"):
        hierarchical_counts(rows[: ranks.size + 1], hierarchy)
    if not hierarchy.is_flat:
        with pytest.raises(ValueError, match="middle_splits must have 4 entries for form='2d'"):
            hierarchical_all_to_all(rows, sends, receives, hierarchy, middle_splits=[1])
    other = hierarchy._replace(group=hierarchy.group._replace(name="another"))
    part = make("mlp", 2, ranks.device, world_size=ranks.size)
    for dispatch in ({"dispatch": "exact"}, {"dispatch": "static", "capacity": 1}):
        with pytest.raises(ValueError, match="hierarchy must arrange the ranks that hold"):
            in_stages(part, other, **dispatch)
        with pytest.raises(TypeError, match="hierarchy must be a Hierarchy or None, got 2"):
            in_stages(part, 2, **dispatch)
    assert torch.equal(hierarchical_all_to_all(rows, sends, receives, hierarchy), expected)
