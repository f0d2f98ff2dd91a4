"""Recorded routing, replayed: the same experts whatever the gates say, eager and in one graph."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from moeops import FMoETransformerMLP, LoadMonitor, RoutingReplay, topk_route
from moeops.gates import (
    DeepSeekV3Gate,
    ExpertChoiceGate,
    GShardGate,
    Llama4Gate,
    MixtralGate,
    NaiveGate,
    NoisyGate,
    Qwen3Gate,
    ReMoEGate,
    SoftMoEGate,
    SwitchGate,
    TopKGate,
)
from moeops.ops import chosen_weights
from tolerances import assert_close

D, E = 8, 4


def layer_with(gate, top_k=2):
    return FMoETransformerMLP(E, D, 12, top_k=top_k, gate=gate)


def disturb(model):
    """Other gates, same experts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in f".{name}":
                parameter.normal_()
    return model


GATES = {
    "naive": NaiveGate,
    "noisy": NoisyGate,
    "gshard": GShardGate,
    "expert_choice": ExpertChoiceGate,
    "remoe": ReMoEGate,
    "llama4": Llama4Gate,
    "soft": lambda *a: SoftMoEGate(*a, num_slots=2, sequence_length=5),
}


@pytest.mark.parametrize("name", GATES)
def test_replay_repeats_a_forward(name, device):
    model = nn.Sequential(layer_with(GATES[name]), layer_with(GATES[name])).to(device)
    x = torch.randn(13, D, device=device)
    replay = RoutingReplay(model)
    replay.record()
    y = model(x)
    decisions = replay.take()
    assert list(decisions) == ["0", "1"]
    assert replay.take() == {}
    disturb(model)
    replay.stop()
    assert not torch.allclose(model(x), y)
    replay.replay(decisions)
    assert torch.equal(model(x), y)
    replay.remove()
    assert model[0].routing_hooks == ()
    assert not torch.allclose(model(x), y)


def test_decisions_are_what_the_gate_returned():
    layer, x = layer_with(NaiveGate), torch.randn(5, D)
    replay = RoutingReplay(layer)
    replay.record()
    for _ in range(2):
        layer(x)
    ((ids, weights),) = replay.take().values()
    want_ids, want_weights = layer.gate(x)
    assert torch.equal(ids, want_ids)
    assert torch.equal(weights, want_weights)
    assert not weights.requires_grad


def test_decisions_are_plain_tensors_that_can_be_saved():
    layer, x = layer_with(NaiveGate), torch.randn(5, D)
    replay = RoutingReplay(layer)
    replay.record()
    y = layer(x)
    file = io.BytesIO()
    torch.save(replay.take(), file)
    file.seek(0)
    decisions = torch.load(file, weights_only=True)
    replay.replay(decisions)
    disturb(layer)
    assert torch.equal(layer(x), y)
    # Half of the batch, with int32 ids.
    half = {n: (ids[:3].int(), weights[:3]) for n, (ids, weights) in decisions.items()}
    replay.replay(half)
    torch.testing.assert_close(layer(x[:3]), y[:3])


WEIGHING = {
    "naive": NaiveGate,
    "switch": lambda *a: SwitchGate(*a, switch_eps=0.0, capacity=None),
    "sigmoid": lambda *a: TopKGate(*a, score="sigmoid", scale=2.5),
    "probabilities": lambda *a: Qwen3Gate(*a, renormalize=False),
    "mixtral": MixtralGate,
    "deepseek": lambda *a: DeepSeekV3Gate(*a, scale=2.5),
}


@pytest.mark.parametrize("name", WEIGHING)
def test_weights_of_the_gate(name, device):
    """A gate that replays its own choice does what it does without; one that moved weighs the old experts anew."""
    layer = layer_with(WEIGHING[name], 1 if name == "switch" else 2).to(device)
    x = torch.randn(9, D, device=device)
    plain = layer(x)
    plain.square().sum().backward()
    want = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    replay = RoutingReplay(layer)
    replay.record()
    layer(x)
    decisions = replay.take()
    replay.replay(decisions, weights="gate")
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, plain)
    for n, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, want[n], rtol=2e-5, atol=3e-6)
    if name != "naive":
        return
    disturb(layer)
    ids = decisions[""][0]
    logits = torch.nn.functional.linear(x, layer.gate.gate.weight, layer.gate.gate.bias)
    got = layer.gate.weights_at(x, ids)
    torch.testing.assert_close(got, torch.softmax(logits.gather(1, ids), 1))
    replay.replay(decisions)
    layer.zero_grad()
    layer(x).sum().backward()
    assert layer.gate.gate.weight.grad is None  # recorded weights are constants


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_chosen_weights(score, renormalize, dtype, device):
    if dtype in (torch.bfloat16, torch.float16):
        pytest.skip("routers compute in float32 or float64")
    logits = (30 * torch.randn(11, E, device=device)).to(dtype)
    options = {"score": score, "renormalize": renormalize, "scale": 1.5}
    weights, ids = topk_route(logits, 3, **options)
    assert_close(chosen_weights(logits, ids, **options), weights, dtype)
    dropped = torch.where(torch.arange(3, device=device) == 1, -1, ids)
    got = chosen_weights(logits, dropped, **options)
    rest = weights.clone()
    rest[:, 1] = 0
    if renormalize:
        rest = 1.5 * rest / rest.sum(1, keepdim=True)
        assert_close(got, rest, dtype)
    assert not got[:, 1].any()
    nothing = torch.full_like(ids, -1)
    leaf = logits.clone().requires_grad_()
    result = chosen_weights(leaf, nothing, **options)
    result.sum().backward()
    assert not result.any()
    assert not leaf.grad.any()


