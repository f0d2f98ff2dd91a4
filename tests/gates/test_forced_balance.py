"""Round-robin routing: exact balance, the inner gate's weights and gradients."""

from __future__ import annotations

import pytest
import torch
from gate_checks import D, E, check_compile, check_export, layer_with

from moeops import LoadMonitor
from moeops.gates import (
    ForcedBalanceGate,
    GShardGate,
    Llama4Gate,
    NaiveGate,
    SoftMoEGate,
    SwitchGate,
)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_values(top_k, device):
    gate = ForcedBalanceGate(D, E, 1, top_k)
    ids, weights = gate(torch.randn(7, D, device=device))
    assert ids.tolist() == [[(t * top_k + k) % E for k in range(top_k)] for t in range(7)]
    assert weights.tolist() == [[pytest.approx(1 / top_k)] * top_k] * 7
    assert (ids.device.type, weights.device.type) == (device, device)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert list(gate.parameters()) == []
    assert gate(torch.randn(0, D))[0].shape == (0, top_k)
    assert gate(torch.randn(2, D, dtype=torch.float64))[1].dtype == torch.float64


def test_weights_and_gradients_of_the_inner_gate(device):
    inner = NaiveGate(D, E, 1, 2).to(device)
    gate = ForcedBalanceGate(D, E, 1, gate=inner)
    x = torch.randn(12, D, device=device)
    routing = gate(x)
    assert torch.equal(routing.topk_weights, inner(x)[1])
    assert torch.bincount(routing.topk_ids.flatten()).tolist() == [4] * E
    routing.topk_weights[:, 0].sum().backward()
    assert inner.gate.weight.grad.any()


def test_a_dropped_slot_weighs_nothing_and_is_filled():
    gate = ForcedBalanceGate(D, E, 1, 1, gate=lambda *a: SwitchGate(*a, capacity=0.5)).eval()
    x = torch.randn(24, D)
    dropped = gate.gate(x)[0] < 0
    routing = gate(x)
    assert dropped.any()
    assert torch.equal(routing.topk_weights == 0, dropped)
    assert torch.bincount(routing.topk_ids.flatten()).tolist() == [4] * E


def test_in_a_layer():
    """The loss stays the inner gate's; balance is exact."""
    layer = layer_with(lambda *a: ForcedBalanceGate(*a, gate=GShardGate))
    monitor = LoadMonitor(layer)
    layer(torch.randn(9, D)).sum().backward()
    load = monitor.summary()[""]
    assert load.loads.tolist() == [3] * E
    assert (load.max_over_mean, load.dropped) == (1, 0)
    assert layer.gate.gate.has_loss
    scaled = layer_with(lambda *a: ForcedBalanceGate(*a, gate=Llama4Gate))
    assert scaled.gate(torch.randn(3, D)).scale_inputs


def test_compile(device):
    check_compile(ForcedBalanceGate, device, "aot_eager")


def test_export(device):
    check_export(lambda *a: ForcedBalanceGate(*a, gate=NaiveGate), device, False, training=True)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: ForcedBalanceGate(0, 4), ValueError, r"d_model must be at least 1, got 0"),
        (
            lambda: ForcedBalanceGate(D, 4, 1, 5),
            ValueError,
            r"top_k must be at most the 4 .* got 5",
        ),
        (lambda: ForcedBalanceGate(D, 4, gate="naive"), TypeError, r"gate must be .* got 'naive'"),
        (
            lambda: ForcedBalanceGate(D, 4, gate=SoftMoEGate)(torch.randn(3, D)),
            TypeError,
            r"gate must choose experts, got SoftMoEGate",
        ),
    ],
)
def test_bad_arguments(build, error, match):
    with pytest.raises(error, match=match):
        build()
