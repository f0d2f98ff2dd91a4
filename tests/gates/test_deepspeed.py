"""DeepSpeedGate against float64, token by token, and what it draws."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import check_values, linear_logits
from gate_checks import (
    D,
    E,
    check_checkpoint,
    check_compile,
    check_export,
    gradcheck,
)

from cases import each
from moeops.gates import DeepSpeedGate
from reference_gates.hetumoe import deepspeed_capacity, deepspeed_gate
from tolerances import assert_close

OPTIONS = [
    {"top_k": 1, "use_rts": False},
    {"top_k": 1, "capacity": 0.6},
    {"top_k": 1, "noisy_gate_policy": "RSample"},
    {"top_k": 1, "noisy_gate_policy": "Jitter", "capacity": None},
    {"top_k": 1, "min_capacity": 1000},
    {"top_k": 2},
    {"top_k": 2, "top2_2nd_expert_sampling": False, "capacity": 0.4},
    {"top_k": 2, "capacity": None},
    {"top_k": 3, "capacity": 0.6},
    {"top_k": 3, "capacity": 0.6, "drop_policy": "position"},
    {"top_k": E, "capacity": None},
    {"top_k": 2, "compat": True},
    {"top_k": 1, "compat": True, "capacity": (1.0, 0.5)},
]


def sample(probs, uniform):
    """The first expert at which the cumulated probability exceeds the share that was drawn, ``[T, 1]``."""
    mass = probs.cumsum(-1)
    return (mass <= uniform[:, None] * mass[:, -1:]).sum(-1, keepdim=True)


@each("training", [True, False], ids=["train", "eval"])
@each("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_values_and_gradients(options, training, dtype, device):
    T, k = 23, options["top_k"]
    gate = DeepSpeedGate(D, E, 1, **{"min_capacity": 2, **options}).train(training)

    def uniform(*shape):
        router_type = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.rand(*shape, dtype=router_type, device=device).cpu().double()

    # The numbers that the gate drew, in its order.
    draws = training or gate.compat

    def router(x, params):
        jitters = gate.noisy_gate_policy == "Jitter" and training
        return linear_logits(x * (0.99 + 0.02 * uniform(T, D)) if jitters else x, params)

    def wanted(logits):
        chosen = None
        if gate.noisy_gate_policy == "RSample" and training:
            chosen = sample(torch.softmax(logits.detach(), -1), uniform(T))
        if k == 2 and gate.top2_2nd_expert_sampling and draws:
            first = logits.detach().argmax(-1, keepdim=True)
            others = torch.softmax(logits.detach(), -1).scatter(1, first, 0)
            chosen = torch.cat((first, sample(others, uniform(T))), dim=1)
        order = uniform(T) if k == 1 and gate.use_rts and draws and gate.capacity else None
        capacity = None
        if gate.capacity is not None:
            factor = gate.capacity[0 if training else 1]
            capacity = deepspeed_capacity(T, E, k, factor, gate.min_capacity)
        return deepspeed_gate(
            logits,
            k,
            capacity,
            ids=chosen,
            draws=order,
            drop_policy="probs" if gate.drop_policy == "priority" else "position",
        )

    ids, _ = check_values(gate, wanted, dtype, device, T, router=router, seed=3)
    if gate.capacity is None or gate.min_capacity > T:
        assert not bool((ids == -1).any())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_used_token(k, device):
    T = 15
    gate = DeepSpeedGate(D, E, 1, k, capacity=(0.7, 1.0), min_capacity=0).to(device).eval()
    x = torch.randn(T, D, device=device)
    used = (torch.rand(T) < 0.6).to(device)
    ids, weights = gate(x, used)
    logits = (x @ gate.gate.weight.t()).detach().cpu().double()
    capacity = deepspeed_capacity(T, E, k, 1.0, 0)
    want = deepspeed_gate(logits, k, capacity, used=used.cpu().long())
    assert torch.equal(ids.cpu(), want[0])
    assert bool((ids[~used] == -1).all())
    assert_close(weights[ids >= 0], want[1][want[0] >= 0], torch.float32)
    assert_close(gate.get_loss(), want[2], torch.float32)


def test_second_expert_is_a_sample_of_the_others(device):
    """Counts are binomial: 5 sigma are crossed once in 10^6."""
    T = 20_000
    gate = DeepSpeedGate(D, E, 1, 2, capacity=None).to(device)
    x = torch.randn(1, D, device=device)
    probs = torch.softmax((x @ gate.gate.weight.t()).detach().cpu().double(), -1)[0]
    ids, _ = gate(x.expand(T, D))
    first = int(probs.argmax())
    assert bool((ids[:, 0] == first).all())
    probs[first] = 0
    probs = probs / probs.sum()
    counts = ids[:, 1].bincount(minlength=E).cpu()
    assert bool(((counts - T * probs).abs() <= 5 * (T * probs * (1 - probs)).sqrt()).all())
    ids, _ = gate.eval()(x.expand(T, D))
    assert bool((ids[:, 1] == int(probs.argmax())).all())


def test_rsample_is_a_sample_of_the_softmax(device):
    T = 20_000
    gate = DeepSpeedGate(D, E, noisy_gate_policy="RSample", capacity=None).to(device)
    x = torch.randn(1, D, device=device)
    probs = torch.softmax((x @ gate.gate.weight.t()).detach().cpu().double(), -1)[0]
    counts = gate(x.expand(T, D))[0].view(-1).bincount(minlength=E).cpu()
    assert bool(((counts - T * probs).abs() < 5 * (T * probs * (1 - probs)).sqrt()).all())


def test_random_token_selection_is_fair(device):
    """Every token of a full expert is kept with probability C / T: 5 sigma of a binomial count."""
    T, runs = 16, 2000
    gate = DeepSpeedGate(D, 4, capacity=1.0, min_capacity=0).to(device)
    x = torch.ones(T, D, device=device)
    kept = sum((gate(x)[0][:, 0] >= 0).long() for _ in range(runs)).cpu()
    p = 1 / 4
    assert int(kept.sum()) == runs * 4
    assert float((kept - runs * p).abs().max()) < 5 * (runs * p * (1 - p)) ** 0.5
    assert gate.eval()(x)[0][:, 0].tolist() == [int(gate(x)[0][0, 0])] * 4 + [-1] * 12


@each(
    "options",
    [
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": 1, "noisy_gate_policy": "RSample"},
        {"top_k": 1, "noisy_gate_policy": "Jitter"},
    ],
)
def test_seed_reproduces_and_evaluation_draws_nothing(options, device):
    gate = DeepSpeedGate(D, E, 1, capacity=0.5, min_capacity=0, **options).to(device)
    x = torch.randn(64, D, device=device)
    torch.manual_seed(5)
    first = gate(x)
    other = gate(x)
    assert any(not torch.equal(a, b) for a, b in zip(other, first, strict=True))
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(gate(x), first, strict=True))
    gate.eval()
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(gate(x), gate(x), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_jitter_is_small_and_in_the_routers_type():
    gate = DeepSpeedGate(D, E, noisy_gate_policy="Jitter", capacity=None).bfloat16()
    x = torch.randn(500, D).bfloat16()
    weights = gate(x)[1]
    exact = gate.eval()(x)[1]
    change = (weights / exact).log().abs()
    # The logits move by at most 0.01 * sum |w x|, and log softmax by at most twice that.
    bound = 0.02 * (x.float().abs() @ gate.gate.weight.float().abs().t()).amax(-1, keepdim=True)
    assert bool((change <= bound + 1e-5).all())
    assert len(change.unique()) > 400


def test_weights_of_a_token_sum_to_one_over_what_is_left():
    gate = DeepSpeedGate(D, E, 1, 3, capacity=0.5, min_capacity=0)
    ids, weights = gate(torch.randn(60, D))
    kept = (weights * (ids >= 0)).sum(-1)
    some = (ids >= 0).any(-1)
    assert 0 < int(some.sum()) < 60
    assert_close(kept, some.float(), torch.float32)
    assert bool((weights[ids < 0] == 0).all())


def test_second_choice_takes_over_from_a_dropped_first_one_with_a_tiny_probability():
    gate = DeepSpeedGate(3, 3, 1, 2, capacity=(1.0, 0.5), min_capacity=0).eval()
    with torch.no_grad():
        logits = [[100.0, -100.0, -200.0], [100.0, -200.0, -100.0], [100.0, -100.0, -200.0]]
        gate.gate.weight.copy_(torch.tensor(logits).t())
    ids, weights = gate(torch.eye(3))
    # One row per expert: the second token loses expert 0 and keeps expert 2, whose probability is exp(-200).
    assert ids.tolist() == [[0, 1], [-1, 2], [-1, -1]]
    assert weights.tolist() == [[1, 0], [0, 1], [0, 0]]
    weights.sum().backward()
    assert bool(gate.gate.weight.grad.isfinite().all())


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[2], OPTIONS[3], OPTIONS[5], OPTIONS[8]])
def test_gradcheck(options):
    gradcheck(DeepSpeedGate(D, E, 1, **{"min_capacity": 0, **options}))


def test_no_tokens(device):
    for k in (1, 2, 3):
        gate = DeepSpeedGate(D, E, 1, k).to(device)
        ids, weights = gate(torch.randn(0, D, device=device))
        assert ids.shape == weights.shape == (0, k)
        assert float(gate.get_loss().detach()) == 0


TOP1 = partial(DeepSpeedGate, noisy_gate_policy="RSample", capacity=0.8, min_capacity=1)
TOP2 = partial(DeepSpeedGate, noisy_gate_policy="Jitter", capacity=0.8)
TOP3 = partial(DeepSpeedGate, capacity=(0.8, 0.7), min_capacity=1)


@pytest.mark.parametrize(
    ("build", "k", "backend"),
    [(TOP1, 1, "aot_eager"), (TOP2, 2, "inductor"), (TOP3, 3, "aot_eager")],
    ids=["top1", "top2", "top3"],
)
def test_compile(build, k, backend, device):
    check_compile(build, device, backend, k)


@pytest.mark.parametrize(
    ("build", "k", "strict", "training"),
    [(TOP1, 1, False, True), (TOP2, 2, True, True), (TOP3, 3, False, False)],
    ids=["top1", "top2", "top3"],
)
def test_export(build, k, strict, training, device):
    check_export(build, device, strict, training, k)


def test_checkpoint():
    check_checkpoint(TOP2, compile_it=False)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 5}, r"DeepSpeedGate: top_k must be at most .* got 5"),
        ({"capacity": 0.0}, r"capacity must be None, .* got 0.0"),
        ({"capacity": (1.0, -1)}, r"capacity must be None, .* got \(1\.0, -1\)"),
        ({"min_capacity": -1}, r"min_capacity must be at least 0, got -1"),
        ({"noisy_gate_policy": "x"}, r"noisy_gate_policy must be one of .* got 'x'"),
        (
            {"noisy_gate_policy": "RSample", "top_k": 2},
            r"noisy_gate_policy must be None or 'Jitter' for top_k > 1",
        ),
        ({"drop_policy": "x"}, r"drop_policy must be one of .* got 'x'"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        DeepSpeedGate(D, 4, **options)


def test_bad_input():
    with pytest.raises(ValueError, match=r"DeepSpeedGate: used_token must have size 3"):
        DeepSpeedGate(D, 4)(torch.randn(3, D), torch.ones(4))
    with pytest.raises(RuntimeError, match=r"topk_route_balance: logits must be finite"):
        DeepSpeedGate(D, 4)(torch.full((3, D), torch.nan))
