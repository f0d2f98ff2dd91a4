"""Checks of the schedule of expert-parallel layers, eager and compiled, run by every rank of a group."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
import unittest.mock

import pytest
import torch
import torch.distributed as dist
from parallel_cases import TableGate, batch, dropped, make, step, uneven
from torch._inductor.utils import run_and_get_code

from moeops import FMoETransformerMLP
from moeops import compile as schedule
from moeops.comm.order import _rounds
from moeops.cost.model import CostModel
from moeops.dispatch.degrees import Degrees
from moeops.distributed import AutoChunks, Exact, Gather, Static
from moeops.profiling.job import JobLayer
from processes import GROUP_TIMEOUT, Ranks

D, H = 6, 5
PAIRS = [Degrees(*pair) for pair in itertools.product((1, 2, 3, 4), repeat=2)]


def records_of(ranks: Ranks) -> tuple:
    """All dispatchers; those that gather have room for every pair, one by a share that is no whole number of rows."""
    every, most = float(ranks.size), ranks.size - 0.001
    gathers = (Gather(rows=every), Gather(rows=most), Gather(rows=every, max_tokens=13))
    return (Exact(), Static(7), Static(1.25), *gathers)


class IntegerGate(TableGate):
    """Weights are integers, so that sums come out the same in every order."""

    def forward(self, x):
        ids = self.table[x[:, 0].round().long()]
        return ids, self.gate(x).gather(1, ids.clamp(min=0))


def integers(record, ranks: Ranks, **options) -> FMoETransformerMLP:
    """A layer whose numbers are small integers, the same on all ranks."""
    layer = FMoETransformerMLP(
        2,
        D,
        H,
        activation="relu",
        gate=IntegerGate,
        dispatch=record,
        world_size=ranks.size,
        dtype=torch.float64,
        device=ranks.device,
        **options,
    )
    generator = torch.Generator().manual_seed(7 + ranks.rank)
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.randint(-2, 3, parameter.shape, generator=generator)
            parameter.copy_(values)
    return layer


def tokens_of(record, ranks: Ranks) -> torch.Tensor:
    """Integers; other numbers of tokens on other ranks where a dispatcher takes them."""
    unequal = not isinstance(record, Gather) or record.max_tokens is not None
    return batch(11 - 3 * ranks.rank * unequal, ranks.device).mul(2).round()


def one_step(layer, module, x: torch.Tensor, routing) -> dict[str, torch.Tensor]:
    x = x.clone()
    x[:, 0] = torch.arange(len(x))
    return step(module, layer, "mlp", x, routing)


def check_all_pairs_of_degrees_equal_one_chunk(ranks: Ranks) -> None:
    """Outputs and all gradients, to the bit: with integers no order of sums matters."""
    for record, routing in itertools.product(records_of(ranks), (uneven, dropped)):
        layer = integers(record, ranks)
        x = tokens_of(record, ranks)
        expected = one_step(layer, layer, x, routing)
        assert any(value.count_nonzero() for value in expected.values())
        for degrees in PAIRS:
            layer.dispatcher.set_degrees(degrees)
            actual = one_step(layer, layer, x, routing)
            for name, value in expected.items():
                assert torch.equal(actual[name], value), (record, degrees, name)


def check_only_some_gradients(ranks: Ranks) -> None:
    """Tokens, weights of experts, or nothing at all have no gradient."""
    gather = Gather(rows=float(ranks.size), n_chunks=(1, 2))
    for record in (Exact(n_chunks=(2, 3)), Static(7, n_chunks=(3, 1)), gather):
        layer = integers(record, ranks)
        x = tokens_of(record, ranks)
        expected = one_step(layer, layer, x, uneven)
        layer.experts.requires_grad_(False)
        leaf = x.clone()
        leaf[:, 0] = torch.arange(len(x))
        leaf.requires_grad_()
        y = layer(leaf)
        (y * y + y).sum().backward()
        assert torch.equal(leaf.grad, expected["x"])
        layer.experts.requires_grad_()
        layer.gate.requires_grad_(False)
        layer.zero_grad(set_to_none=True)
        y = layer(leaf.detach())
        (y * y + y).sum().backward()
        assert torch.equal(layer.experts.w_up.grad, expected["experts.w_up"])
        assert layer.gate.gate.weight.grad is None
        with torch.no_grad():
            assert torch.equal(layer(leaf), expected["y"])
        layer.requires_grad_()
        (grad,) = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="ep_region: a gradient must be differ"):
            grad.sum().backward()


OPS = {
    "all_to_all_single": "send",
    "all_gather_into_tensor": "gather",
    "reduce_scatter_tensor": "scatter",
    "wait_tensor": "wait",
    "moe_mlp": "experts",
    "moe_mlp_backward_data": "experts",
    "moe_mlp_backward_weights": "weights",
}


def stages_of(code: str) -> list[str]:
    """The stages that generated code calls, in order."""
    calls = re.findall(r"torch\.ops\.(?:_c10d_functional|moeops)\.(\w+)\.default\(", code)
    return [OPS[name] for name in calls if name in OPS]


def check_order_in_generated_code(ranks: Ranks) -> None:
    """All chunks of either direction are sent before its first expert, and each goes back before the next one's."""
    layer = integers(Static(7, n_chunks=(2, 3)), ranks)
    x = tokens_of(Static(7), ranks)
    expected = one_step(layer, layer, x, uneven)
    compiled = torch.compile(layer, fullgraph=True, options=schedule.options(layer))
    actual, codes = run_and_get_code(lambda: one_step(layer, compiled, x, uneven))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    # In the backward the weights' gradients are computed last, while the tokens' travel.
    for code, degree, weights in zip(codes, (2, 3), (0, 6), strict=True):
        chunks = [*["send"] * degree, *["wait", "experts", "send"] * degree]
        wanted = [*chunks, *["weights"] * weights, *["wait"] * degree]
        assert stages_of(code) == wanted
        assert code.index("check_order_") < code.index("all_to_all_single.default(")
    every: list = [None] * ranks.size
    dist.all_gather_object(every, [stages_of(code) for code in codes])
    assert all(other == every[0] for other in every)


