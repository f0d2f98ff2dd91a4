"""Layers that are built on the meta device: reset_parameters leaves nothing undefined, in any gate."""

from __future__ import annotations

import pytest
import torch
from every_gate import GATES
from gate_checks import D, E

from moeops import FMoE, FMoETransformerMLP


def build(name, **options):
    gate, top_k, _, _ = GATES[name]
    return FMoETransformerMLP(E, D, 12, top_k=top_k, gate=gate, **options)


def fill(layer):
    """What ``to_empty`` may leave in memory, made certain."""
    with torch.no_grad():
        for value in (*layer.parameters(), *layer.buffers()):
            value.fill_(float("nan") if value.is_floating_point() else -(2**40))


@pytest.mark.parametrize("name", GATES)
def test_every_gate(name):
    plain = build(name)
    first = {n: b.clone() for n, b in plain.named_buffers()}
    with torch.device("meta"):
        layer = build(name)
    layer.to_empty(device="cpu")
    fill(layer)
    layer.reset_parameters()
    assert {n for n, _ in layer.named_buffers()} == set(first)
    for n, b in layer.named_buffers():
        assert torch.equal(b, first[n]), n
    assert all(bool(p.isfinite().all()) for p in layer.parameters())
    x = torch.randn(7, D)
    assert bool(layer(x).isfinite().all())
    # A checkpoint on top: what it does not hold was reset.
    fill(layer)
    layer.reset_parameters()
    layer.load_state_dict(plain.state_dict())
    torch.manual_seed(1)
    want = plain(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), want)


def test_base_gate_starts_orthogonal_again():
    """The gate's own start comes after that of the linear layer in it."""
    layer = build("base")
    layer.reset_parameters()
    weight = layer.gate.gate.weight
    torch.testing.assert_close(weight @ weight.t(), 0.01 * torch.eye(E))


@pytest.mark.parametrize("kind", ["mlp", "modules"])
def test_the_layers_own_mask(kind):
    mask = torch.tensor([0, 1, 0, 2])
    with torch.device("meta"):
        if kind == "mlp":
            layer = build("naive", mask=mask)
        else:
            layer = FMoE(E, D, expert=lambda d: torch.nn.Linear(d, d), mask=mask)
    layer.to_empty(device="cpu")
    fill(layer)
    layer.reset_parameters()
    assert torch.equal(layer.mask, mask)
    layer.mask = None
    layer.reset_parameters()
    assert layer.mask is None
