"""Checks of layers with a shared expert, run by every rank of a group."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.distributed as dist
from parallel_cases import (
    D,
    H,
    all_to_one,
    assert_equals_whole,
    batch,
    loss_of,
    make_pair,
    token_counts,
    uneven,
)
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from moeops import FMoETransformerMLP
from moeops.distributed import DistributedGroupedDataParallel, ShadowPolicy
from processes import Ranks

# Room for every pair; every expert that pays travels.
SHADOWS = ShadowPolicy(row_seconds=1.0, exchange_seconds=1.0, fetch_seconds=1.0)
CASES = (
    ("mlp", {"dispatch": "exact", "n_chunks": 2, "shared_expert": 7}),
    ("composed", {"dispatch": "static", "capacity": 12, "shared_expert": 7}),
    ("mlp", {"dispatch": "gather", "rows": 4.0, "max_tokens": 11, "shared_expert": 7}),
    ("modules", {"dispatch": "exact", "shared_expert": lambda d_model: nn.Linear(d_model, 3)}),
    ("mlp", {"shadowing": SHADOWS, "shared_expert": 7}),
    ("modules", {"replicas": {0: 1}, "shared_expert": lambda d_model: nn.Linear(d_model, 3)}),
)


def check_equals_one_rank(ranks: Ranks) -> None:
    for (kind, options), form in zip(CASES, itertools.cycle(("sigmoid", "softmax", None))):
        part, whole = make_pair(kind, ranks, shared_expert_gate=form, **options)
        for counts, routing in itertools.product(
            token_counts(ranks.size).values(), (uneven, all_to_one)
        ):
            assert_equals_whole(part, part, whole, kind, ranks, counts, routing)


class Order(TorchDispatchMode):
    """The order of collectives, of the experts, and of the shared expert's products: it has a width of its own."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        if str(func).startswith(("_c10d_functional.", "moeops.moe_mlp")):
            self.events.append("wait" if name == "wait_tensor" else name)
        elif name in ("addmm", "mm") and {7, 14} & {*args[-2].shape, *args[-1].shape}:
            self.events.append("shared")
        return out


def check_the_shared_expert_runs_while_tokens_travel(ranks: Ranks) -> None:
    """In the backward while gradients of tokens travel back."""
    send, experts, shared = "all_to_all_single", "moe_mlp", "shared"
    for options in (
        {"dispatch": "exact", "n_chunks": 2},
        {"dispatch": "static", "capacity": 6},
        {"dispatch": "gather", "rows": 4.0},
    ):
        part, _ = make_pair("mlp", ranks, shared_expert=7, **options)
        part.gate.set_routing(uneven)
        x = batch(6, ranks.device).requires_grad_()
        with Order() as forward:
            loss = loss_of(part(x))
        with Order() as backward:
            loss.backward()
        events = forward.events
        if options["dispatch"] == "gather":
            assert events[:6] == [ranks.gather, ranks.gather, shared, shared, "wait", "wait"], (
                events
            )
        else:
            first = events.index(shared)
            num_sent = {"exact": 4, "static": 1}[options["dispatch"]]
            assert events[first - num_sent : first] == [send] * num_sent, events
            assert events[first : first + 3] == [shared, shared, "wait"], events
        events = backward.events
        last_experts = len(events) - events[::-1].index(f"{experts}_backward_weights")
        first, last = events.index(shared), len(events) - 1 - events[::-1].index(shared)
        on_the_way = "reduce_scatter_tensor" if options["dispatch"] == "gather" else send
        assert last_experts < first, events
        assert on_the_way in events[last_experts:first], events
        assert "wait" not in events[last_experts:first], events
        assert "wait" in events[last:], events


def check_gradients_are_averaged_as_those_of_dense_parameters(ranks: Ranks) -> None:
    """With slices, over the ranks that have the same tokens too."""
    for slices in (False, True):
        options = {"shared_expert": 7, "shared_expert_gate": "softmax"}
        part, whole = make_pair(
            "mlp", ranks, **options, **({"slice_group": dist.group.WORLD} if slices else {})
        )
        expected = {"gate"} if slices else {"dp"}
        assert {p.dp_comm for p in part.shared_expert.parameters()} == expected
        model = DistributedGroupedDataParallel(part)
        x = batch(4 * ranks.size, ranks.device)
        loss_of(model(x if slices else x.chunk(ranks.size)[ranks.rank])).div(
            1 if slices else 4
        ).backward()
        model.allreduce_gradients()
        loss_of(whole(x)).div(1 if slices else 4 * ranks.size).backward()
        wanted = dict(whole.named_parameters())
        for name, parameter in part.named_parameters():
            if name.startswith("shared_expert"):
                torch.testing.assert_close(parameter.grad, wanted[name].grad)


def check_beside_experts_in_shards(ranks: Ranks) -> None:
    """Every rank has all of the shared expert, and adds it once."""
    torch.manual_seed(3)
    layer = FMoETransformerMLP(
        2,
        D,
        2 * H * ranks.size,
        world_size=ranks.size,
        expert_tensor_parallel_size=ranks.size,
        shared_expert=7,
        dtype=torch.float64,
        device=ranks.device,
    )
    for parameter in (*layer.gate.parameters(), *layer.shared_expert.parameters()):
        dist.broadcast(parameter.data, 0)
    x = batch(5 + ranks.rank, ranks.device)
    y = layer(x)
    shared, layer.shared_expert = layer.shared_expert, None
    torch.testing.assert_close(y, layer(x) + shared(x))


def check_shared_experts_that_differ(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="shared_expert must be the same on every rank"):
        make_pair("mlp", ranks, shared_expert=5 + ranks.rank)


def check_order_in_compiled_code(ranks: Ranks) -> None:
    """The shared expert stands between sends and the first wait, where Inductor keeps the graph's order."""
    if ranks.size > 2:
        return
    for options, sends in (
        ({"dispatch": "static", "capacity": 6}, ["addmm", "all_to_all_single"]),
        (
            {"dispatch": "gather", "rows": 4.0},
            [ranks.gather, "addmm", ranks.gather],
        ),
    ):
        torch._dynamo.reset()
        layer, _ = make_pair("mlp", ranks, shared_expert=7, **options)
        x = batch(6, ranks.device).requires_grad_()
        compiled = torch.compile(layer, fullgraph=True, options={"reorder_for_peak_memory": False})
        _, codes = run_and_get_code(lambda c=compiled, x=x: c(x).square().sum().backward())
        torch.testing.assert_close(compiled(x), layer(x))
        products = r"extern_kernels\.(\w+)\("
        collectives = r"_c10d_functional\.(\w+)\.default\("
        calls = [
            [one or other for one, other in re.findall(f"{products}|{collectives}", code)]
            for code in codes
        ]
        first = calls[0].index("wait_tensor")
        # On CUDA a kernel of its own may add the bias of a product as small as these.
        ahead = ["addmm" if name == "mm" else name for name in calls[0][:first]]
        assert ahead == [*sends, "addmm", "addmm"], calls
        if options["dispatch"] == "static":
            last_send = len(calls[1]) - calls[1][::-1].index("all_to_all_single")
            assert calls[1][last_send : last_send + 4] == ["mm", "mm", "mm", "wait_tensor"], calls
