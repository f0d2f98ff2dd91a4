"""DenseToSparseGate against float64, token by token, and what its noise and its temperature do."""

from __future__ import annotations

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
    layer_with,
)
from torch._dynamo.testing import CompileCounterWithBackend

from cases import each
from moeops.gates import DenseToSparseGate
from moeops.gates.dense_to_sparse import add_gumbel
from reference_gates.hetumoe import dense_to_sparse_gate


@each("training", [True, False], ids=["train", "eval"])
@each(
    ("k", "temperature", "threshold"),
    [(E, 5.0, 0.0), (E, 1.0, 0.1), (3, 1.0, 0.2), (1, 0.5, 0.02), (E, 0.2, 0.3)],
)
def test_values_and_gradients(k, temperature, threshold, training, dtype, device):
    T = 17
    gate = DenseToSparseGate(D, E, 1, k, temperature=temperature, threshold=threshold, balance=True)
    gate.train(training)
    slots = k if threshold == 0 else min(k, math.ceil(1 / threshold))

    def wanted(logits):
        router_type = torch.float64 if dtype == torch.float64 else torch.float32
        draws = torch.empty(T, E, dtype=router_type, device=device).exponential_().cpu().double()
        ids, weights, loss = dense_to_sparse_gate(
            logits,
            -torch.log(draws) if training else None,
            float(torch.tensor(temperature)),
            k,
            threshold,
        )
        assert bool((ids[:, slots:] == -1).all())
        return ids[:, :slots], weights[:, :slots], loss

    ids, _ = check_values(gate, wanted, dtype, device, T, seed=3)
    assert ids.shape[1] == slots


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_first_choice_is_a_sample_of_the_softmax(temperature, device):
    """Gumbel-max, at any temperature: each count is binomial, and 5 sigma are crossed once in 10^6."""
    T = 20_000
    gate = DenseToSparseGate(D, E, 1, 1, temperature=temperature).to(device)
    x = torch.randn(1, D, device=device)
    probs = torch.softmax((x @ gate.gate.weight.t()).cpu().double(), -1)[0]
    counts = gate(x.expand(T, D))[0].view(-1).bincount(minlength=E).cpu()
    sigma = (T * probs * (1 - probs)).sqrt()
    assert bool(((counts - T * probs).abs() < 5 * sigma).all())


def test_gumbel_noise_has_the_distribution_of_its_name(device):
    """Kolmogorov's distance of n samples is above 2.5 / sqrt(n) with probability 2 exp(-12.5)."""
    n = 100_000
    noise = add_gumbel(torch.zeros(n, device=device)).cpu().double().sort().values
    expected = torch.exp(-torch.exp(-noise))
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((expected - steps).max(), (steps + 1 / n - expected).max())
    assert float(distance) < 2.5 / n**0.5


def test_gumbel_noise_is_finite_where_a_compiler_draws_the_ends(monkeypatch):
    ends = torch.tensor([0.0, torch.inf])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda t: ends)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert bool(add_gumbel(torch.zeros(2)).isfinite().all())


def test_seed_reproduces(device):
    gate = DenseToSparseGate(D, E, 1, E).to(device)
    x = torch.randn(9, D, device=device)
    torch.manual_seed(5)
    first = gate(x)
    assert not torch.equal(gate(x)[1], first[1])
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(gate(x), first, strict=True))
    gate.eval()
    assert all(torch.equal(a, b) for a, b in zip(gate(x), gate(x), strict=True))


def test_number_of_experts_falls_with_the_temperature():
    gate = DenseToSparseGate(D, 16, 1, 16, temperature=20.0, final_temperature=0.02, threshold=0.04)
    x = torch.randn(200, D)
    used = []
    for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
        gate.anneal(progress)
        used.append(float((gate(x)[0] >= 0).sum(1).float().mean()))
    assert used == sorted(used, reverse=True)
    assert used[0] == 16
    assert used[-1] < 1.1


def test_best_expert_is_used_below_the_threshold():
    gate = DenseToSparseGate(D, 64, 1, 8, temperature=1e6, threshold=0.5)
    ids, _ = gate(torch.randn(10, D))
    assert bool((ids[:, 0] >= 0).all())
    assert bool((ids[:, 1:] == -1).all())


