"""Checks of dense gradients that are averaged in the graph, and of their slices, run by every rank of a group."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.distributed as dist
from overlap_checks import CALL, Sleeper, assert_close, measured, predicted
from parallel_cases import TableGate, batch, even, make
from torch import nn
from torch._inductor.utils import run_and_get_code

import moeops
from moeops import FMoE
from moeops.comm.groups import process_group
from moeops.compile import GradientSlices
from moeops.compile.windows import windows_of
from moeops.cost.laws import BytesLaw
from moeops.cost.model import CostModel
from moeops.dispatch.options import Static
from moeops.distributed import AutoChunks, DistributedGroupedDataParallel, Gather
from processes import Ranks
from timed_backend import TimedGroup, start_group

D, TOKENS = 6, 6


class Model(nn.Module):
    """Layers with experts between dense ones; the routers see the tokens' indices, so that routings vary."""

    def __init__(self, ranks: Ranks, **options) -> None:
        super().__init__()
        torch.manual_seed(3)
        dense = [nn.Linear(D, D, dtype=torch.float64, device=ranks.device) for _ in range(3)]
        self.dense = nn.ModuleList(dense)
        layers = [make("mlp", 2, ranks.device, world_size=ranks.size, **options) for _ in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        index = x[:, :1]
        for dense, layer in zip(self.dense, self.layers, strict=False):
            x = torch.cat((index, torch.tanh(dense(x))[:, 1:]), 1)
            x = x + layer(x)
        return self.dense[-1](x)


def gradients(run, model: nn.Module, ranks: Ranks) -> dict[str, torch.Tensor | None]:
    model.zero_grad(set_to_none=True)
    x = batch(TOKENS, ranks.device).requires_grad_()
    (run(x) * (1 + ranks.rank)).square().sum().backward()
    if isinstance(model, DistributedGroupedDataParallel):
        model.allreduce_gradients()
    found = {
        name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()
    }
    return {**found, "x": x.grad}


class Counted(GradientSlices):
    """Notes how many gradients were moved in each graph; ``run`` keeps code of other runs out of the cache."""

    def __init__(self, run: object, *args) -> None:
        super().__init__(*args)
        self.run = str(run)
        self.moved: list[int] = []

    def settings(self):
        return (*super().settings(), self.run)

    def rewrite(self, graph):
        self.moved.append(super().rewrite(graph))
        return self.moved[-1]


def calls_of(code: str) -> str:
    """Collectives that generated code begins, and waits, in order: S send, R reduce, C reduce together, w wait."""
    names = re.findall(r"torch\.ops\._c10d_functional\.(\w+)\.default\(", code)
    letters = {"all_reduce": "R", "all_reduce_coalesced": "C", "wait_tensor": "w"}
    return "".join(letters.get(name.rstrip("_"), "S") for name in names)


def check_averages_in_the_graph_are_those_after_it(ranks: Ranks) -> None:
    """Eager and compiled, with slices of everything known and of what a law says."""
    for options in ({"dispatch": "static", "capacity": 12, "n_chunks": 2}, {"dispatch": "gather"}):
        plain, after = Model(ranks, **options), Model(ranks, **options)
        after = DistributedGroupedDataParallel(after)
        own, expected = gradients(plain, plain, ranks), gradients(after, after, ranks)
        for name, grad in own.items():  # the averages differ from what is averaged
            if "experts" not in name and name != "x":
                assert not torch.allclose(grad, expected[name]), name
        model = DistributedGroupedDataParallel(Model(ranks, **options), in_graph=True)
        torch.testing.assert_close(gradients(model, model, ranks), expected)
        limited = Counted(ranks.folder, BytesLaw(0.0, 1.0), [400.0, 0.0])
        for rewrite in (Counted(ranks.folder), limited)[: 2 if "n_chunks" in options else 1]:
            torch._dynamo.reset()
            settings = moeops.compile.options(model, passes=["order", rewrite])
            compiled = torch.compile(model, fullgraph=True, options=settings)
            got, codes = run_and_get_code(gradients, compiled, model, ranks)
            torch.testing.assert_close(got, expected)
            calls = calls_of(codes[1])
            assert calls.index("C") < calls.index("w"), calls  # behind the last layer's dispatch
            last = max(calls.rfind(letter) for letter in "CRS")
            assert set(calls[last + 1 :]) == {"w"}
            assert calls.count("w") == calls.count("S") + 10
            if rewrite.law is None:
                # Behind each layer's dispatch, at the end, and where something is left behind the last combine.
                assert calls.count("C") in (3, 4), calls
            every: list = [None] * ranks.size
            dist.all_gather_object(every, (calls, rewrite.moved))
            assert [order for order, _ in every] == [calls] * ranks.size
            # A rank may find in the cache what another has compiled.
            assert set().union(*(moved for _, moved in every)) == {0, 10}


def check_windows_come_from_the_model_by_name(ranks: Ranks) -> None:
    """Those of the first rank, where ranks have other cost models; by default where there is one."""
    rates = {"products_per_second": 1e9, "memory_bytes_per_second": 1e9, "dtypes": ("float64",)}
    models = [CostModel.from_rates(link_bytes_per_second=n, **rates) for n in (1e9, 2e9)]
    known = {"dispatch": Gather(n_chunks=(2, 3), max_tokens=TOKENS)}
    model = DistributedGroupedDataParallel(Model(ranks, **known), in_graph=True)

    def slices_of(module, **options) -> list[GradientSlices]:
        passes = moeops.compile.options(module, **options)["post_grad_custom_post_pass"].passes
        assert type(passes[-1]) is moeops.compile.Order
        return [one for one in passes if isinstance(one, GradientSlices)]

    for passes in (None, ["gradient_slices", "order"]):
        (one,) = slices_of(model, passes=passes, cost_model=models[ranks.rank])
        expected = windows_of("options", model, models[0])
        assert (one.law, one.windows) == expected
        assert one.windows != windows_of("options", model, models[1]).seconds
    # By its own model, which each layer has chosen its chunks by.
    auto = {"dispatch": Gather(n_chunks=AutoChunks(cost_model=models[0]), max_tokens=TOKENS)}
    own = DistributedGroupedDataParallel(Model(ranks, **auto), in_graph=True)
    (one,) = slices_of(own)
    assert one.windows == windows_of("options", own, models[0]).seconds
    assert "behind the dispatch of module.layers.1: " in moeops.compile.explain(own)
    assert slices_of(model) == slices_of(Model(ranks, **known), cost_model=models[0]) == []
    with pytest.raises(ValueError, match=r"options: cost_model must know every layer"):
        moeops.compile.options(model, passes=["gradient_slices"])
    last = ranks.rank == ranks.size - 1
    with pytest.raises(ValueError, match=r"options: passes must be the same on every rank"):
        moeops.compile.options(model, passes=["gradient_slices" if last else "order"])
    other = dataclasses.replace(models[0], machine={"cores": 1000, "processor": "a 6502"})
    with pytest.raises(
        (ValueError, RuntimeError), match=r"options: cost_model must be a profile of"
    ):
        moeops.compile.options(model, cost_model=models[0] if last else other)
    with pytest.raises((TypeError, RuntimeError), match=r"options: cost_model must be a CostModel"):
        moeops.compile.options(model, cost_model=3 if last else None)


class Slow(nn.Module):
    """A layer of experts that sleep, and a dense one behind it."""

    def __init__(self, group: TimedGroup) -> None:
        super().__init__()
        width = 8
        self.moe = FMoE(
            1, width, expert=Sleeper, world_size=2, moe_group=group, top_k=2, gate=TableGate,
            dispatch=Static(capacity=24),
        )  # fmt: skip
        self.moe.mark_parallel_comm("none")
        self.moe.gate.set_routing(even)
        self.dense = nn.Linear(width, width)

    def forward(self, x):
        return self.dense(self.moe(x))


def check_slices_take_no_time_beside_experts(ranks: Ranks) -> None:
    """Sums of 50 ms on links of their own: behind the backward in eager mode, beside experts in compiled code."""
    reduce_seconds = 0.05
    experts, data = start_group(), start_group()
    model = DistributedGroupedDataParallel(
        Slow(experts), in_graph=True, dp_group=data, gate_group=None
    )
    (own,) = model._own_groups.values()
    assert process_group(own.group_name) is own
    forward, backward = predicted(1)
    own.set_link(reduce_seconds)
    exposed = [forward, backward + 2 * reduce_seconds]  # of weight and bias
    assert_close(measured(model, experts, exposed), exposed, "eager")
    settings = moeops.compile.options(model, passes=["order", GradientSlices()])
    compiled = torch.compile(model, fullgraph=True, options=settings)
    own.set_link()
    x = torch.zeros(24, 8)
    x[:, 0] = torch.arange(24)
    compiled(x.requires_grad_()).sum().backward()
    own.set_link(reduce_seconds)
    experts.set_link(CALL)
    compiled(x).sum().backward()
    (reduction,) = own.sent
    *_, combine = experts.sent
    assert reduction.op == "all_reduce"
    assert reduction.begun < combine.begun
    hidden = [forward, backward]
    assert_close(measured(compiled, experts, hidden), hidden, "compiled")
