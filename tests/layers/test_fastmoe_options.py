"""What layers take from programs written for FastMoE: calls of experts, shapes of gates, starts, state dicts."""

from __future__ import annotations

import math

import pytest
import torch
from layer_cases import D, E, H
from torch import nn

from moeops import FMoE, FMoELinear, FMoETransformerMLP, Glu, RoutingReplay
from moeops.dispatch.shards import take_shard
from moeops.gates import NaiveGate
from moeops.layers import FusedExperts
from tolerances import assert_close

T = 11


class NestGate(NaiveGate):
    nested_input = True

    def forward(self, inp):
        return super().forward(inp["x"])

    def weights_at(self, inp, topk_ids):
        return super().weights_at(inp["x"], topk_ids)


class NestExpert(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, inp):
        return self.linear(inp["x"]) + inp["first"].to(inp["x"].dtype).reshape(-1, 1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "first",
    [torch.arange(T), torch.arange(T).reshape(T, 1, 1), torch.randn(T, 1, dtype=torch.float64)],
    ids=["ids", "3-D", "another_width"],
)
def test_a_gate_of_nests_reads_any_order_of_leaves(first, compiled, fresh_dynamo):
    layer = FMoE(E, D, gate=NestGate, expert=NestExpert, dtype=torch.float64)
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    x = torch.randn(T, D, dtype=torch.float64)
    seen = []
    layer.routing_hooks = (lambda layer, inp, routing: seen.append(inp["x"].shape),)
    plain = FMoE(
        d_model=D,
        expert=[expert.linear for expert in layer.experts],
        gate=lambda *args: NaiveGate(*args),
        dtype=torch.float64,
    )
    plain.gate.load_state_dict(layer.gate.state_dict())
    _, weights = plain.gate(x)
    expected = plain(x) + first.double().reshape(T, 1) * weights.sum(1, keepdim=True)
    assert_close(run({"first": first, "x": x}), expected, torch.float64)
    assert seen == [torch.Size([T, D])]


def test_routings_of_a_gate_of_nests_are_replayed():
    layer = FMoE(E, D, gate=NestGate, expert=NestExpert)
    inp = {"first": torch.arange(T), "x": torch.randn(T, D)}
    replay = RoutingReplay(layer)
    replay.record()
    expected = layer(inp)
    decisions = replay.take()
    with torch.no_grad():
        layer.gate.gate.weight.mul_(2)
        layer.gate.gate.bias.mul_(2)
    scaled = layer(inp)
    replay.replay(decisions)
    assert torch.equal(layer(inp), expected)
    replay.replay(decisions, weights="gate")
    weights = layer.gate.weights_at(inp, next(iter(decisions.values()))[0])
    assert not torch.equal(weights, next(iter(decisions.values()))[1])
    assert_close(layer(inp), scaled, torch.float32)  # the same choice, weighed anew


class OldShapes(NaiveGate):
    """Weights ``[T, 1, K]``, and flat ids on request, as FastMoE's older gates return them."""

    flat = True

    def forward(self, inp):
        ids, weights = super().forward(inp)
        return ids.flatten() if self.flat else ids, weights.unsqueeze(1)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("flat", [True, False])
def test_older_shapes_of_gates(flat, top_k):
    layer = FMoETransformerMLP(E, D, H, gate=OldShapes, top_k=top_k)
    layer.gate.flat = flat
    plain = FMoETransformerMLP(E, D, H, top_k=top_k)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, D)
    assert torch.equal(layer(x), plain(x))


def test_flat_ids_of_another_number_are_refused():
    class Fewer(OldShapes):
        def forward(self, inp):
            ids, weights = super().forward(inp)
            return ids[1:], weights

    with pytest.raises(
        ValueError, match=r"Fewer must return as many flat topk_ids .*\[11, 1, 2\].*\[21\]"
    ):
        FMoETransformerMLP(E, D, H, gate=Fewer)(torch.randn(T, D))


class Counted(nn.Module):
    """An expert as FastMoE 1.x calls it."""

    def __init__(self, d_model):
        super().__init__()
        self.linear = FMoELinear(1, d_model, d_model)

    def forward(self, inp, fwd_expert_count):
        assert fwd_expert_count.dtype == torch.int64
        return self.linear(inp, fwd_expert_count)


