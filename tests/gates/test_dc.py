"""DCGate on one rank; what several ranks do together is in test_across_ranks.py."""

from __future__ import annotations

import math

import pytest
import torch
from gate_checks import D, E, check_compile, gradcheck

from cases import each
from moeops.gates import DCGate, GShardGate
from reference_gates import fastmoe as fast


@each("training", [True, False], ids=["train", "eval"])
@each("policy", ["choice", "position"])
def test_on_one_rank_it_is_gshard(policy, training, device):
    gate = DCGate(D, E, capacity=(0.8, 1.1), drop_policy=policy).to(device).train(training)
    other = GShardGate(D, E, capacity=(0.8, 1.1), drop_policy=policy).to(device).train(training)
    other.load_state_dict(gate.state_dict())
    x = torch.randn(40, D, device=device)
    results = []
    for g in (gate, other):
        torch.manual_seed(2)
        results.append((*g(x), g.get_loss()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert int((results[0][0] == -1).sum()) > 0


def test_fastmoes_capacity(device):
    gate = DCGate(D, E, capacity=0.3, compat=True).double().to(device)
    x = torch.randn(40, D, device=device, dtype=torch.float64)
    torch.manual_seed(2)
    ids, weights = gate(x)
    torch.manual_seed(2)
    noise = torch.rand(40, dtype=torch.float64, device=device).cpu()
    logits = gate.gate(x).cpu()
    want, want_weights, want_loss = fast.gshard([logits], [noise], 0.3, per_owner=True, compat=True)
    assert torch.equal(ids.cpu(), want[0])
    assert int(ids[ids >= 0].bincount(minlength=E).max()) <= math.ceil(0.3 * 40)
    torch.testing.assert_close(weights.cpu(), want_weights[0])
    torch.testing.assert_close(gate.get_loss().cpu(), want_loss[0])


def test_gradcheck():
    gradcheck(DCGate(D, E))


def test_compile(device):
    check_compile(DCGate, device, "aot_eager")


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: DCGate(D, 4, 1, 3), r"DCGate: top_k must be 2, got 3"),
        (lambda: DCGate(D, 4, capacity=-1), r"DCGate: capacity must be .* got -1"),
        (
            lambda: DCGate(D, 4, drop_policy="priority"),
            r"DCGate: drop_policy must be .* with global_capacity, got 'priority'",
        ),
        (
            lambda: DCGate(D, 4, 2)(torch.randn(3, D)),
            r"DCGate: group must be set for its capacity with world_size = 2, got None",
        ),
    ],
)
def test_errors(build, match):
    with pytest.raises(ValueError, match=match):
        build()
