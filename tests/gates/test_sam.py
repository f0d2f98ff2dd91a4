"""SAMGate and its alignment loss against float64, token by token."""

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
from moeops.gates import SAMGate
from moeops.losses import alignment_loss
from reference_gates.hetumoe import _keep, by_choice, sam_gate
from tolerances import assert_close


@each(
    ("experts", "k", "groups", "alignment", "compat"),
    [
        (12, 2, 3, 1.0, False),
        (12, 4, 3, 0.5, False),
        (12, 1, 12, 2.0, False),
        (12, 12, 1, 1.0, False),
        (12, 2, 3, 1.5, True),
        (9, 3, 3, 1.0, True),
    ],
)
def test_values_and_gradients(experts, k, groups, alignment, compat, dtype, device):
    T = 13
    options = {"num_groups": groups, "alignment": alignment, "compat": compat}
    gate = SAMGate(D, experts, 1, k, **options).to(device, dtype)
    check_values(gate, lambda logits: sam_gate(logits, k, **options), dtype, device, T)


def test_compat_is_the_default_where_hetumoe_reads_the_right_width():
    gate, compat = SAMGate(D, 9, 1, 2, num_groups=3), SAMGate(D, 9, 1, 2, num_groups=3, compat=True)
    compat.load_state_dict(gate.state_dict())
    x = torch.randn(40, D)
    (ids, weights), (other_ids, other_weights) = gate(x), compat(x)
    assert torch.equal(ids, other_ids)
    assert_close(weights, other_weights.double(), torch.float32)


def test_one_group_per_rank_by_default():
    gate = SAMGate(D, 3, 4, 2)
    assert gate.num_groups == 4
    ids, _ = gate(torch.randn(50, D))
    assert torch.equal(ids[:, 0] // 3, ids[:, 1] // 3)
    assert len(set((ids[:, 0] // 3).tolist())) > 1


def test_first_choices_come_first():
    T, k = 40, 2
    gate = SAMGate(D, 6, 1, k, num_groups=2)
    limited = SAMGate(D, 6, 1, k, num_groups=2, capacity=0.6)
    limited.load_state_dict(gate.state_dict())
    x = torch.randn(T, D)
    want = _keep(gate(x)[0], by_choice(T, k), 8)  # ceil(0.6 * 40 * 2 / 6)
    assert torch.equal(limited(x)[0], want)


def test_alignment_loss_by_hand():
    probs = torch.tensor([[0.30, 0.05, 0.25, 0.40], [0.35, 0.25, 0.30, 0.10]])
    # Token 0 in group 1: expert 0 is 0.05 above 0.25. Token 1 in group 0: expert 2 is 0.05 above 0.25.
    ids = torch.tensor([[3, 2], [0, 1]])
    assert_close(alignment_loss(probs, ids, 2), torch.tensor(0.05), torch.float32)
    assert float(alignment_loss(probs[:0], ids[:0], 2)) == 0
    with pytest.raises(
        ValueError, match=r"alignment_loss: experts_per_group must be at least 1, got 0"
    ):
        alignment_loss(probs, ids, 0)
    with pytest.raises(TypeError, match=r"alignment_loss: topk_ids must be int32 or int64"):
        alignment_loss(probs, ids.float(), 2)


def test_alignment_loss_draws_the_best_experts_into_one_group():
    gate = SAMGate(D, 6, 1, 2, num_groups=2, gate_bias=False)
    x = torch.randn(64, D)

    def misplaced():
        probs = torch.softmax(x @ gate.gate.weight.t(), -1)
        best = probs.topk(2).indices // 3
        return int((best[:, 0] != best[:, 1]).sum())

    before = misplaced()
    optimizer = torch.optim.SGD(gate.parameters(), lr=2.0)
    for _ in range(200):
        probs = torch.softmax(x @ gate.gate.weight.t(), -1)
        loss = alignment_loss(probs, gate(x)[0], 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert misplaced() < before / 2


def test_gradcheck():
    gradcheck(SAMGate(D, E, 1, 2, num_groups=2, alignment=0.7))


def test_no_tokens(device):
    gate = SAMGate(D, E, 1, 2, num_groups=2, capacity=1.0).to(device)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    assert float(gate.get_loss().detach()) == 0


class TestCapture(CaptureTests):
    build = staticmethod(partial(SAMGate, num_groups=2, capacity=1.0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_groups": 4}, r"SAMGate: num_groups must divide the 6 experts, got 4"),
        ({"num_groups": 6}, r"SAMGate: top_k must be at most the 1 experts of a group, got 2"),
        ({"alignment": -1.0}, r"SAMGate: alignment must be at least 0 .* got -1"),
        ({"num_groups": 3, "compat": True}, r"SAMGate: num_groups must be at most the square"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        SAMGate(D, 6, 1, 2, **options)


def test_nan_is_refused_in_every_group():
    gate = SAMGate(D, E, 1, 2, num_groups=2)
    with torch.no_grad():
        gate.gate.bias[5] = torch.nan  # a group that no token chooses
    with pytest.raises(RuntimeError, match=r"topk_route_balance: logits must be finite"):
        gate(torch.randn(3, D))
