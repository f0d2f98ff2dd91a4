"""SigmoidGate against straight-line float64."""

from __future__ import annotations

import pytest
import torch
from gate_checks import D, E, assert_gradient, check_compile, gradcheck, parameters_float64

from moeops.gates import SigmoidGate
from moeops.reference import gates_fastmoe as fast
from tolerances import assert_close


@pytest.mark.parametrize("k", [1, 3, E])
@pytest.mark.parametrize("balance", [True, False], ids=["loss", "no_loss"])
def test_values_and_gradients(k, balance, dtype, device):
    T = 13
    gate = SigmoidGate(D, E, 1, k, balance=balance).to(device, dtype)
    x = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    router_type = torch.float64 if dtype == torch.float64 else torch.float32
    ids, weights = gate(x)
    params = parameters_float64(gate)
    x64 = x.detach().cpu().double().requires_grad_()
    logits = x64 @ params["gate.weight"].t() + params["gate.bias"]
    scores = fast.scores(logits, "sigmoid")
    want_ids = fast.best(logits, k)
    want = scores.gather(1, want_ids)
    assert torch.equal(ids.cpu(), want_ids)
    assert_close(weights, want, router_type, "weights")
    factors = torch.randn(T, k, dtype=torch.float64)
    total, want_total = (weights * factors.to(weights)).sum(), (want * factors).sum()
    if balance:
        probs = scores / scores.sum(-1, keepdim=True)
        (want_loss,) = fast.balance_losses([probs], [want_ids])
        loss = gate.get_loss()
        assert_close(loss, want_loss, router_type, "loss")
        total, want_total = total + 3 * loss, want_total + 3 * want_loss
    assert not gate.has_loss
    total.backward()
    want_total.backward()
    assert_gradient(x.grad, x64.grad, dtype, "gradient of x")
    for name, parameter in gate.named_parameters():
        assert_gradient(parameter.grad, params[name].grad, dtype, f"gradient of {name}")


def test_one_expert_per_token_still_teaches_the_router():
    gate = SigmoidGate(D, E, 1, 1)
    gate(torch.randn(9, D))[1].sum().backward()
    assert float(gate.gate.weight.grad.abs().max()) > 0


def test_gradcheck():
    gradcheck(SigmoidGate(D, E, 1, 2, balance=True))


def test_compile(device):
    check_compile(SigmoidGate, device, "aot_eager")


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"SigmoidGate: top_k must be at most .* got 5"):
        SigmoidGate(D, 4, 1, 5)
