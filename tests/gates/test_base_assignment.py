"""BASEGate: exact loads, and totals against the exact assignment."""

from __future__ import annotations

import itertools

import pytest
import torch
from gate_checks import (
    D,
    E,
    assert_gradient,
    check_checkpoint,
    check_compile,
    check_export,
    parameters_float64,
)

from cases import each
from moeops import FMoETransformerMLP, count_tokens
from moeops.gates import BASEGate, balanced_assignment
from reference_gates import hetumoe as reference
from tolerances import assert_close

KINDS = ("random", "clustered", "skewed", "router", "repeated", "alike", "heavy_tailed")


def make_scores(kind, T, num_experts):
    """Scores as a router sees them, and worse."""
    if kind == "clustered":
        return torch.randn(T, 3) @ torch.randn(3, num_experts)
    if kind == "router":
        centroids = torch.nn.init.orthogonal_(torch.empty(num_experts, 16), 0.1)
        return torch.randn(T, 16) @ centroids.t()
    if kind == "repeated":
        tokens = torch.randn(4, 16)[torch.randint(4, (T,))]
        return tokens @ torch.randn(16, num_experts)
    scores = torch.randn(T, num_experts)
    if kind == "skewed":
        return 0.3 * scores + torch.tensor([5.0, 3.0] + [0.0] * (num_experts - 2))
    if kind == "alike":
        return torch.randn(1, num_experts) + 1e-3 * scores
    return scores**5 if kind == "heavy_tailed" else scores


def assert_balanced(ids, num_experts):
    loads = count_tokens(ids, num_experts)
    assert int(loads.sum()) == ids.numel()
    assert int(loads.min()) == ids.numel() // num_experts
    assert int(loads.max()) == -(-ids.numel() // num_experts)


def total(scores, ids):
    return float(scores.double().gather(1, ids.view(-1, 1)).sum())


@pytest.mark.parametrize(("T", "num_experts"), [(5, 2), (6, 3), (4, 3), (7, 3), (3, 4), (1, 3)])
def test_the_reference_is_the_best_of_all_assignments(T, num_experts):
    scores = torch.randn(T, num_experts, dtype=torch.float64)
    low, high = T // num_experts, -(-T // num_experts)
    best = max(
        sum(float(scores[t, e]) for t, e in enumerate(ids))
        for ids in itertools.product(range(num_experts), repeat=T)
        if all(low <= ids.count(e) <= high for e in range(num_experts))
    )
    ids = reference.balanced_assignment(scores)
    assert_balanced(ids, num_experts)
    assert abs(total(scores, ids) - best) < 1e-9


@each("kind", KINDS)
@each(("T", "num_experts"), [(24, 4), (33, 8), (48, 6), (5, 8)])
def test_total_is_near_the_exact_one(kind, T, num_experts, device):
    for seed in range(4):
        torch.manual_seed(seed)
        scores = make_scores(kind, T, num_experts)
        ids = balanced_assignment(scores.to(device)).cpu()
        assert_balanced(ids, num_experts)
        exact = total(scores, reference.balanced_assignment(scores.double()))
        spread = float(scores.max() - scores.min())
        # The docstring's bounds, in parts of the scores' range per token; the exact total is an upper bound.
        bound = 0.02 if num_experts <= T else 0.1
        assert -1e-5 * T * spread <= exact - total(scores, ids) <= bound * T * spread


@each("kind", KINDS)
def test_total_is_near_an_upper_bound_for_many_tokens(kind, device):
    """By duality, for any prices v: every balanced total is at most sum_t max_e (s - v) + the dearest rooms' prices."""
    T, num_experts = 1000, 16
    scores = make_scores(kind, T, num_experts)
    ids = balanced_assignment(scores.to(device)).cpu()
    assert_balanced(ids, num_experts)
    scores = scores.double()
    spread = float(scores.max() - scores.min())
    prices = torch.zeros(num_experts, dtype=torch.float64)
    for step in range(400):  # any prices make a bound; these make a close one
        temperature = spread * 0.3 * 0.985**step
        demand = torch.softmax((scores - prices) / temperature, -1).sum(0)
        prices += temperature * (demand * num_experts / T).log()
    extra = T % num_experts
    bound = float((scores - prices).amax(-1).sum() + T // num_experts * prices.sum())
    bound += float(prices.sort(descending=True).values[:extra].sum())
    assert total(scores, ids) >= bound - 0.01 * T * spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each(("T", "num_experts"), [(0, 3), (1, 1), (7, 1), (2, 5), (65, 8), (64, 8)])
def test_loads_are_exact(T, num_experts, dtype, device):
    for scores in (torch.randn(T, num_experts), torch.zeros(T, num_experts)):
        ids = balanced_assignment(scores.to(device, dtype))
        assert ids.shape == (T,)
        assert ids.dtype == torch.int64
        assert_balanced(ids, num_experts)


def test_huge_and_tiny_scores(device):
    scores = torch.randn(50, 6, device=device)
    want = balanced_assignment(scores)
    for scale in (2.0**60, 2.0**-60):
        assert torch.equal(balanced_assignment(scores * scale), want)


def test_best_experts_are_taken_where_they_are_balanced(device):
    want = torch.arange(60, device=device) % 6
    scores = torch.randn(60, 6, device=device)
    scores[torch.arange(60), want] += 20
    assert torch.equal(balanced_assignment(scores), want)


def test_same_scores_same_assignment(device):
    scores = make_scores("repeated", 500, 12).to(device)
    assert torch.equal(balanced_assignment(scores), balanced_assignment(scores.clone()))


def test_values_and_gradients(dtype, device):
    T = 26
    gate = BASEGate(D, E).to(device, dtype)
    x = torch.randn(T, D, device=device).to(dtype).requires_grad_()
    router_type = torch.float64 if dtype == torch.float64 else torch.float32
    params = parameters_float64(gate)
    x64 = x.detach().cpu().double().requires_grad_()
    logits = x64 @ params["gate.weight"].t()

    ids, weights = gate.eval()(x)
    assert torch.equal(ids.cpu(), logits.argmax(-1, keepdim=True))
    assert_close(weights, 1 / (1 + torch.exp(-logits.gather(1, ids.cpu()))), router_type)
    assert not gate.has_loss

    ids, weights = gate.train()(x)
    assert ids.shape == (T, 1)
    assert_balanced(ids, E)
    want = 1 / (1 + torch.exp(-logits.gather(1, ids.cpu())))
    assert_close(weights, want, router_type)
    factors = torch.randn(T, 1, dtype=torch.float64)
    (weights * factors.to(weights)).sum().backward()
    (want * factors).sum().backward()
    assert_gradient(x.grad, x64.grad, dtype, "gradient of x")
    grad = gate.gate.weight.grad
    assert_gradient(grad, params["gate.weight"].grad, dtype, "gradient of the centroids")


def test_centroids_start_orthogonal():
    gate = BASEGate(16, 6)
    product = gate.gate.weight @ gate.gate.weight.t()
    assert_close(product, 0.01 * torch.eye(6), torch.float32)
    assert gate.gate.bias is None


def test_gradcheck():
    gate = BASEGate(D, E).double()
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)

    def function(x, weight):
        return torch.func.functional_call(gate, {"gate.weight": weight}, (x,))[1]

    weight = gate.gate.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, weight))


