"""ExpertChoiceGate against straight-line float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import check_values, refuses_nan
from gate_checks import D, E, check_checkpoint, check_compile, check_export, gradcheck, layer_with

from cases import each
from moeops import count_tokens
from moeops.gates import ExpertChoiceGate, NaiveGate
from reference_gates import variable as reference

CASES = [(2, 1.0), (1, 0.5), (3, 1.25), (E, 1.0), (5, 1.2), (4, 9.0), (1, 0.01)]


@each(("k", "capacity"), CASES)
def test_values_and_gradients(k, capacity, dtype, device):
    T = 13
    gate = ExpertChoiceGate(D, E, 1, k, capacity=capacity)
    rows = []

    def wanted(logits):
        ids, weights, count = reference.expert_choice(logits, k, capacity)
        rows.append(count)
        return ids, weights, None

    routing = check_values(gate, wanted, dtype, device, T)
    assert routing.num_rows == rows[0] == int((routing.topk_ids >= 0).sum())
    assert not routing.scale_inputs


@each("T", [0, 1, 5, 64])
def test_every_expert_has_the_same_load(T, device):
    gate = ExpertChoiceGate(D, E, top_k=2, capacity=(1.5, 3.0)).to(device)
    for training, factor in ((True, 1.5), (False, 3.0)):
        ids, _, num_rows, _ = gate.train(training)(torch.randn(T, D, device=device))
        rows = -(-T * factor * 2 // E)
        assert count_tokens(ids, E).tolist() == [rows] * E
        assert num_rows == E * rows


def test_capacity_is_at_most_all_tokens():
    for num_experts in range(1, 20):
        for k in range(1, num_experts + 1):
            gate = ExpertChoiceGate(2, num_experts, top_k=k, capacity=100.0)
            for T in (1, 2, 3, 1000):
                # The number of rows without the cost of the choice.
                x = torch.empty(T, 2, device="meta")
                with torch.device("meta"):
                    rows = gate.to("meta")(x).num_rows
                assert rows == num_experts * T, (num_experts, k, T)


def test_ties_go_to_the_earlier_token(device):
    gate = ExpertChoiceGate(D, 2, top_k=1).to(device)
    ids, *_ = gate(torch.ones(6, D, device=device))
    want = torch.tensor([[0, 1]] * 3 + [[-1, -1]] * 3)
    assert torch.equal(ids.cpu(), want)


def test_it_is_not_causal():
    """As documented: a later token can take an earlier one's place."""
    gate = ExpertChoiceGate(D, 2, top_k=1)
    x = torch.randn(8, D)
    alone, with_more = gate(x[:4]).topk_ids, gate(x).topk_ids[:4]
    assert not torch.equal(alone, with_more)
    naive = NaiveGate(D, 2, top_k=1)
    assert torch.equal(naive(x[:4])[0], naive(x)[0][:4])


def test_tokens_without_experts_come_out_as_zeros(device):
    layer = layer_with(partial(ExpertChoiceGate, capacity=0.25), device)
    x = torch.randn(24, D, device=device)
    lonely = (layer.gate(x).topk_ids < 0).all(1)
    assert 0 < int(lonely.sum()) < 24
    y = layer(x)
    assert torch.equal(y[lonely], torch.zeros_like(y[lonely]))
    assert bool((y[~lonely].abs().sum(1) > 0).all())


def test_gradcheck():
    gradcheck(ExpertChoiceGate(D, E, 1, 2))


def test_nan_is_refused():
    refuses_nan(ExpertChoiceGate(D, E))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compile(backend, device):
    gate = partial(ExpertChoiceGate, capacity=(1.25, 2.0))
    check_compile(gate, device, backend, training=backend == "inductor")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(ExpertChoiceGate, device, strict, training=True)


def test_checkpoint():
    check_checkpoint(ExpertChoiceGate, compile_it=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"capacity": 0}, r"capacity must be .* factors above 0, got 0"),
        ({"capacity": None}, r"capacity must be a factor or a pair of factors, got None"),
        ({"top_k": 7}, r"top_k must be at most the 6 experts, got 7"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=f"ExpertChoiceGate: {match}"):
        ExpertChoiceGate(D, E, **options)