def test_chosen_weights_gradcheck():
    logits = torch.randn(4, E, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1], [2, -1], [-1, -1], [3, 0]])
    for options in ({}, {"score": "sigmoid"}, {"renormalize": False}, {"scale": 2.0}):
        assert torch.autograd.gradcheck(lambda z, o=options: chosen_weights(z, ids, **o), (logits,))


@pytest.mark.parametrize("weights", ["recorded", "gate"])
def test_compile(weights, device):
    """One graph each for recording and replaying, whatever the token count."""
    torch._dynamo.reset()
    counters.clear()
    model = nn.Sequential(layer_with(MixtralGate)).to(device)
    other = disturb(copy.deepcopy(model))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tapes = RoutingReplay(model), RoutingReplay(other)
    batches = [torch.randn(size, D, device=device) for size in (5, 12, 0)]
    for x in batches:
        torch._dynamo.decorators.mark_unbacked(x, 0)
    for x in batches:
        tapes[0].record()
        y = compiled(x)
        y.sum().backward()
        decisions = tapes[0].take()
        assert all(ids.shape == (x.shape[0], 2) for ids, _ in decisions.values())
        tapes[1].replay(decisions)
        torch.testing.assert_close(other(x), y)
    assert counter.frame_count == 1
    model.load_state_dict(other.state_dict())
    for x in batches:
        tapes[1].replay(taken := record_with(other, tapes[1], x), weights)
        want = other(x)
        tapes[0].replay(taken, weights)
        torch.testing.assert_close(compiled(x), want)
    # Recording, replaying, replaying with decisions of any size, and of size 0.
    assert counter.frame_count <= 4
    assert not counters["graph_break"]


def record_with(model, replay, x):
    replay.record()
    model(x)
    return replay.take()


def test_checkpointing_replays_in_the_recomputation():
    layer, x = layer_with(NaiveGate), torch.randn(9, D)
    replay = RoutingReplay(layer)
    replay.record()
    y = layer(x)
    y.square().sum().backward()
    want = {n: p.grad.clone() for n, p in layer.experts.named_parameters()}
    decisions = replay.take()
    disturb(layer)
    layer.zero_grad()
    replay.replay(decisions)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for n, p in layer.experts.named_parameters():
        torch.testing.assert_close(p.grad, want[n])
    replay.record()
    leaf = x.clone().requires_grad_()
    checkpoint(layer, leaf, use_reentrant=False).sum().backward()
    assert replay.take()[""][0].shape == (9, 2)


def test_export_leaves_recording_out_and_refuses_replay():
    layer, x = layer_with(NaiveGate), torch.randn(6, D)
    replay = RoutingReplay(layer)
    replay.record()
    program = torch.export.export(layer, (x,)).module()
    assert replay.take() == {}
    torch.testing.assert_close(program(x), layer(x))
    replay.replay(replay.take())
    with pytest.raises(RuntimeError, match=r"must not be replay during torch\.export"):
        torch.export.export(layer, (x,), strict=False)


def test_a_monitor_made_later_sees_what_is_replayed():
    layer, x = layer_with(NaiveGate), torch.randn(8, D)
    replay = RoutingReplay(layer)
    replay.replay({"": (torch.zeros(8, 2, dtype=torch.int64), torch.full((8, 2), 0.5))})
    monitor = LoadMonitor(layer)
    layer(x)
    assert monitor.summary()[""].loads.tolist() == [16, 0, 0, 0]
    assert math.isclose(monitor.summary()[""].max_over_mean, E)
    replay.remove()
    layer(x)
    assert monitor.summary()[""].loads[1:].any()


def pair(tokens=5, dtype=torch.int64):
    return torch.zeros(tokens, 2, dtype=dtype), torch.ones(tokens, 2)


@pytest.mark.parametrize(
    ("decisions", "options", "error", "match"),
    [
        ({}, {}, ValueError, r"one entry for each of the 1 layers, got none for \[''\]"),
        ({"": pair(), "b": pair()}, {}, ValueError, r"some for \['b'\]"),
        ({"": pair()}, {"weights": "new"}, ValueError, r"weights must be one of .* got 'new'"),
        ({"": torch.ones(5, 2)}, {}, TypeError, r"must have a pair of tensors"),
        ({"": (*pair(), 1)}, {}, TypeError, r"must have a pair of tensors"),
        (
            {"": (pair()[0], torch.ones(5, 3))},
            {},
            ValueError,
            r"one shape, got \[5, 2\] and \[5, 3\]",
        ),
        ({"": pair(4)}, {}, ValueError, r"for as many tokens .* got 4 for 5"),
        ({"": pair(dtype=torch.float32)}, {}, TypeError, r"of the gate's kind, got torch\.float32"),
    ],
)
def test_bad_decisions(decisions, options, error, match):
    layer = layer_with(NaiveGate)
    replay = RoutingReplay(layer)
    with pytest.raises(error, match=match):  # noqa: PT012  (either call may be the one that refuses)
        replay.replay(decisions, **options)
        layer(torch.randn(5, D))


def test_a_gate_that_cannot_weigh_is_refused():
    class Own(NaiveGate):
        def forward(self, inp):
            ids, weights = super().forward(inp)
            return ids, weights.square()

    for gate in (Own, GShardGate, SoftMoEGate):
        replay = RoutingReplay(layer_with(gate))
        with pytest.raises(TypeError, match=r"must have weights_at beside its forward.* got "):
            replay.replay({"": pair()}, weights="gate")
