"""XMoEGate against straight-line float64."""

from __future__ import annotations

import copy
import math
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
from moeops.gates import XMoEGate
from reference_gates import fastmoe as fast
from tolerances import assert_close

P = 5


def logits_of(gate, params, x):
    bias = params.get("projector.bias")
    return fast.xmoe_logits(
        x, params["projector.weight"], bias, params["expert_vectors"], params["log_scale"]
    )


@each("k", [1, 2, E])
@each(
    ("score", "renormalize", "bias"),
    [("softmax", False, True), ("softmax", True, False), ("sigmoid", False, False)],
)
def test_values_and_gradients(score, renormalize, bias, k, dtype, device):
    options = {"score": score, "renormalize": renormalize}
    gate = XMoEGate(D, E, 1, k, bias, proj_dim=P, balance=True, **options)
    seen = []

    def wanted(logits):
        seen.append(logits)
        scores = fast.scores(logits, score)
        ids = fast.best(logits, k)
        weights = scores.gather(1, ids)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        (loss,) = fast.balance_losses([scores / scores.sum(-1, keepdim=True)], [ids])
        return ids, weights, loss

    def router(x, params):
        return logits_of(gate, params, x)

    call = partial(gate, return_all_scores=True)
    _, weights, logits = check_values(gate, wanted, dtype, device, router=router, call=call)
    assert logits.dtype == weights.dtype
    assert_close(logits, seen[0], logits.dtype, "logits")


def test_gradcheck():
    gradcheck(XMoEGate(D, E, 1, 2, proj_dim=P, balance=True))


def test_equals_the_cosine_router_of_tutel():
    """Its forward is two lines: normalised projection times normalised columns, times the clamped factor."""
    gate = XMoEGate(D, E, 1, 2, proj_dim=P, renormalize=True)
    x = torch.randn(32, D)
    sim_matrix = gate.expert_vectors.t()
    logits = torch.matmul(
        torch.nn.functional.normalize(gate.projector(x), dim=1),
        torch.nn.functional.normalize(sim_matrix, dim=0),
    )
    logits = logits * torch.clamp(gate.log_scale, max=math.log(1 / 0.01)).exp()
    want, want_ids = torch.softmax(logits, dim=1).topk(2)
    ids, weights = gate(x)
    assert torch.equal(ids, want_ids)
    assert_close(weights, want / want.sum(-1, keepdim=True), torch.float32)


def test_lengths_do_not_count():
    gate = XMoEGate(D, E, 1, 2, gate_bias=False, proj_dim=P)
    x = torch.randn(9, D)
    expected = gate(x)
    with torch.no_grad():
        gate.expert_vectors *= torch.rand(E, 1) + 0.5
    ids, weights = gate(x * (torch.rand(9, 1) + 0.5))
    assert torch.equal(ids, expected[0])
    assert_close(weights, expected[1], torch.float32)


def test_the_scale_is_clamped_at_100():
    gate = XMoEGate(D, E, 1, 2, proj_dim=P, init_t=0.25)
    assert float(gate.log_scale.detach().exp()) == pytest.approx(4)
    x = torch.randn(9, D)
    with torch.no_grad():
        gate.log_scale.fill_(7.0)
    _, weights, logits = gate(x, return_all_scores=True)
    assert 50 < float(logits.abs().max()) <= 100.001
    weights.square().sum().backward()
    assert float(gate.log_scale.grad) == 0


def test_router_stays_in_float32_under_autocast(device):
    gate = XMoEGate(D, E, 1, 2, proj_dim=P).to(device)
    x = torch.randn(32, D, device=device)
    expected = gate(x)
    with torch.autocast(device, torch.bfloat16):
        got = gate(x)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_reset_parameters():
    gate = XMoEGate(D, 64, 1, 2, proj_dim=64)
    other = copy.deepcopy(gate)
    with torch.no_grad():
        gate.log_scale.fill_(3.0)
    gate.reset_parameters()
    assert not torch.equal(gate.expert_vectors, other.expert_vectors)
    assert float(gate.log_scale.detach()) == pytest.approx(math.log(2))
    std = float(gate.expert_vectors.std())
    assert abs(std / 0.01 - 1) < 5 / math.sqrt(
        2 * 64 * 64
    )  # five standard deviations of a sample's


def test_zero_tokens_and_zero_projections(device):
    gate = XMoEGate(D, E, 1, 2, gate_bias=False, proj_dim=P, balance=True).to(device)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    assert float(gate.get_loss().detach()) == 0
    _, weights = gate(torch.zeros(3, D, device=device))
    (weights.sum() + gate.get_loss()).backward()
    assert_close(weights, torch.full((3, 2), 1 / E), torch.float32)
    assert all(bool(p.grad.isfinite().all()) for p in gate.parameters())


class TestCapture(CaptureTests):
    build = staticmethod(partial(XMoEGate, proj_dim=P, balance=True))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"top_k": 7}, ValueError, r"top_k must be at most the 6 experts, got 7"),
        ({"proj_dim": 0}, ValueError, r"proj_dim must be at least 1, got 0"),
        ({"proj_dim": 2.0}, TypeError, r"proj_dim must be an int, got 2\.0"),
        ({"init_t": 0.0}, ValueError, r"init_t must be at least 0\.01 and finite, got 0\.0"),
        ({"init_t": float("nan")}, ValueError, r"init_t must be .* got nan"),
        ({"score": "x"}, ValueError, r"score must be one of .* got 'x'"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=f"XMoEGate: {match}"):
        XMoEGate(D, E, **options)
