"""Checks of experts whose weights travel, run by every rank of a group."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from compile_checks import run_case
from layer_checks import HostReads, Order, assert_same_on_own_tokens
from parallel_cases import (
    ROUTINGS,
    all_to_one,
    assert_equals_whole,
    batch,
    dropped,
    even,
    loss_of,
    make,
    make_pair,
    step,
    token_counts,
    uneven,
    with_record,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moeops import FMoE, FMoETransformerMLP, LoadMonitor
from moeops.cost.model import CostModel
from moeops.distributed import (
    DistributedGroupedDataParallel,
    ShadowPolicy,
    Static,
    build_hierarchy,
)
from moeops.gates import Llama4Gate, SoftMoEGate
from processes import Ranks

# Weights cost nothing, so an expert is taken where it makes the slowest rank any faster.
FREE = ShadowPolicy(1.0, 1.0, 0.0, max_shadows=3)
NEVER = ShadowPolicy(1.0, 1.0, 1e9)


def placements(size: int) -> list[dict]:
    """One with replicas on some ranks only, one with more of them."""
    last = 2 * size - 1
    if size == 2:
        return [{0: 1}, {0: (1,), 2: 0, last: (0,)}]
    return [{0: (1, 3), 1: 3}, {0: (1, 2, 3), 5: (0,), last: (1, 0, 2), 2: 3}]


def few(ranks: Ranks) -> dict:
    return {"replicas": placements(ranks.size)[0]}


def many(ranks: Ranks) -> dict:
    return {"replicas": placements(ranks.size)[1]}


def check_equals_one_rank(ranks: Ranks) -> None:
    cases = [
        ("mlp", {"shadowing": FREE}),
        ("mlp", few(ranks)),
        ("nested", {"shadowing": FREE, "n_chunks": 3}),
        ("modules", {**many(ranks), "n_chunks": 2}),
        ("composed", {**many(ranks), "dispatch": "static", "capacity": 12, "n_chunks": 2}),
        ("modules", {"shadowing": FREE}),
        ("nested", {**few(ranks), "dispatch": "static", "capacity": 12}),
        ("composed", {"shadowing": ShadowPolicy(0.0, 1.0, 0.0, max_shadows=9)}),
    ]
    for kind, options in cases if ranks.size == 2 else cases[:5]:
        part, whole = make_pair(kind, ranks, **options)
        for counts, routing in itertools.product(token_counts(ranks.size).values(), ROUTINGS):
            assert_equals_whole(part, part, whole, kind, ranks, counts, routing)


def check_one_graph_that_equals_one_rank(ranks: Ranks) -> None:
    cases = [("mlp", "aot_eager", {"shadowing": FREE})]
    if ranks.size == 2:
        cases = [
            ("mlp", "inductor", {"shadowing": FREE}),
            ("modules", "aot_eager", few(ranks)),
        ]
    for case in cases:
        run_case(ranks, *case)


class Counted(nn.Module):
    """An expert that asks for the number of its rows."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, 3)

    def forward(self, rows, count):
        assert rows.shape[0] == int(count)
        return self.linear(rows)


def check_experts_that_ask_for_counts(ranks: Ranks) -> None:
    for options in ({"shadowing": FREE}, many(ranks)):
        part, whole = make_pair("modules", ranks, expert=Counted, **options)
        counts = [3 + 2 * rank for rank in range(ranks.size)]
        assert_equals_whole(part, part, whole, "modules", ranks, counts, all_to_one)