def test_eval_top_k():
    gate = DenseToSparseGate(D, E, 1, E, temperature=10.0, eval_top_k=1)
    x = torch.randn(10, D)
    assert gate(x)[0].shape == (10, E)
    ids, _ = gate.eval()(x)
    assert torch.equal(ids, (x @ gate.gate.weight.t()).argmax(-1, keepdim=True))


def test_temperature_is_saved_and_keeps_its_type():
    gate = DenseToSparseGate(D, E, temperature=3.0, final_temperature=0.5)
    gate.anneal(0.5)
    want = math.sqrt(3.0 * 0.5)
    assert float(gate.temperature) == pytest.approx(want, rel=1e-6)
    other = DenseToSparseGate(D, E)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.temperature, gate.temperature)
    for cast in (torch.bfloat16, torch.float64):
        other.to(cast)
        assert other.temperature.dtype == torch.float32
        assert torch.equal(other.temperature, gate.temperature)
        assert other.gate.weight.dtype == cast
    with torch.device("meta"):
        assert DenseToSparseGate(D, E).to(torch.bfloat16).temperature.dtype == torch.float32


def test_temperature_does_not_recompile(device):
    torch._dynamo.reset()
    gate = DenseToSparseGate(D, E, 1, E, threshold=0.0).to(device).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gate, fullgraph=True, backend=counter)
    x = torch.randn(9, D, device=device)
    for temperature in (5.0, 1.0, 0.3, 0.1):
        gate.set_temperature(temperature)
        want = torch.softmax(x @ gate.gate.weight.t() / temperature, -1)
        want = want.sort(-1, descending=True).values
        torch.testing.assert_close(compiled(x)[1], want, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_gradcheck():
    gradcheck(DenseToSparseGate(D, E, 1, 3, temperature=0.7, balance=True))


def test_no_tokens(device):
    gate = DenseToSparseGate(D, E, 1, 2, balance=True).to(device)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    assert float(gate.get_loss().detach()) == 0


class TestCapture(CaptureTests):
    build = staticmethod(partial(DenseToSparseGate, temperature=1.0, threshold=0.1, balance=True))
    top_k = E


def test_layer_uses_as_many_experts_as_the_gate_says(device):
    layer = layer_with(partial(DenseToSparseGate, threshold=0.2), device, top_k=E).eval()
    x = torch.randn(11, D, device=device)
    ids, weights = layer.gate(x)
    assert 1 < float((ids >= 0).sum(1).float().mean()) < E

    class Fixed(torch.nn.Module):
        def forward(self, _):
            return ids.clamp_min(0), torch.where(ids >= 0, weights, 0)

    y = layer(x)
    layer.gate = Fixed()
    torch.testing.assert_close(layer(x), y)


@each(
    ("call", "match"),
    [
        (lambda: DenseToSparseGate(D, 4, 1, 5), r"DenseToSparseGate: top_k must be .* got 5"),
        (lambda: DenseToSparseGate(D, 4, temperature=0), r"temperature must be above 0 .* got 0"),
        (lambda: DenseToSparseGate(D, 4, temperature=-1.0), r"temperature must be .* got -1.0"),
        (
            lambda: DenseToSparseGate(D, 4, final_temperature=math.nan),
            r"final_temperature must be above 0 .* got nan",
        ),
        (lambda: DenseToSparseGate(D, 4, threshold=1.0), r"threshold must be in .* got 1.0"),
        (lambda: DenseToSparseGate(D, 4, eval_top_k=3), r"eval_top_k must be at most .* got 3"),
        (
            lambda: DenseToSparseGate(D, 4).set_temperature(0.0),
            r"DenseToSparseGate.set_temperature: temperature must be above 0",
        ),
        (lambda: DenseToSparseGate(D, 4).anneal(1.5), r"anneal: progress must be in .* got 1.5"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_nan_is_refused():
    with pytest.raises(RuntimeError, match=r"topk_route_balance: logits must be finite"):
        DenseToSparseGate(D, E)(torch.full((3, D), torch.nan))