def check_gradients_of_tokens_travel_beside_those_of_weights(ranks: Ranks) -> None:
    """In one chunk, too."""
    torch._dynamo.reset()
    layer = integers(Gather(rows=float(ranks.size)), ranks)
    x = tokens_of(Gather(), ranks)
    expected = one_step(layer, layer, x, uneven)
    compiled = torch.compile(layer, fullgraph=True, options=schedule.options(layer))
    actual, codes = run_and_get_code(lambda: one_step(layer, compiled, x, uneven))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    there = "send" if ranks.gather == "all_to_all_single" else "gather"
    back = ["scatter"] * 2  # tokens, and their choices
    assert stages_of(codes[1]) == [there, "wait", "experts", *back, *["weights"] * 2, *["wait"] * 2]


def check_a_pass_sets_degrees(ranks: Ranks) -> None:
    """Those of a layer that gathers, whose chunks are begun before the gate; code from a cache keeps them."""
    layer = integers(Gather(rows=float(ranks.size), n_chunks=2), ranks)
    x = tokens_of(Gather(), ranks)
    expected = one_step(layer, layer, x, uneven)
    counters = torch._dynamo.utils.counters
    for run in ("compiled", "from a cache"):
        torch._dynamo.reset()
        counters.clear()
        options = schedule.options(layer, degrees=(3, 1))
        compiled = torch.compile(layer, fullgraph=True, options=options)
        one_step(layer, compiled, x, uneven)
        with torch.profiler.profile() as profile:
            actual = one_step(layer, compiled, x, uneven)
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (run, name)
        names = [event.name.removeprefix("_c10d_functional::") for event in profile.events()]
        # Tokens of three chunks, all choices, and in the backward the gradients in one.
        assert names.count(ranks.gather) == 3 + 1 + 1, run
        # Sums of three chunks, and gradients of tokens and of weights.
        assert names.count("reduce_scatter_tensor") == 3 + 2, run
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1, dict(counters)


def check_what_passes_refuse(ranks: Ranks) -> None:
    """Degrees without counts, degrees that no layer has, and other degrees on other ranks."""
    exact = integers(Exact(n_chunks=(2, 3)), ranks)
    x = tokens_of(Exact(), ranks)
    for options, message in (
        (schedule.options(exact, degrees=(4, 3)), r"got \(4, 3\). Build the layer with n_chunks="),
        (schedule.options(integers(Exact(n_chunks=2), ranks)), r"layers, 2, got \(2, 3\). Call"),
    ):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=f"SetDegrees: .*{message}"):
            torch.compile(exact, fullgraph=True, options=options)(x)
    last = ranks.rank == ranks.size - 1
    with pytest.raises(ValueError, match=r"options: degrees must be the same on every rank"):
        schedule.options(exact, degrees=2 + last)
    with pytest.raises((ValueError, RuntimeError), match=r"n_chunks must be at least 1, got 0"):
        schedule.options(exact, degrees=0 if last else 2)
    with pytest.raises(ValueError, match="n_chunks must be the same on every rank"):
        integers(Exact(n_chunks=(2, 3 + last)), ranks)


def check_pairs_that_a_layer_cannot_have(ranks: Ranks) -> None:
    x = batch(4, ranks.device)
    for dispatch, kind in itertools.product((Exact, Gather, Static), ("composed", "modules")):
        layer = make(
            kind, 2, ranks.device, world_size=ranks.size, dispatch=dispatch(n_chunks=(1, 2))
        )
        with pytest.raises(NotImplementedError, match=r"n_chunks must be .* got \(1, 2\)"):
            layer(x)
    with pytest.raises(NotImplementedError, match=r"one number .* with replicas, got \(1, 2\)"):
        make(
            "mlp",
            2,
            ranks.device,
            world_size=ranks.size,
            dispatch=Exact(n_chunks=(1, 2), replicas={0: 1}),
        )