def check_other_gates_and_paths(ranks: Ranks) -> None:
    """Weights on inputs, stages over nodes, a mask, slices, activation checkpointing."""
    for options in ({"shadowing": FREE}, many(ranks)):
        part, whole = make_pair("mlp", ranks, gate=Llama4Gate, **options)
        assert_same_on_own_tokens(part, whole, "mlp", ranks, 8, None)
        hierarchy = build_hierarchy(dist.group.WORLD, ranks.size // 2)
        part, whole = make_pair("mlp", ranks, hierarchy=hierarchy, **options)
        counts = [3 + 2 * rank for rank in range(ranks.size)]
        assert_equals_whole(part, part, whole, "mlp", ranks, counts, all_to_one)
        x = batch(6, ranks.device).requires_grad_()
        whole.gate.set_routing(all_to_one)
        mask = torch.tensor([0, 1, 0, 2, 0, 1], device=ranks.device)
        torch.testing.assert_close(part(x, mask), whole(x, mask))
        plain = torch.autograd.grad(loss_of(part(x)), [x, *part.parameters()])
        again = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
        again = torch.autograd.grad(loss_of(again), [x, *part.parameters()])
        for actual, expected in zip(again, plain, strict=True):
            assert torch.equal(actual, expected)
        for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert torch.equal(other(x), part(x))
        assert part.state_dict().keys() == whole.state_dict().keys()
        sliced, whole = make_pair("mlp", ranks, slice_group=dist.group.WORLD, **options)
        sliced.gate.set_routing(all_to_one)
        whole.gate.set_routing(all_to_one)
        x = batch(4 * ranks.size + 1, ranks.device)
        torch.testing.assert_close(sliced(x), whole(x))


def check_half_precision(ranks: Ranks) -> None:
    for options in ({"shadowing": FREE}, many(ranks)):
        part, whole = make_pair("mlp", ranks, dtype=torch.bfloat16, **options)
        part.gate.set_routing(all_to_one)
        whole.gate.set_routing(all_to_one)
        x = batch(6, ranks.device, torch.bfloat16) / 6
        y = part(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, whole(x), rtol=0.02, atol=0.02)


def check_training(ranks: Ranks) -> None:
    """Steps with gradients reduced during the backward: the parameters are those of one rank."""
    for options in ({"shadowing": FREE}, many(ranks)):
        part, whole = make_pair("mlp", ranks, **options)
        wrapped = DistributedGroupedDataParallel(part, auto_allreduce=True)
        x = batch(6 * ranks.size, ranks.device)
        for model, layer, scale in ((wrapped, part, 1.0), (whole, whole, 1.0 / ranks.size)):
            layer.gate.set_routing(uneven)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            inp = ranks.split(x) if model is wrapped else x
            for _ in range(2):
                optimizer.zero_grad()
                (loss_of(model(inp)) * scale).backward()
                optimizer.step()
        first = 2 * ranks.rank
        for (name, actual), expected in zip(
            part.named_parameters(), whole.parameters(), strict=True
        ):
            mine = expected[first : first + 2] if name.startswith("experts.") else expected
            torch.testing.assert_close(actual, mine, msg=lambda t, n=name: f"{n}: {t}")


def check_host_copies(ranks: Ranks) -> None:
    """One with exact dispatch, whatever travels, and none with static."""
    static = {"dispatch": "static", "capacity": 12}
    for kind, options in itertools.product(
        ("mlp", "modules"), ({"shadowing": FREE}, many(ranks), {**many(ranks), **static})
    ):
        part, _ = make_pair(kind, ranks, **options)
        part.gate.set_routing(all_to_one)
        x = batch(6, ranks.device).requires_grad_()
        with HostReads() as reads:
            loss_of(part(x)).backward()
        expected = [] if options.get("dispatch") == "static" else ["cpu", "tolist"]
        assert reads.names == expected, (kind, options, reads.names)


def check_order_of_exchanges(ranks: Ranks) -> None:
    """All ranks start the same exchanges in the same order, those without tokens too, and weights travel early."""
    counts = ["wait", "send", "wait"]  # gathered for the decision, exchanged for the sizes
    # Two weights and two biases, each in two stages.
    begun = ["send"] * 4 + ["wait"] * 4 + ["send"] * 4
    there = [*counts, *["send"] * 2, *begun]  # tokens, and what the gate chose for them
    shadow = [*there, *["wait"] * 2, "experts", "send", *["wait"] * 4, "experts", "wait"]
    back = ["send", "experts", *["weights"] * 2, *["send"] * 4]
    for options, forward_order in (({"shadowing": FREE}, shadow), (few(ranks), None)):
        part, _ = make_pair("mlp", ranks, **options)
        part.gate.set_routing(all_to_one)
        for num_tokens in (5, 5 * (ranks.size - 1 - ranks.rank)):  # the owner may have none
            x = batch(num_tokens, ranks.device).requires_grad_()
            with Order() as forward:
                loss = loss_of(part(x))
            with Order() as backward:
                loss.backward()
            starts = [
                [event for event in order.events if event == "send"]
                for order in (forward, backward)
            ]
            every: list = [None] * ranks.size
            dist.all_gather_object(every, (starts, backward.events))
            assert all(other[0] == starts for other in every)
            if forward_order is not None:
                assert forward.events == forward_order, forward.events
                assert backward.events[: len(back)] == back, backward.events
                assert all(other[1] == backward.events for other in every)
            else:
                # Before the gate, and so before anything else.
                assert forward.events[:6] == ["send"] * 5 + ["wait"], forward.events
        assert part.experts.w_up.grad is not None


def check_nothing_travels_without_need(ranks: Ranks) -> None:
    """An even load has no shadows: the exchanges are those of a layer without, and so is a policy that never pays."""
    for routing, policy, some in (
        (even, FREE, False),
        (all_to_one, NEVER, False),
        (all_to_one, FREE, True),
    ):
        part, _ = make_pair("mlp", ranks, shadowing=policy)
        plain, _ = make_pair("mlp", ranks)
        seen: list = []
        part.dispatcher.hooks += (seen.append,)
        events = []
        for layer in (part, plain):
            layer.gate.set_routing(routing)
            with Order() as order:
                loss_of(layer(batch(2 * ranks.size, ranks.device).requires_grad_())).backward()
            events.append(order.events)
        # But for the counts, which are gathered first; a layer without is a region, which has an order of its own.
        assert (Counter(events[0]) != Counter(["wait", *events[1]])) == some
        last = 2 * ranks.size - 1
        assert seen[0].tolist() == [some and expert == last for expert in range(last + 1)]
    # Everyone's tokens went to the last expert, whose owner did not have to compute them.
    monitor = LoadMonitor(part)
    part(batch(4, ranks.device))
    assert monitor.summary(dist.group.WORLD)[""].loads[-1] == 4 * ranks.size


def check_hooks_in_a_graph(ranks: Ranks) -> None:
    if ranks.size > 2:  # the same on any number, and a graph takes seconds
        return
    torch._dynamo.reset()
    part, _ = make_pair("mlp", ranks, shadowing=FREE)
    part.gate.set_routing(all_to_one)
    seen: list = []
    # torch 2.11 cannot trace list.append itself.
    part.dispatcher.hooks += (lambda chosen: seen.append(chosen),)
    torch.compile(part, fullgraph=True, backend="eager")(batch(4, ranks.device))
    assert seen[0].nonzero().flatten().tolist() == [2 * ranks.size - 1]


def check_replicas_share_the_load(ranks: Ranks) -> None:
    """Pairs of an expert that is everywhere stay; ranks that do not hold one send as many to each that does."""
    last = 2 * ranks.size - 1
    computed = []

    def count(layer, rows, expert_offsets, counts):
        computed.append(expert_offsets[-1].item())
        return type(layer)._run_experts(layer, rows, expert_offsets, counts)

    for holders, others in ((range(ranks.size - 1), 0), ((0,), ranks.size - 2)):
        part, _ = make_pair("modules", ranks, replicas={last: holders})
        part._run_experts = partial(count, part)  # called for a rank's own experts
        part.gate.set_routing(all_to_one)
        computed.clear()
        part(batch(10, ranks.device))
        assert computed == [10 + 5 * others if ranks.rank == ranks.size - 1 else 0]


def check_float_capacity_counts_experts(ranks: Ranks) -> None:
    """Slots of replicas do not make the buffers smaller."""
    options = {"dispatch": "static", "capacity": 1.5}
    plain, _ = make_pair("mlp", ranks, **options)
    part, _ = make_pair("mlp", ranks, **many(ranks), **options)
    assert [part.dispatcher.inner.capacity_of(n) for n in range(50)] == [
        plain.dispatcher.capacity_of(n) for n in range(50)
    ]


class WithBuffer(nn.Linear):
    def __init__(self, d_model):
        super().__init__(d_model, 3)
        self.register_buffer("seen", torch.zeros(1))


def check_what_is_refused(ranks: Ranks) -> None:
    """One error on every rank, and the ranks still work together afterwards."""
    size, last = ranks.size, 2 * ranks.size - 1
    mine = ranks.rank == size - 1
    shadowing = {"shadowing": FREE}
    cases = [
        ("mlp", {"replicas": {0: (0,)}}, ValueError, "must not name an expert's owner, got rank 0"),
        ("mlp", {"replicas": {0: size}}, ValueError, f"got {size} for expert 0"),
        ("mlp", {"replicas": {last + 1: 0}}, ValueError, f"from 0 to {last}, got {last + 1}"),
        ("mlp", {"replicas": {0: (1, 1)}}, ValueError, "name a rank once"),
        ("mlp", {"replicas": {0: "1"}}, TypeError, "by ints, got '1'"),
        ("mlp", {"replicas": [(0, 1)]}, TypeError, "must be a dict of expert to ranks"),
        ("mlp", {"replicas": {0: 1} if mine else {1: 1}}, ValueError, "replicas must be the same"),
        ("mlp", {"shadowing": NEVER if mine else FREE}, ValueError, "shadowing must be the same"),
        ("mlp", {"shadowing": 3}, TypeError, "must be a ShadowPolicy or None, got 3"),
        ("mlp", {**shadowing, **few(ranks)}, NotImplementedError, "replicas must be None with"),
        (
            "mlp",
            {**shadowing, "expert_tensor_parallel_size": 2},
            NotImplementedError,
            "expert_tensor_parallel_size=2",
        ),
    ]
    for kind, options, error, message in cases:
        with pytest.raises(error, match=message):
            make(kind, 2, ranks.device, world_size=size, **options)
    # Buffers have the same size whatever stays on a rank: there is no such option.
    with pytest.raises(TypeError, match="unexpected keyword argument 'shadowing'"):
        Static(4, shadowing=FREE)
    double = partial(nn.Linear, dtype=torch.float64)
    layer = partial(FMoE, 2, 6, world_size=size, device=ranks.device)
    cases = [
        ([double(6, 3), double(6, 4)], shadowing, "got Linear.* as expert 0 and .* as expert 1"),
        (
            WithBuffer,
            few(ranks),
            "no buffers for replicas, because they would not travel, got 'seen' in expert 0",
        ),
        (nn.Identity, shadowing, "experts must have parameters for shadowing, got Identity"),
    ]
    for expert, options, message in cases:
        with pytest.raises(NotImplementedError, match=message):
            layer(expert=expert, **with_record(options))
    with pytest.raises(NotImplementedError, match=r"got a subclass that sets self\.experts"):
        layer(**with_record(shadowing))
    with pytest.raises(
        NotImplementedError, match=r"activation must have no parameters .* 'activation"
    ):
        FMoETransformerMLP(
            2, 6, 5, nn.PReLU(), world_size=size, device=ranks.device, **with_record(shadowing)
        )
    with pytest.raises(ValueError, match="experts must be the same on every rank"):
        layer(expert=partial(nn.Linear, out_features=3 + mine), **with_record(few(ranks)))
    # Experts that one rank alone has: the others are told.
    error, message = (
        (NotImplementedError, "got 'seen'") if mine else (RuntimeError, "an error on rank")
    )
    expert = WithBuffer if mine else partial(double, out_features=3)
    with pytest.raises(error, match=message):
        layer(expert=expert, **with_record(few(ranks)))
    for options in (shadowing, few(ranks)):
        gate = partial(SoftMoEGate, num_slots=2)
        part, _ = make_pair("mlp", ranks, gate=gate, top_k=1, **options)
        with pytest.raises(NotImplementedError, match="None for a gate that mixes tokens"):
            part(batch(3, ranks.device))
    part, _ = make_pair("mlp", ranks, **few(ranks))
    fully_shard(part.experts, mesh=init_device_mesh(ranks.device.partition(":")[0], (size,)))
    with pytest.raises(NotImplementedError, match="must not be sharded with fully_shard"):
        part(batch(3, ranks.device))
    part, whole = make_pair(
        "mlp",
        ranks,
        shadowing=CostModel.from_rates(
            products_per_second=1e9, link_bytes_per_second=1e6, dtypes=("float64",)
        ),
    )
    x = batch(4, ranks.device)
    for routing in (dropped, all_to_one):
        step(part, part, "mlp", x, routing)
        whole.gate.set_routing(routing)
        torch.testing.assert_close(part(x), whole(x))