class MayCount(nn.Linear):
    """An expert that takes a count, and needs none: it adds 1 where it got one."""

    def __init__(self, d_model):
        super().__init__(d_model, d_model)

    def forward(self, inp, count=None):
        return super().forward(inp) + (0 if count is None else 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_experts_that_ask_for_the_number_of_their_rows_get_it(compiled, fresh_dynamo):
    layer = FMoE(E, D, expert=[Counted, lambda d: nn.Linear(d, d), Counted, MayCount])
    plain = FMoE(E, D, expert=[nn.Linear(D, D) for _ in range(E)])
    for expert, other in zip(layer.experts, plain.experts, strict=True):
        weights = expert.linear if isinstance(expert, Counted) else expert
        with torch.no_grad():
            other.weight.copy_(weights.weight.reshape(D, D))
            other.bias.copy_(weights.bias.reshape(D))
    plain.gate = layer.gate
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    for num_tokens in (T, 1):
        x = torch.randn(num_tokens, D)
        assert_close(run(x), plain(x), torch.float32)


@pytest.mark.parametrize(("call", "more"), [(None, 0), ("rows", 0), ("rows,count", 1)])
def test_expert_call(call, more):
    layer = FMoE(E, D, expert=MayCount, expert_call=call)
    plain = FMoE(E, D, expert=lambda d: nn.Linear(d, d))
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, D)
    assert_close(layer(x), plain(x) + more, torch.float32)  # the weights of a token add up to 1
    with pytest.raises(ValueError, match=r"FMoE: expert_call must be one of .* got 'count'"):
        FMoE(E, D, expert=MayCount, expert_call="count")


class LoopsOverCounts(FMoE):
    """Its experts return the rows that the counts name, and not those of dropped pairs."""

    def __init__(self, short=0, **options):
        super().__init__(E, D, expert=None, **options)
        self.experts = self.Experts()
        self.experts.short = short

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.each = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

        def forward(self, rows, counts):
            counts = counts.tolist()
            for count in counts:
                torch._check(count >= 0)
            rows = rows.narrow(0, 0, sum(counts))
            parts = rows.split(counts)
            out = torch.cat([each(part) for each, part in zip(self.each, parts, strict=True)])
            return out[: out.shape[0] - self.short]


class Drops(NaiveGate):
    def forward(self, inp):
        ids, weights = super().forward(inp)
        return torch.where(torch.arange(len(inp))[:, None] % 3 == 0, -1, ids), weights


@pytest.mark.parametrize("compiled", [False, True])
def test_fused_experts_may_leave_out_dropped_rows(compiled, fresh_dynamo):
    layer = LoopsOverCounts(gate=Drops)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    plain = FMoE(d_model=D, gate=Drops, expert=list(layer.experts.each))
    plain.gate = layer.gate
    x = torch.randn(T, D)
    assert_close(run(x), plain(x), torch.float32)
    if not compiled:
        with pytest.raises(ValueError, match="experts' output"):
            LoopsOverCounts(short=1, gate=Drops)(x)


def fastmoe_names(experts: FusedExperts, layout: str, prefix: str) -> dict:
    """The weights of whole experts under FastMoE's names: version 0.2's, or those from 1.0 on."""
    names = {"w_up": "htoh4.weight", "b_up": "htoh4.bias", "w_down": "h4toh.weight"}
    state = {}
    for name, key in {**names, "b_down": "h4toh.bias"}.items():
        value = getattr(experts, name).detach()
        if layout == "one":
            state[prefix + key] = value
        else:
            for e in range(experts.num_expert):
                state[f"{prefix}{e}.{key}"] = value[e : e + 1]
    return state


