"""Losses of gates that enter the backward at the layer's output: gradients as if they had been added to the loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gate_classes
import moeops
from moeops import FMoE, FMoETransformerMLP, auxiliary_loss, inject_auxiliary_loss
from moeops.gates import BaseGate, NaiveGate, SwitchGate, with_losses
from tolerances import assert_close

D, SCALE = 8, 0.3


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, torch.float32, name)


def with_loss(model, x):
    """The truth: the loss fetched and added by hand."""
    torch.manual_seed(1)
    return model(x).square().sum() + SCALE * auxiliary_loss(model)


def without_loss(model, x):
    torch.manual_seed(1)
    return model(x).square().sum()


@pytest.mark.parametrize(
    "cls", [cls for cls in gate_classes.CLASSES if cls.has_logits], ids=lambda cls: cls.__name__
)
def test_every_gate(cls):
    gate = gate_classes.make_gate(cls, D, 8).add_loss("z")
    model = FMoETransformerMLP(8, D, 6, gate=gate)
    x = torch.randn(20, D)
    other = copy.deepcopy(model)
    expected = gradients(other, with_loss(other, x))
    inject_auxiliary_loss(model, SCALE)
    assert_same(gradients(model, without_loss(model, x)), expected)
    assert not model.gate.has_loss


def pair(**options):
    """A model of two layers that injects, and the same one that does not."""
    gates = (with_losses(SwitchGate, z=0.1), with_losses(NaiveGate, switch=1.0))
    model = nn.Sequential(
        FMoETransformerMLP(4, D, 6, top_k=1, gate=lambda *args: gates[0](*args, switch_eps=0.0)),
        FMoE(4, D, expert=lambda d_model: nn.Linear(d_model, d_model), gate=gates[1]),
    )
    other = copy.deepcopy(model)
    inject_auxiliary_loss(model, **options)
    return model, other


@pytest.mark.parametrize("scale", [SCALE, torch.tensor(SCALE)], ids=["number", "tensor"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(reentrant, scale):
    model, other = pair(scale=scale)
    x = torch.randn(12, D, requires_grad=True)

    def recomputed(x):
        return checkpoint(model, x, use_reentrant=reentrant)

    y = recomputed(x)
    assert_same(gradients(model, y.square().sum()), gradients(other, with_loss(other, x)))
    assert not any(m.has_loss for m in model.modules() if isinstance(m, BaseGate))


def test_compiled():
    torch._dynamo.reset()
    model, other = pair(scale=torch.tensor(SCALE))
    x = torch.randn(12, D)
    graph = torch.compile(model[0], fullgraph=True, backend="aot_eager")
    expected = gradients(other, with_loss(other[0], x))
    assert_same(gradients(model, graph(x).square().sum()), expected)


def test_every_call_of_a_layer_counts():
    """Injected, or summed until they are fetched; the newest one alone by default."""
    model, other = pair(scale=SCALE)
    layer, plain = model[0], other[0]
    x = torch.randn(12, D)
    hidden = plain(x)
    first = plain.gate.get_loss()
    y = plain(hidden)
    expected = gradients(plain, y.sum() + SCALE * (first + plain.gate.get_loss()))
    assert_same(gradients(layer, layer(layer(x)).sum()), expected)
    plain.gate.sum_losses = True
    y = plain(plain(x))
    assert_same(gradients(plain, y.sum() + SCALE * auxiliary_loss(plain)), expected)
    plain(x)
    assert torch.equal(plain.gate.get_loss(), first)


def test_micro_batches_and_the_end_of_it():
    model, other = pair(scale=SCALE / 2)
    for x in torch.randn(2, 12, D):
        (without_loss(model, x) / 2).backward()
        (with_loss(other, x) / 2).backward()
    for actual, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(actual.grad, expected.grad, torch.float32)
    inject_auxiliary_loss(model, None)
    assert torch.equal(with_loss(model, x), with_loss(other, x))
    inject_auxiliary_loss(model)
    with torch.no_grad():
        model(x)
    assert float(auxiliary_loss(model)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "model must be a torch.nn.Module, got 3"),
        ((nn.ReLU(), "much"), "scale must be a number"),
        ((nn.ReLU(), torch.ones(2)), "scale must be a number, a scalar tensor or None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        moeops.inject_auxiliary_loss(*arguments)


def test_the_sum_of_losses_is_float32_whatever_the_default():
    gate = SwitchGate(D, 4).add_loss("z")
    torch.set_default_dtype(torch.bfloat16)
    try:
        gate.set_loss(torch.tensor(1.5), torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64))
        assert auxiliary_loss(gate).dtype == torch.float32
        assert auxiliary_loss(gate).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
