"""NoisyGate against straight-line float64, and what its noise does."""

from __future__ import annotations

import math

import pytest
import torch
from choice_checks import check_values
from gate_checks import (
    D,
    E,
    assert_gradient,
    best,
    check_checkpoint,
    check_compile,
    check_export,
    gradcheck,
    parameters_float64,
)

from cases import each
from moeops.gates import NoisyGate, expert_capacity
from reference_gates import fastmoe as fast
from tolerances import assert_close


def cv2(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def phi(value):
    return 0.5 * (1 + torch.erf(value / math.sqrt(2)))


def reference(x, w, w_noise, k, noise):
    """Equations 3 to 11 of the paper, expert by expert; ``noise`` is None in evaluation."""
    T, num_experts = x.shape[0], w.shape[0]
    clean = x @ w.t()
    h = clean
    if noise is not None:
        sigma = torch.log(1 + torch.exp(x @ w_noise.t())) + 0.01
        h = clean + noise * sigma
    ids = best(h, k)
    chosen = torch.exp(h.gather(1, ids))
    weights = chosen / chosen.sum(-1, keepdim=True)
    sums = [x.new_zeros(()) for _ in range(num_experts)]
    load = [x.new_zeros(()) for _ in range(num_experts)]
    for t in range(T):
        for j in range(k):
            sums[ids[t, j]] = sums[ids[t, j]] + weights[t, j]
        for e in range(num_experts):
            if noise is None or k == num_experts:
                load[e] = load[e] + float(e in ids[t])
                continue
            others = torch.cat((h[t, :e], h[t, e + 1 :]))
            kth = torch.sort(others, descending=True).values[k - 1]
            load[e] = load[e] + phi((clean[t, e] - kth) / sigma[t, e])
    return ids, weights, cv2(sums) + cv2(load)


@each("k", [1, 2, 4, E])
@each("training", [True, False], ids=["train", "eval"])
def test_values_and_gradients(training, k, dtype, device):
    T = 19
    gate = NoisyGate(D, E, 1, k).train(training)

    def wanted(tokens_and_params):
        x, params = tokens_and_params
        router_type = torch.float64 if dtype == torch.float64 else torch.float32
        noise = torch.randn(T, E, dtype=router_type, device=device).cpu().double()
        noise = noise if training else None
        return reference(x, params["gate.weight"], params["noise.weight"], k, noise)

    check_values(gate, wanted, dtype, device, T, router=lambda *both: both, seed=3)
    assert (gate.noise.weight.grad is None) == (not training)


@each("k", [1, 2, 4])
@each("training", [True, False], ids=["train", "eval"])
def test_fsmoes_gshard_gate(training, k, device):
    T = 40
    gate = NoisyGate(D, E, 1, k, min_noise=0, balance="gshard", capacity=(0.8, 1.1))
    gate = gate.to(device, torch.float64).train(training)
    # Skewed, so that something is dropped.
    x = (torch.randn(T, D, dtype=torch.float64) + 1).to(device).requires_grad_()
    torch.manual_seed(3)
    ids, weights = gate(x)
    loss = gate.get_loss()
    torch.manual_seed(3)
    noise = torch.randn(T, E, dtype=torch.float64, device=device).cpu()

    params = parameters_float64(gate)
    x64 = x.detach().cpu().requires_grad_()
    h = x64 @ params["gate.weight"].t()
    if training:
        h = h + noise * torch.log(1 + torch.exp(x64 @ params["noise.weight"].t()))
    first = fast.best(h, k)
    rows = expert_capacity(0.8 if training else 1.1, T, k, E)
    (want_ids,) = fast.keep([first], fast.queue([first], None, "choice"), E, rows)
    want = fast.softmax_at(h, first)
    (want_loss,) = fast.balance_losses([fast.softmax(h)], [first[:, :1]])
    assert torch.equal(ids.cpu(), want_ids)
    assert int((ids == -1).sum()) > 0
    assert_close(weights, want, torch.float64)
    assert_close(loss, want_loss, torch.float64)
    factors = torch.randn(T, k, dtype=torch.float64)
    ((weights * factors.to(weights)).sum() + 3 * loss).backward()
    ((want * factors).sum() + 3 * want_loss).backward()
    assert_gradient(x.grad, x64.grad, torch.float64, "gradient of x")
    if training:
        want_grad = params["noise.weight"].grad
        assert_gradient(gate.noise.weight.grad, want_grad, torch.float64, "gradient of W_noise")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fastmoes_variance(training):
    gate = NoisyGate(D, E, 1, 2, compat=True).double().train(training)
    other = NoisyGate(D, E, 1, 2).double().train(training)
    other.load_state_dict(gate.state_dict())
    x = torch.randn(19, D, dtype=torch.float64)
    losses = []
    for g in (gate, other):
        torch.manual_seed(3)
        g(x)
        losses.append(g.get_loss())
    # The means are K * T / E or near it: the 1e-10 beside them is below a relative 1e-10.
    torch.testing.assert_close(losses[0], losses[1] * E / (E - 1), rtol=1e-9, atol=0)
    one = NoisyGate(D, 1, 1, 1, compat=True)
    one(torch.randn(4, D))
    assert float(one.get_loss().detach()) == 0


def test_without_a_loss():
    gate = NoisyGate(D, E, 1, 2, balance=False, min_noise=0)
    gate(torch.randn(4, D))
    assert not gate.has_loss


def fsmoe(d_model, num_expert, world_size, top_k, gate_bias=True):
    return NoisyGate(
        d_model, num_expert, world_size, top_k, min_noise=0, balance="gshard", capacity=0.8
    )


def test_compile_with_capacity(device):
    check_compile(fsmoe, device, "aot_eager")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_tokens(training, device):
    gate = NoisyGate(D, E, 1, 2).to(device).train(training)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    assert float(gate.get_loss().detach()) == 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_expert(training, device):
    gate = NoisyGate(D, 1, 1, 1).to(device).train(training)
    ids, weights = gate(torch.randn(4, D, device=device))
    assert ids.tolist() == [[0]] * 4
    assert weights.tolist() == [[1.0]] * 4
    assert float(gate.get_loss().detach()) == 0
    assert ids.device == weights.device == gate.gate.weight.device


def test_gradcheck():
    gradcheck(NoisyGate(D, E, 1, 2))
    gradcheck(NoisyGate(D, E, 1, 3).eval())


def test_seed_reproduces_the_noise_and_evaluation_has_none(device):
    gate = NoisyGate(D, E, 1, 2).to(device)
    x = torch.randn(64, D, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gate(x)[1])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    gate.eval()
    assert torch.equal(gate(x)[1], gate(x)[1])
    assert torch.equal(gate(x)[0], best(gate.gate(x), 2))


def test_noise_picks_experts_as_often_as_the_normal_distribution_says(device):
    """Two experts whose logits differ by 1, sigma = log 2 + 0.01 each: P = Phi(1 / (sqrt(2) * sigma))."""
    gate = NoisyGate(1, 2, 1, 1).to(device)
    with torch.no_grad():
        gate.gate.weight.copy_(torch.tensor([[1.0], [0.0]]))
        gate.noise.weight.zero_()
    count = 40000
    ids, _ = gate(torch.ones(count, 1, device=device))
    want = float(phi(torch.tensor(1 / (math.sqrt(2) * (math.log(2) + 0.01)))))
    bound = 5 * math.sqrt(want * (1 - want) / count)  # five standard deviations of the mean
    assert abs(float((ids == 0).float().mean()) - want) < bound


def test_training_on_the_loss_balances_the_experts():
    gate = NoisyGate(D, E, 1, 2)
    x = torch.randn(256, D) + 1  # a mean that the router can use to prefer an expert
    with torch.no_grad():
        gate.gate.weight[0] += 0.5

    def largest_share():
        ids = gate(x)[0].reshape(-1)
        return float(ids.bincount(minlength=E).max()) / ids.numel()

    before = largest_share()
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.05)
    for _ in range(100):
        gate(x)
        optimizer.zero_grad()
        gate.get_loss().backward()
        optimizer.step()
    assert before > 0.45
    assert largest_share() < 0.25