def build(d_model, num_expert, world_size, top_k):
    return BASEGate(d_model, num_expert, world_size, top_k)


def test_compile(device):
    check_compile(build, device, "inductor", top_k=1)


def test_the_solver_is_one_op_to_a_compiler(device):
    scores = torch.randn(13, 4, device=device)
    results = torch.library.opcheck(torch.ops.moeops_gates.balanced_assignment.default, (scores,))
    assert set(results.values()) == {"SUCCESS"}


def test_export(device):
    check_export(build, device, strict=False, training=True, top_k=1)


def test_checkpoint():
    check_checkpoint(build, compile_it=False, top_k=1)


def test_trains_with_every_expert_in_use():
    layer = FMoETransformerMLP(4, D, 12, activation="swiglu", top_k=1, gate=BASEGate)
    layer(torch.randn(20, D)).square().sum().backward()
    used = layer.experts.w_down.grad.flatten(1).abs().sum(1) > 0
    assert bool(used.all())


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: BASEGate(D, 4, 1, 2), ValueError, r"BASEGate: top_k must be 1, got 2"),
        (
            lambda: balanced_assignment(torch.tensor([[0.0, torch.nan]])),
            ValueError,
            r"balanced_assignment: scores must be finite",
        ),
        (
            lambda: balanced_assignment(torch.zeros(3)),
            ValueError,
            r"balanced_assignment: scores must have 2 dimensions",
        ),
        (
            lambda: balanced_assignment(torch.zeros(3, 2, dtype=torch.int64)),
            TypeError,
            r"balanced_assignment: scores must be float",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
