"""KTop1Gate against float64, token by token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import check_values
from gate_checks import (
    CaptureTests,
    D,
    E,
    gradcheck,
)

from cases import each
from moeops.gates import KTop1Gate
from reference_gates.hetumoe import ktop1_gate
from tolerances import assert_close


@each("k", [1, 2, 3, E])
def test_values_and_gradients(k, dtype, device):
    T = 17
    gate = KTop1Gate(D, E, 1, k, capacity=0.5)
    rows = -(-T * k // (2 * E))  # ceil(0.5 * T * K / E)
    ids, _ = check_values(gate, lambda logits: ktop1_gate(logits, k, rows), dtype, device, T)
    assert (ids == -1).any()


def test_one_expert_per_prototype_and_nothing_dropped_by_default():
    ids, _ = KTop1Gate(D, 12, 1, 3)(torch.randn(50, D))
    assert torch.equal(ids // 4, torch.arange(3).expand(50, 3))


def test_loss_is_k_at_perfect_balance():
    gate = KTop1Gate(E, E, 1, 2, gate_bias=False)
    with torch.no_grad():
        gate.gate.weight.copy_(1e-4 * torch.eye(E))  # uniform probabilities, one winner each
    # In prototype 0 experts 0, 1, 2 win in turn, in prototype 1 experts 3, 4, 5.
    gate(torch.eye(E)[[0, 1, 2]] + torch.eye(E)[[3, 4, 5]])
    assert_close(gate.get_loss(), torch.tensor(2.0), torch.float32)


def test_gradcheck():
    gradcheck(KTop1Gate(D, E, 1, 2))


def test_no_tokens(device):
    gate = KTop1Gate(D, E, 1, 2, capacity=1.0).to(device)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    assert float(gate.get_loss().detach()) == 0


class TestCapture(CaptureTests):
    build = staticmethod(partial(KTop1Gate, capacity=1.0))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: KTop1Gate(D, 6, 1, 4), r"KTop1Gate: top_k must divide the 6 experts, got 4"),
        (lambda: KTop1Gate(D, 6, 1, 7), r"KTop1Gate: top_k must be at most .* got 7"),
        (lambda: KTop1Gate(D, 6, capacity=0), r"KTop1Gate: capacity must be .* got 0"),
    ],
)
def test_bad_arguments(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_nan_is_refused():
    x = torch.randn(3, D)
    x[1, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"prototype_route: logits must be finite"):
        KTop1Gate(D, E)(x)