@pytest.mark.parametrize("layout", ["one", "each"])
def test_state_dicts_of_fastmoe_load(layout):
    layer, other = (FMoETransformerMLP(E, D, H) for _ in range(2))
    state = fastmoe_names(other.experts, layout, "0.experts.")
    state |= {"0.gate." + name: value for name, value in other.gate.state_dict().items()}
    given = dict(state)
    nn.ModuleList([layer]).load_state_dict(state)
    assert state.keys() == given.keys()
    x = torch.randn(T, D)
    assert torch.equal(layer(x), other(x))
    assert len(layer.experts) == E

    shards = [FusedExperts(E, D, H, "gelu", num_shards=2, shard=shard) for shard in range(2)]
    for shard in shards:
        shard.load_state_dict(fastmoe_names(other.experts, layout, ""))
    offsets = torch.tensor([0, 3, 3, 5, T], dtype=torch.int32)
    rows = torch.randn(T, D)
    parts = [shard(rows, expert_offsets=offsets) for shard in shards]
    assert_close(sum(parts), other.experts(rows, expert_offsets=offsets), torch.float32)


@pytest.mark.parametrize("unit", [Glu(limit=0.7), Glu(alpha=1.7, offset=1.0, interleaved=True)])
def test_shards_of_gated_units_add_up(unit):
    """Each shard takes gate and up of the same hidden units, whatever the order of their rows."""
    whole = FusedExperts(E, D, H, unit)
    shards = [FusedExperts(E, D, H, unit, num_shards=2, shard=shard) for shard in range(2)]
    for shard in shards:
        for name, value in whole.state_dict().items():
            getattr(shard, name).data.copy_(take_shard(value, shard.shard_span(name)))
    offsets = torch.tensor([0, 3, 3, 5, T], dtype=torch.int32)
    rows = torch.randn(T, D)
    parts = [shard(rows, expert_offsets=offsets) for shard in shards]
    assert_close(sum(parts), whole(rows, expert_offsets=offsets), torch.float32)


def test_state_dicts_of_another_number_of_experts_are_refused():
    other = FusedExperts(E + 1, D, H, "gelu")
    for layout, match in (("each", r"experts 0 to 3, got \[0, 1, 2, 3, 4\]"), ("one", "size mism")):
        with pytest.raises(RuntimeError, match=match):
            FusedExperts(E, D, H, "gelu").load_state_dict(fastmoe_names(other, layout, ""))
    without = fastmoe_names(FusedExperts(E, D, H, "gelu"), "each", "")
    with pytest.raises(RuntimeError, match=r"Unexpected .*b_up"):
        FusedExperts(E, D, H, "gelu", bias=False).load_state_dict(without)


def test_starts():
    """Of FastMoE's start the standard deviation of weights is ``1 / sqrt(3 * in * out)``, and biases are zero."""
    torch.manual_seed(0)
    wide, deep = 64, 96
    fast = FMoETransformerMLP(8, wide, deep, init="fastmoe").experts
    linear = FMoELinear(8, wide, deep, init="fastmoe")
    for weight in (fast.w_up, fast.w_down, linear.weight):
        want = 1 / math.sqrt(3 * wide * deep)
        weight = weight.detach()
        assert float(weight.std()) == pytest.approx(want, rel=0.02)
        assert float(weight.abs().max()) <= math.sqrt(3) * want
    assert not any(bias.any() for bias in (fast.b_up, fast.b_down, linear.bias))
    fast.reset_parameters()
    assert not fast.b_up.any()
    house = FMoETransformerMLP(8, wide, deep).experts
    assert float(house.w_up.detach().std()) == pytest.approx(1 / math.sqrt(3 * wide), rel=0.02)
    for build in (
        lambda: FMoELinear(2, 3, 4, init="zeros"),
        lambda: FMoETransformerMLP(2, 3, 4, init="zeros"),
    ):
        with pytest.raises(ValueError, match=r"init must be one of .* got 'zeros'"):
            build()


@pytest.mark.parametrize("of", [torch.float32, torch.bool, torch.int64])
def test_masks_of_any_type_on_any_device(of, device):
    layer = FMoETransformerMLP(E, D, H, mask_dict={1: 0.5}, device=device)
    x = torch.randn(T, D, device=device)
    mask = torch.arange(T) % 2
    expected = torch.where(mask.to(device)[:, None] == 1, 0.5, layer(x))
    torch.testing.assert_close(layer(x, mask.to(of)), expected)
