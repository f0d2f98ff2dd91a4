"""KTop1Gate against float64, token by token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gate_checks import (
    D,
    E,
    assert_gradient,
    check_checkpoint,
    check_compile,
    check_export,
    gradcheck,
    parameters_float64,
)

from moeops.gates import KTop1Gate
from moeops.reference.gates_hetumoe import ktop1_gate
from tolerances import assert_close


@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_values_and_gradients(k, dtype, device):
    T, capacity = 17, 0.5
    gate = KTop1Gate(D, E, 1, k, capacity=capacity).to(device, dtype)
    x = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    router_type = torch.float64 if dtype == torch.float64 else torch.float32
    ids, weights = gate(x)
    loss = gate.get_loss()

    params = parameters_float64(gate)
    x64 = x.detach().cpu().double().requires_grad_()
    logits = x64 @ params["gate.weight"].t() + params["gate.bias"]
    rows = -(-T * k // (2 * E))  # ceil(0.5 * T * K / E)
    want_ids, want_weights, want_loss = ktop1_gate(logits, k, rows)
    assert torch.equal(ids.cpu(), want_ids)
    assert (ids == -1).any()
    assert_close(weights, want_weights, router_type, "weights")
    assert_close(loss, want_loss, router_type, "loss")

    factors = torch.randn(T, k, dtype=torch.float64)
    ((weights * factors.to(weights)).sum() + 3 * loss).backward()
    ((want_weights * factors).sum() + 3 * want_loss).backward()
    assert_gradient(x.grad, x64.grad, dtype, "gradient of x")
    for name, parameter in gate.named_parameters():
        assert_gradient(parameter.grad, params[name].grad, dtype, f"gradient of {name}")


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


LIMITED = partial(KTop1Gate, capacity=1.0)


def test_compile(device):
    check_compile(LIMITED, device, "inductor")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(LIMITED, device, strict, training=True)


def test_checkpoint():
    check_checkpoint(LIMITED, compile_it=False)


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
