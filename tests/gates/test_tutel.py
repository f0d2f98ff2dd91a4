"""TutelGate against float64, token by token."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import check_values
from gate_checks import (
    D,
    E,
    check_checkpoint,
    check_compile,
    check_export,
    gradcheck,
)
from torch._dynamo.testing import CompileCounterWithBackend

from cases import each
from moeops.gates import TutelGate
from reference_gates.hetumoe import tutel_gate
from tolerances import assert_close

NOISY = {"gate_noise": 2.0, "balance": "load"}
OPTIONS = [
    {"top_k": 1, "capacity": 1.0},
    {"top_k": 2, "capacity": 0.7, "gate_noise": 1.0},
    {"top_k": 2, "capacity": 0.7, "drop_policy": "batch"},
    {"top_k": 3, "capacity": None, "renormalize": False},
    {"top_k": 3, "capacity": -0.7, "alignment": 4},
    {"top_k": 2, "capacity": -50.0},
    {"top_k": E, "capacity": 0.4, **NOISY},
    {"top_k": 2, "capacity": 1.0, "compat": True, **NOISY},
]


@each("training", [True, False], ids=["train", "eval"])
@each("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_values_and_gradients(options, training, dtype, device):
    T, k = 19, options["top_k"]
    gate = TutelGate(D, E, 1, **options).train(training)

    def wanted(clean):
        router_type = torch.float64 if dtype == torch.float64 else torch.float32
        noise = torch.randn(T, E, dtype=router_type, device=device).cpu().double()
        return tutel_gate(
            clean,
            clean + gate.gate_noise / E * noise if training else clean,
            k,
            0.0 if gate.capacity is None else gate.capacity,
            prioritized=gate.drop_policy == "batch",
            normalize=gate.renormalize,
            gate_noise=gate.gate_noise,
            gshard=gate.balance == "gshard",
            alignment=gate.alignment,
            compat=gate.compat,
        )

    x = torch.randn(T, D) + 1  # skewed, so that something is dropped
    ids, _ = check_values(gate, wanted, dtype, device, x=x, seed=3)
    assert bool((ids == -1).any()) == (options["capacity"] not in (None, -50.0))


def test_sizes_per_call(device):
    gate = TutelGate(D, E, 1, 2, capacity=0.0).to(device)
    x = torch.randn(30, D, device=device)
    logits = (x @ gate.gate.weight.t()).detach().cpu().double()
    for top_k, factor in ((1, None), (4, 0.5), (None, -0.5), (E, 0.0)):
        got = gate(x, top_k=top_k, capacity=factor)
        k, f = top_k or 2, 0.0 if factor is None else factor
        want_ids, want_weights, _ = tutel_gate(logits, logits, k, f)
        assert torch.equal(got[0].cpu(), want_ids)
        assert_close(got[1], want_weights, torch.float32)
    gate.top_k, gate.capacity = 3, 0.5
    assert torch.equal(gate(x)[0].cpu(), tutel_gate(logits, logits, 3, 0.5)[0])


def test_capacity_may_differ_in_evaluation():
    gate = TutelGate(D, E, 1, 2, capacity=(0.5, 0))
    x = torch.randn(30, D)
    assert bool((gate(x)[0] == -1).any())
    assert not bool((gate.eval()(x)[0] == -1).any())


def test_prioritized_tokens_are_those_with_the_largest_probability():
    x = torch.randn(60, D)
    gate = TutelGate(D, E, 1, 1, capacity=0.5, drop_policy="batch")
    probs = torch.softmax(x @ gate.gate.weight.t(), -1).detach()
    first = probs.argmax(-1)
    kept = gate(x)[0][:, 0] >= 0
    assert 0 < int(kept.sum()) < 60
    compared = 0
    for e in range(E):
        inside, outside = probs[kept & (first == e), e], probs[~kept & (first == e), e]
        if len(inside) and len(outside):
            assert float(inside.min()) >= float(outside.max())
            compared += 1
    assert compared


def test_noise_has_the_width_that_tutel_gives_it(device):
    """The mean square of n normal numbers is within 5 sqrt(2 / n) of 1 but for one time in 10^6."""
    T = 20_000
    gate = TutelGate(D, E, 1, E, capacity=0.0, gate_noise=3.0, renormalize=False)
    gate = gate.to(device)
    ids, weights = gate(torch.zeros(T, D, device=device))
    logits = torch.empty(T, E, device=device).scatter_(1, ids, weights.detach().log()).cpu()
    # Logits are known up to a constant per token: E - 1 of E degrees of freedom are left.
    spread = (logits - logits.mean(-1, keepdim=True)).double().square().sum() / (T * (E - 1))
    assert abs(float(spread) / (3.0 / E) ** 2 - 1) < 5 * (2 / (T * (E - 1))) ** 0.5


def test_load_loss_is_the_expected_load():
    """The mark stays, each logit's noise is drawn again: the loss's load is a mean of those draws."""
    T, draws, k = 200, 400, 2
    gate = TutelGate(D, E, 1, k, **NOISY)
    x = torch.randn(T, D)
    clean = (x @ gate.gate.weight.t()).detach()
    sigma = gate.gate_noise / E
    mark = (clean + sigma * torch.randn(T, E)).topk(k).values[:, -1:]
    probs = 0.5 * (1 + torch.erf((clean - mark) / (sigma * 2**0.5)))
    noisy = clean + sigma * torch.randn(draws, T, E)
    counts = (noisy >= mark).double().mean(0).sum(0)
    # A sum of T means of draws, each with a variance of at most 1 / 4.
    assert float((counts - probs.sum(0)).abs().max()) < 5 * (T / 4 / draws) ** 0.5
    importance = torch.softmax(clean, -1).sum(0)
    cv2 = [v.var(correction=0) / v.mean() ** 2 for v in (importance, probs.sum(0))]
    assert_close(gate._load_importance_loss(clean, mark, None), sum(cv2) / 2, torch.float32)


def test_one_expert_has_a_loss():
    gate = TutelGate(D, 1, 1, 1, **NOISY)
    gate(torch.randn(5, D))
    assert float(gate.get_loss().detach()) == 0


def test_seed_reproduces(device):
    gate = TutelGate(D, E, 1, 2, gate_noise=1.0).to(device)
    x = torch.randn(9, D, device=device)
    torch.manual_seed(5)
    first = gate(x)
    assert not torch.equal(gate(x)[1], first[1])
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(gate(x), first, strict=True))


def test_fp32_gate_keeps_the_router_when_the_module_is_cast():
    gate = TutelGate(D, E, fp32_gate=True)
    before = gate.gate.weight.detach().clone()
    for cast in (torch.bfloat16, torch.float16):
        layer = torch.nn.Sequential(gate).to(cast)
        assert torch.equal(layer[0].gate.weight, before)
    assert isinstance(gate.gate.weight, torch.nn.Parameter)
    assert gate.double().gate.weight.dtype == torch.float64
    assert TutelGate(D, E).bfloat16().gate.weight.dtype == torch.bfloat16
    with torch.device("meta"):
        meta = TutelGate(D, E, fp32_gate=True)
    assert meta.bfloat16().gate.weight.dtype == torch.float32


@pytest.mark.parametrize("options", [OPTIONS[1], NOISY, {"compat": True, **NOISY}])
def test_gradcheck(options):
    gradcheck(TutelGate(D, E, 1, **{"top_k": 2, **options}))


def test_no_tokens(device):
    for options in ({}, {"capacity": -1.0}, NOISY, {"drop_policy": "batch"}):
        gate = TutelGate(D, E, 1, 2, **options).to(device)
        ids, weights = gate(torch.randn(0, D, device=device))
        assert ids.shape == weights.shape == (0, 2)
        assert float(gate.get_loss().detach()) == 0


PRIORITIZED = partial(TutelGate, drop_policy="batch", capacity=-0.8, alignment=2, **NOISY)


@pytest.mark.parametrize(
    ("build", "backend"),
    [(PRIORITIZED, "inductor"), (TutelGate, "aot_eager")],
    ids=["prioritized", "plain"],
)
def test_compile(build, backend, device):
    check_compile(build, device, backend)


def test_sizes_per_call_do_not_recompile_a_second_time(device):
    torch._dynamo.reset()
    gate = TutelGate(D, E, 1, 2).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gate, fullgraph=True, backend=counter)
    graphs = []
    for T in (9, 30, 0):
        for top_k, factor in ((1, 0.5), (2, 0.0), (1, 0.5)):
            x = torch.randn(T, D, device=device)
            want = gate(x, top_k=top_k, capacity=factor)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            got = compiled(x, top_k=top_k, capacity=factor)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1])
        graphs.append(counter.frame_count)
    # Torch takes a number that changed for a symbol first, which costs a graph.
    assert graphs[0] <= 3
    assert graphs == graphs[:1] * 3


def test_export(device):
    check_export(PRIORITIZED, device, strict=False, training=True)
    check_export(TutelGate, device, strict=True, training=False)


def test_checkpoint():
    check_checkpoint(PRIORITIZED, compile_it=False)


@each(
    ("call", "error", "match"),
    [
        (lambda: TutelGate(D, 4, 1, 5), ValueError, r"TutelGate: top_k must be .* got 5"),
        (
            lambda: TutelGate(D, 4, capacity=float("nan")),
            ValueError,
            r"TutelGate: capacity must be None, a finite factor, .* got nan",
        ),
        (lambda: TutelGate(D, 4, capacity=(1.0,)), ValueError, r"or a pair .* got \(1\.0,\)"),
        (lambda: TutelGate(D, 4, drop_policy="x"), ValueError, r"drop_policy must be .* got 'x'"),
        (lambda: TutelGate(D, 4, balance=True), ValueError, r"balance must be .* got True"),
        (lambda: TutelGate(D, 4, gate_noise=-1), ValueError, r"gate_noise must be .* got -1"),
        (
            lambda: TutelGate(D, 4, balance="load"),
            ValueError,
            r"gate_noise must be above 0 with balance='load', got 0",
        ),
        (lambda: TutelGate(D, 4, alignment=0), ValueError, r"alignment must be at least 1, got 0"),
        (
            lambda: TutelGate(D, 4)(torch.randn(3, D), top_k=5),
            ValueError,
            r"TutelGate: top_k must be at most the 4 experts, got 5",
        ),
        (
            lambda: TutelGate(D, 4)(torch.randn(3, D), top_k=1.0),
            TypeError,
            r"TutelGate: top_k must be an int",
        ),
        (
            lambda: TutelGate(D, 4)(torch.full((3, D), torch.nan)),
            RuntimeError,
            r"topk_route_balance: logits must be finite",
        ),
    ],
)
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()
