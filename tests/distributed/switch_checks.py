"""Checks of layers whose parallelism is chosen per call, run by every rank of a group."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from parallel_cases import (
    ROUTINGS,
    D,
    H,
    all_to_one,
    assert_equals_whole,
    batch,
    make,
    make_pair,
    token_counts,
    uneven,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from moeops import FMoE, FMoETransformerMLP
from moeops.dispatch.exact import ExactDispatcher
from moeops.dispatch.gather import GatherDispatcher
from moeops.dispatch.local import LocalDispatcher
from moeops.distributed import Auto, build_hierarchy
from moeops.gates import ExpertChoiceGate, Llama4Gate, SoftMoEGate
from processes import Ranks

CASES = (
    ("mlp", {"dispatch": "exact", "n_chunks": 2}),
    ("composed", {"dispatch": "static", "capacity": 12}),
    ("mlp", {"dispatch": "gather", "rows": 4.0, "n_chunks": (2, 1)}),
    ("modules", {"dispatch": "exact"}),
    ("nested", {"dispatch": "gather", "rows": 4.0}),
)


def degrees_of(ranks: Ranks) -> dict:
    """1, and what is between that and all ranks, if there is something."""
    between = [2] if ranks.size == 4 else []
    return {1: 1, **{size: build_hierarchy(dist.group.WORLD, size) for size in between}}


def check_equals_one_rank(ranks: Ranks) -> None:
    degrees = degrees_of(ranks)
    for kind, options in CASES:
        part, whole = make_pair(kind, ranks, parallel_degrees=list(degrees.values()), **options)
        cuts = token_counts(ranks.size)
        if options["dispatch"] == "gather":
            cuts = {"equal": cuts["equal"]}
        for parallel in (*degrees, ranks.size, None):
            call = partial(part, parallel=parallel)
            for counts in cuts.values():
                for routing in ROUTINGS if parallel == 1 else (uneven, all_to_one):
                    assert_equals_whole(call, part, whole, kind, ranks, counts, routing)


def check_gates_of_other_kinds(ranks: Ranks) -> None:
    """Slots, and weights on inputs: each call's outputs are those of all ranks' experts."""
    degrees = degrees_of(ranks)
    for gate in (SoftMoEGate, Llama4Gate, ExpertChoiceGate):
        options = {"gate": gate, "top_k": 1, "dispatch": "exact"}
        part, whole = make_pair("mlp", ranks, parallel_degrees=list(degrees.values()), **options)
        x = batch(6, ranks.device)
        for parallel in degrees:
            torch.testing.assert_close(part(x, parallel=parallel), whole(x))


class Collectives(TorchDispatchMode):
    """Names of collectives, and of the groups that they are in."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")
        if name[0] == "_c10d_functional" and name[1] != "wait_tensor":
            self.calls.append((name[1], args[-1]))
        return func(*args, **(kwargs or {}))


def check_what_travels(ranks: Ranks) -> None:
    """Data parallelism sends weights alone, before the gate; in between they travel between nodes, tokens inside."""
    degrees = degrees_of(ranks)
    part, _ = make_pair("mlp", ranks, parallel_degrees=list(degrees.values()), dispatch="exact")
    assert isinstance(part._switches[1].inner, LocalDispatcher)
    num_weights = len(list(part.experts.parameters()))
    x = batch(5, ranks.device)
    for parallel, degree in degrees.items():
        across = part.moe_ranks.name if parallel == 1 else degree.across.name
        with Collectives() as seen:
            part(x, parallel=parallel)
        weights = [(ranks.gather, across)] * num_weights
        assert seen.calls[:num_weights] == weights
        rest = {group for _, group in seen.calls[num_weights:]}
        assert rest == (set() if parallel == 1 else {degree.inside.name})
    with Collectives() as seen:
        part(x)
    assert {group for _, group in seen.calls} == {part.moe_ranks.name}
    auto = Auto(equal_tokens=True)  # chooses anew for fewer ranks
    part, _ = make_pair("mlp", ranks, parallel_degrees=list(degrees.values()), dispatch=auto)
    kinds = {2: GatherDispatcher, 4: ExactDispatcher}
    assert type(part.dispatcher) is kinds[ranks.size]
    assert f"parallel_degrees={tuple(degrees)}" in repr(part)
    assert isinstance(part._switches[1].inner, LocalDispatcher)
    if ranks.size == 4:
        assert type(part._switches[2].inner) is GatherDispatcher


