"""Every gate decides in float32, whatever the types of model, tokens, autocast and torch's default."""

from __future__ import annotations

import copy

import pytest
import torch

import gate_classes
from moeops import auxiliary_loss

D, E, T = 8, 10, 24


@pytest.fixture
def half_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def run(gate, x, training):
    """Both tensors of a routing, and the loss."""
    torch.manual_seed(3)
    first, second = gate.train(training)(x)[:2]
    return first, second, gate.get_loss()


def assert_same(actual, expected):
    """The same bits, and float32."""
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.dtype in (torch.float32, torch.int64)
            assert torch.equal(a, b)


EVERY_GATE = pytest.mark.parametrize("cls", gate_classes.CLASSES, ids=lambda cls: cls.__name__)


def rounded_gate(cls):
    """A gate in float32 whose parameters a half type can hold."""
    gate = gate_classes.make_gate(cls, D, E)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(parameter.bfloat16())
    return gate


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@EVERY_GATE
def test_half_models_and_autocast(cls, training):
    gate = rounded_gate(cls)
    x = torch.randn(T, D).bfloat16()
    half = copy.deepcopy(gate).bfloat16()
    assert all(b.dtype == torch.float32 for b in half.buffers() if b.is_floating_point())
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(copy.deepcopy(gate), x.float(), training)
    expected = run(gate, x.float(), training)
    assert_same(cast, expected)
    assert_same(run(half, x, training), expected)


@EVERY_GATE
def test_half_default(cls, half_default):
    gate = rounded_gate(cls)
    assert all(p.dtype == torch.bfloat16 for p in gate.parameters())
    assert all(b.dtype == torch.float32 for b in gate.buffers() if b.is_floating_point())
    x = torch.randn(T, D)
    actual = run(copy.deepcopy(gate), x, True)
    torch.set_default_dtype(torch.float32)
    other = gate_classes.make_gate(cls, D, E)
    other.load_state_dict(gate.state_dict())
    assert_same(actual, run(other, x.float(), True))


def test_auxiliary_loss_of_nothing_is_float32(half_default):
    assert auxiliary_loss(torch.nn.Linear(2, 2)).dtype == torch.float32
