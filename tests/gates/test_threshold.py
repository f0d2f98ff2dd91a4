"""ThresholdGate against straight-line float64, and what its row budget drops."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import check_values, refuses_nan
from gate_checks import D, E, check_checkpoint, check_compile, check_export, gradcheck, layer_with

from cases import each
from moeops.gates import ThresholdGate
from reference_gates import variable as reference
from tolerances import assert_close

CASES = {
    "defaults": (2, {"top_p": 0.4}),
    "all": (E, {"top_p": 0.8, "balance": True, "dynamic": 0.25}),
    "renormalised": (4, {"top_p": 0.6, "renormalize": True, "dynamic": 0.01}),
    "min_prob": (E, {"top_p": 1.0, "min_prob": 0.15, "balance": True}),
    "both": (5, {"top_p": 0.7, "min_prob": 0.2}),
    "budget": (E, {"top_p": 0.9, "row_budget": 1.7, "balance": True}),
    "tight": (3, {"top_p": 0.9, "row_budget": 0.6}),
    "one": (1, {"top_p": 0.9, "row_budget": 1}),
}


@each("name", CASES)
def test_values_and_gradients(name, dtype, device):
    T = 13
    k, options = CASES[name]
    gate = ThresholdGate(D, E, 1, k, **options)
    lost = []

    def wanted(logits):
        ids, weights, loss, count = reference.threshold(logits, k, **options)
        lost.append(count)
        return ids, weights, loss if gate.balance or gate.dynamic else None

    routing = check_values(gate, wanted, dtype, device, T)
    assert int(gate.dropped) == lost[0]
    assert (lost[0] > 0) == (name in ("budget", "tight"))
    budget = options.get("row_budget", k)
    assert routing.num_rows == (None if budget >= k else -int(-T * budget // 1))
    filled = int((routing.topk_ids >= 0).sum())
    assert filled <= (routing.num_rows or T * k)
    if lost[0]:
        assert filled == routing.num_rows  # not one more than needed is dropped


@pytest.mark.parametrize("name", ["all", "renormalised", "both"])
def test_gradcheck(name):
    k, options = CASES[name]
    gradcheck(ThresholdGate(D, E, 1, k, **options))


def test_harder_tokens_get_more_experts(device):
    gate = ThresholdGate(4, 4, top_k=4, gate_bias=False, top_p=0.5).to(device)
    with torch.no_grad():
        gate.gate.weight.copy_(torch.eye(4))
    sure, torn, lost = [9.0, 0, 0, 0], [9.0, 9, 0, 0.1], [0.0, 0, 0, 0]
    ids, weights, *_ = gate(torch.tensor([sure, torn, lost], device=device))
    # The first of two halves falls just short of 0.5.
    assert ids.tolist() == [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, -1, -1]]
    assert_close(weights[2], torch.tensor([0.25, 0.25, 0, 0]), torch.float32)


def test_budget_of_one_leaves_every_token_its_best_expert(device):
    gate = ThresholdGate(D, E, top_k=E, top_p=0.95, row_budget=1.0).to(device)
    x = torch.randn(30, D, device=device)
    ids, _, num_rows, _ = gate(x)
    assert num_rows == 30
    assert bool((ids[:, 0] >= 0).all())
    assert not bool((ids[:, 1:] >= 0).any())


@pytest.mark.parametrize("training", [True, False])
def test_what_is_dropped_does_not_depend_on_the_order_of_tokens(training):
    gate = ThresholdGate(D, E, top_k=E, top_p=0.9, row_budget=1.6).double().train(training)
    x, order = torch.randn(25, D, dtype=torch.float64), torch.randperm(25)
    assert torch.equal(gate(x[order]).topk_ids, gate(x).topk_ids[order])
    once = int(gate.dropped) // 2
    assert once > 0
    gate(x)
    assert int(gate.dropped) == 3 * once
    assert "dropped" not in gate.state_dict()


def test_a_large_enough_budget_changes_nothing(device):
    free = layer_with(partial(ThresholdGate, top_p=0.5), device, E).double()
    x = torch.randn(20, D, dtype=torch.float64, device=device)
    filled = int((free.gate(x).topk_ids >= 0).sum())
    want = free(x)
    free.gate.row_budget = (filled + 1) / 20
    assert free.gate(x).num_rows < 20 * E
    assert_close(free(x), want, torch.float64)
    assert int(free.gate.dropped) == 0


def test_no_tokens(device):
    gate = ThresholdGate(D, E, balance=True, dynamic=0.1, row_budget=1.5).to(device)
    ids, _, num_rows, _ = gate(torch.randn(0, D, device=device))
    assert ids.shape == (0, 2)
    assert num_rows == 0
    assert float(gate.get_loss().detach()) == 0


def test_nan_is_refused():
    refuses_nan(ThresholdGate(D, E))


FULL = partial(ThresholdGate, top_p=0.7, balance=True, dynamic=0.1, row_budget=1.2)


@pytest.mark.parametrize(
    ("build", "backend", "k"),
    [(FULL, "inductor", 3), (partial(ThresholdGate, renormalize=True), "aot_eager", E)],
    ids=["full", "plain"],
)
def test_compile(build, backend, k, device):
    check_compile(build, device, backend, k)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(FULL, device, strict, training=True)


def test_checkpoint():
    check_checkpoint(FULL, compile_it=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0\.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1\.5"),
        ({"min_prob": 1.0}, r"min_prob must be in \[0, 1\), got 1\.0"),
        ({"dynamic": -1}, r"dynamic must be at least 0 and finite, got -1"),
        ({"row_budget": 0}, r"row_budget must be None or above 0 and finite, got 0"),
        ({"top_k": 7}, r"top_k must be at most the 6 experts, got 7"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=f"ThresholdGate: {match}"):
        ThresholdGate(D, E, **options)