def check_lost_pairs_of_chunks(ranks: Ranks) -> None:
    """Chunks of either direction have their share of the rows; what has none is an error in the next forward."""
    if ranks.size > 2:  # the routings are for four experts
        return
    for n_chunks in ((1, 4), (4, 1)):
        layer = integers(Gather(rows=1.0, n_chunks=n_chunks), ranks)
        layer.gate.set_routing(lambda index, num: torch.stack([index % 2, 2 + index % 2], 1))
        x = batch(8, ranks.device).mul(2).round()
        for _ in range(2):
            layer(x)  # each expert has a pair of every second token
        layer.gate.set_routing(
            lambda index, num: torch.stack([index // 4 % 2 * 2, index // 4 % 2 * 2 + 1], 1)
        )
        layer(x)
        with pytest.raises(
            RuntimeError, match=r"got \d+ pairs without a row in the forward before"
        ):
            layer(x)


SLOW_LINKS = CostModel.from_rates(
    products_per_second=1e9,
    link_bytes_per_second=4e8,
    memory_bytes_per_second=1e12,
    dtypes=("float64",),
)
FAST_LINKS = CostModel.from_rates(
    products_per_second=1e9,
    link_bytes_per_second=1e15,
    memory_bytes_per_second=1e12,
    dtypes=("float64",),
)


def check_a_cost_model_chooses(ranks: Ranks) -> None:
    """Rank 0's, for all ranks."""
    for models, many in (((SLOW_LINKS, FAST_LINKS), True), ((FAST_LINKS, SLOW_LINKS), False)):
        chunks = AutoChunks(cost_model=models[ranks.rank > 0], num_tokens=4096)
        for record in (Exact(n_chunks=chunks), Gather(n_chunks=chunks), Static(n_chunks=chunks)):
            layer = integers(record, ranks)
            every: list = [None] * ranks.size
            dist.all_gather_object(every, tuple(layer.dispatcher.degrees))
            assert every == [every[0]] * ranks.size
            assert (min(every[0]) > 1) == many, (record, every)
            assert f"n_chunks {layer.dispatcher.degrees}" in repr(layer)
            text = schedule.explain(layer)
            assert f"chunks: {every[0][0]} forward, {every[0][1]} backward" in text
    with pytest.raises(ValueError, match="num_tokens must be given for a cost model, got None"):
        integers(Exact(n_chunks=AutoChunks(cost_model=FAST_LINKS)), ranks)
    # Without a model the job measures itself.
    with unittest.mock.patch(
        "moeops.dispatch.options.job_model", return_value=FAST_LINKS
    ) as measure:
        layer = integers(Static(4096, n_chunks="auto"), ranks)
    assert measure.call_args.args[1] == JobLayer(D, H, 2, 2, "float64")
    assert layer.dispatcher.degrees == (1, 1)
    assert "case 2: the experts last longest" in schedule.explain(layer)
    other = dataclasses.replace(FAST_LINKS, machine={"cores": 1000, "processor": "a 6502"})
    with pytest.raises((ValueError, RuntimeError), match="must be a profile of this machine"):
        integers(Exact(n_chunks=AutoChunks(cost_model=other, num_tokens=8)), ranks)
    with pytest.raises(
        NotImplementedError, match="n_chunks must be a number for experts that are modules"
    ):
        make("modules", 2, ranks.device, world_size=ranks.size, dispatch=Exact(n_chunks=chunks))


def check_another_order_is_an_error_on_every_rank(ranks: Ranks) -> None:
    ops = torch.ops._c10d_functional

    def two_sums(x, flip):
        if flip:
            largest, total = ops.all_reduce(x, "max", "0"), ops.all_reduce(x, "sum", "0")
        else:
            total, largest = ops.all_reduce(x, "sum", "0"), ops.all_reduce(x, "max", "0")
        return ops.wait_tensor(total) - ops.wait_tensor(largest)

    x = torch.arange(3.0, device=ranks.device)
    compiled = torch.compile(
        two_sums, fullgraph=True, options=schedule.options(torch.nn.Identity())
    )
    last = ranks.rank == ranks.size - 1
    start = time.monotonic()
    message = r"order on every rank of group '0'.* got 'all_reduce of float32 in group 1 by \w+' as number 1 of 2"
    with pytest.raises(RuntimeError, match=message):
        compiled(x, last)
    assert time.monotonic() - start < GROUP_TIMEOUT
    before = _rounds["0"]
    _, codes = run_and_get_code(compiled, x, False)
    assert _rounds["0"] == before + 1
    # Before the first collective, in code that did not have to be compiled on the other ranks.
    for code in codes:
        calls = re.findall(r"(check_order|all_reduce)_?\.default\(", code)
        assert calls == ["check_order", *["all_reduce"] * 2]
    assert torch.equal(compiled(x, False), x * (ranks.size - 1))
    assert _rounds["0"] == before + 1
