"""SigmoidGate against straight-line float64."""

from __future__ import annotations

import pytest
import torch
from choice_checks import check_values
from gate_checks import D, E, check_compile, gradcheck

from cases import each
from moeops.gates import SigmoidGate
from reference_gates import fastmoe as fast


@each("k", [1, 3, E])
@each("balance", [True, False], ids=["loss", "no_loss"])
def test_values_and_gradients(k, balance, dtype, device):
    gate = SigmoidGate(D, E, 1, k, balance=balance)

    def wanted(logits):
        scores = fast.scores(logits, "sigmoid")
        ids = fast.best(logits, k)
        probs = scores / scores.sum(-1, keepdim=True)
        loss = fast.balance_losses([probs], [ids])[0] if balance else None
        return ids, scores.gather(1, ids), loss

    check_values(gate, wanted, dtype, device)


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