@pytest.mark.parametrize(("backend", "k"), [("inductor", 2), ("aot_eager", 1), ("aot_eager", E)])
def test_compile(backend, k, device):
    check_compile(NoisyGate, device, backend, k)


def test_compile_in_evaluation(device):
    check_compile(NoisyGate, device, "aot_eager", training=False)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(strict, training, device):
    check_export(NoisyGate, device, strict, training)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_checkpoint(compile_it):
    check_checkpoint(NoisyGate, compile_it)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((D, 4, 1, 5), ValueError, r"NoisyGate: top_k must be at most the 4 experts, got 5"),
        ((D, 4, 1, 0), ValueError, r"NoisyGate: top_k must be at least 1, got 0"),
        ((D, 4, 1, 1.5), TypeError, r"NoisyGate: top_k must be an int, got 1\.5"),
        ((0, 4, 1, 1), ValueError, r"NoisyGate: d_model must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        NoisyGate(*arguments)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"balance": "x"}, r"balance must be one of .* got 'x'"),
        ({"min_noise": -1}, r"min_noise must be at least 0 and finite, got -1"),
        ({"min_noise": 0}, r"min_noise must be above 0 with balance='load', got 0"),
        ({"capacity": 0}, r"capacity must be .* got 0"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=f"NoisyGate: {match}"):
        NoisyGate(D, 4, 1, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    x = torch.randn(4, D)
    x[2, 3] = value
    with pytest.raises(RuntimeError, match=r"topk_route: logits"):
        NoisyGate(D, 4, 1)(x)
