"""SwipeGate on one rank; what several ranks do together is in test_across_ranks.py."""

from __future__ import annotations

import pytest
import torch
from gate_checks import D, E, gradcheck

from cases import each
from moeops.gates import NaiveGate, SwipeGate
from reference_gates import fastmoe as fast


@each("k", [1, 2, E])
@each("training", [True, False], ids=["train", "eval"])
def test_on_one_rank_it_is_the_naive_gate(training, k, dtype, device):
    gate = SwipeGate(D, E, 1, k).to(device, dtype).train(training)
    naive = NaiveGate(D, E, 1, k).to(device, dtype)
    naive.load_state_dict(gate.state_dict())
    x = torch.randn(13, D, device=device).to(dtype)
    expected = naive(x, return_all_scores=True)
    assert all(
        torch.equal(a, b) for a, b in zip(gate(x, return_all_scores=True), expected, strict=True)
    )
    assert not gate.has_loss
    ids, _ = fast.swipe([expected[2].cpu()], k)
    assert torch.equal(expected[0].cpu(), ids[0])


def test_in_evaluation_ranks_do_not_count():
    gate = SwipeGate(D, 2, 3).eval()
    x = torch.randn(13, D)
    assert torch.equal(gate(x)[0], fast.best(gate.gate(x), 2))


def test_gradcheck():
    gradcheck(SwipeGate(D, E, 1, 2))


def test_training_needs_the_group():
    with pytest.raises(
        ValueError, match=r"SwipeGate: group must be set for rank balancing with world_size = 2"
    ):
        SwipeGate(D, 3, 2)(torch.randn(3, D))
    with pytest.raises(TypeError, match=r"rank_group: group must be .* got 'x'"):
        SwipeGate(D, 3, 2, group="x")