def check_hooks(ranks: Ranks) -> None:
    """Hooks see rows in every degree, and are set in all of them or in none."""
    degrees = degrees_of(ranks)
    part, _ = make_pair("mlp", ranks, parallel_degrees=list(degrees.values()), dispatch="exact")
    x = batch(5, ranks.device)
    want = part(x, parallel=1)
    part.set_stage_hooks(
        before_dispatch=lambda rows: 2 * rows, after_dispatch=lambda rows: rows / 2
    )
    for parallel in (*degrees, None):
        torch.testing.assert_close(part(x, parallel=parallel), want)
    part.set_stage_hooks()
    before = part.dispatcher.stage_hooks

    def refuse(hooks):
        if hooks.on_rows:
            raise NotImplementedError("no rows")

    part._switches[1].set_stage_hooks = refuse
    with pytest.raises(NotImplementedError, match="no rows"):
        part.set_stage_hooks(before_dispatch=lambda rows: rows)
    assert part.dispatcher.stage_hooks is part.stage_hooks is before


def check_compiled(ranks: Ranks) -> None:
    """One graph for each degree, for any number of tokens where eager code takes any."""
    degrees = degrees_of(ranks)
    for kind, options in (CASES[0], CASES[3]) if ranks.size == 2 else CASES[:1]:
        torch._dynamo.reset()
        part, whole = make_pair(kind, ranks, parallel_degrees=list(degrees.values()), **options)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(part, fullgraph=True, backend=counter)
        for number, parallel in enumerate(degrees, 1):

            def run(inp, parallel=parallel, compiled=compiled):
                torch._dynamo.decorators.mark_unbacked(inp, 0)
                return compiled(inp, parallel=parallel)

            for name in ("unequal", "one_rank_without"):
                counts = token_counts(ranks.size)[name]
                assert_equals_whole(run, part, whole, kind, ranks, counts, uneven)
            assert counter.frame_count == number


def check_steps_with_changing_degrees(ranks: Ranks) -> None:
    """The parameters stay where they are: an optimizer never notices."""
    degrees = degrees_of(ranks)
    part, whole = make_pair(
        "mlp",
        ranks,
        parallel_degrees=list(degrees.values()),
        shared_expert=7,
        dispatch=Auto(equal_tokens=True),
    )
    for parallel in (1, None, *degrees):
        counts = [6] * ranks.size
        assert_equals_whole(
            partial(part, parallel=parallel), part, whole, "mlp", ranks, counts, uneven
        )
        for layer in (part, whole):
            torch.optim.SGD(layer.parameters(), lr=0.05).step()


def check_refusals(ranks: Ranks) -> None:
    make_mlp = partial(make, "mlp", 2, ranks.device, world_size=ranks.size)
    with pytest.raises(ValueError, match=r"parallel must be one of \[1, \d\], got 3"):
        make_mlp(parallel_degrees=[1])(batch(3, ranks.device), parallel=3)
    with pytest.raises(ValueError, match=r"parallel_degrees must be 1, the .* got 3.*build_hiera"):
        make_mlp(parallel_degrees=[3])
    with pytest.raises(TypeError, match="parallel_degrees must hold ints and hierarchies, got"):
        make_mlp(parallel_degrees=[True])
    with pytest.raises(NotImplementedError, match="parallel_degrees must be empty with replicas"):
        make_mlp(parallel_degrees=[1], replicas={0: 1})
    with pytest.raises(
        NotImplementedError, match="parallel_degrees must be empty with expert_tensor_parallel_size"
    ):
        FMoETransformerMLP(
            2,
            D,
            2 * H * ranks.size,
            world_size=ranks.size,
            expert_tensor_parallel_size=ranks.size,
            parallel_degrees=[1],
        )
    with pytest.raises(
        NotImplementedError, match="experts must have no buffers for parallel_degrees"
    ):
        FMoE(2, D, world_size=ranks.size, expert=nn.BatchNorm1d, parallel_degrees=[1])
    with pytest.raises(NotImplementedError, match="the activation must have no parameters"):
        FMoETransformerMLP(
            2, D, H, activation=nn.PReLU(), world_size=ranks.size, parallel_degrees=[1]
        )
    other = dist.new_group(list(range(ranks.size)))
    with pytest.raises(ValueError, match="hierarchies of the ranks that hold the experts"):
        make_mlp(parallel_degrees=[build_hierarchy(other, 1)])
    with pytest.raises(ValueError, match="parallel_degrees must be the same on every rank"):
        make_mlp(parallel_degrees=[1] if ranks.rank == 0 else [])
    alone = make("mlp", 2, ranks.device, parallel_degrees=[1])
    x = batch(3, ranks.device)
    assert torch.equal(alone(x, parallel=1), alone(x))
