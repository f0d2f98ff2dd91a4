"""Gates: values and gradients against straight-line float64, and the behaviour that the docs promise."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cases import each
from gate_classes import OwnGate
from moeops.gates import (
    BaseGate,
    DCGate,
    GShardGate,
    NaiveGate,
    SwitchGate,
    balance_loss,
    expert_capacity,
)
from tolerances import TOLERANCES, assert_close

D, E = 8, 5


def best(logits, k):
    """The k largest entries per row, best first, ties by lower id."""
    return torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[:, :k]


def keep_first(ids, order, capacity):
    """Walk pairs in the given order; an expert that is full drops the pair."""
    ids = ids.clone()
    taken = [0] * E
    for t, k in order:
        e = int(ids[t, k])
        if e < 0:
            continue
        if taken[e] == capacity:
            ids[t, k] = -1
        else:
            taken[e] += 1
    return ids


def loss_reference(logits, first_choice):
    """E * sum_e (share of tokens with first choice e) * (mean probability of e)."""
    probs = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    T = logits.shape[0]
    total = logits.new_zeros(())
    for e in range(E):
        share = sum(int(choice) == e for choice in first_choice) / max(T, 1)
        total = total + share * probs[:, e].sum() / max(T, 1)
    return E * total


def naive_reference(logits, gate, noise):
    ids = best(logits, gate.top_k)
    chosen = torch.exp(logits.gather(1, ids))
    return ids, chosen / chosen.sum(-1, keepdim=True), None


def switch_reference(logits, gate, noise):
    T = logits.shape[0]
    ids = best(logits, 1)
    probs = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    factor = gate.capacity[0] if gate.training else gate.capacity[1]
    capacity = math.ceil(round(factor * T / E, 9))
    kept = keep_first(ids, [(t, 0) for t in range(T)], capacity)
    return kept, probs.gather(1, ids), loss_reference(logits, ids[:, 0])


def gshard_reference(logits, gate, noise):
    T = logits.shape[0]
    ids = best(logits, 2)
    chosen = torch.exp(logits.gather(1, ids))
    weights = chosen / chosen.sum(-1, keepdim=True)
    routed = ids.clone()
    if gate.training:
        for t in range(T):
            if 2 * weights[t, 1] < noise[t]:
                routed[t, 1] = -1
    factor = gate.capacity[0] if gate.training else gate.capacity[1]
    capacity = math.ceil(round(factor * T * 2 / E, 9))
    order = [(t, 0) for t in range(T)] + [(t, 1) for t in range(T)]
    return keep_first(routed, order, capacity), weights, loss_reference(logits, ids[:, 0])


GATES = {
    "naive": (lambda: NaiveGate(D, E, 1, 3), naive_reference),
    "naive_no_bias": (lambda: NaiveGate(D, E, 1, 2, gate_bias=False), naive_reference),
    "naive_all": (lambda: NaiveGate(D, E, 1, E), naive_reference),
    "switch": (lambda: SwitchGate(D, E, 1, switch_eps=0.0, capacity=(1.2, 2.0)), switch_reference),
    "gshard": (lambda: GShardGate(D, E, 1, capacity=(0.8, 1.5)), gshard_reference),
}


@each("T", [0, 1, 7, 64])
@each("training", [True, False], ids=["train", "eval"])
@each("name", GATES)
def test_values_and_gradients(name, training, T, dtype, device):
    build, reference = GATES[name]
    gate = build().to(device, dtype).train(training)
    x = torch.randn(T, D, device=device).to(dtype).requires_grad_()

    torch.manual_seed(3)
    ids, weights = gate(x)
    loss = gate.get_loss()
    router_type = torch.float64 if dtype == torch.float64 else torch.float32
    assert weights.dtype == router_type
    assert ids.dtype == torch.int64

    torch.manual_seed(3)
    noise = torch.rand(T, dtype=router_type, device=device).cpu().double()
    x64 = x.detach().cpu().double().requires_grad_()
    w64 = gate.gate.weight.detach().cpu().double().requires_grad_()
    bias = gate.gate.bias
    b64 = None if bias is None else bias.detach().cpu().double().requires_grad_()
    logits = x64 @ w64.t()
    logits = logits if b64 is None else logits + b64
    want_ids, want_weights, want_loss = reference(logits, gate, noise)

    assert torch.equal(ids.cpu(), want_ids)
    assert_close(weights, want_weights, router_type, "weights")
    factors = torch.randn(want_weights.shape, dtype=torch.float64)
    total, want_total = (weights * factors.to(weights)).sum(), (want_weights * factors).sum()
    if want_loss is None:
        assert loss is None
        assert not gate.has_loss
    else:
        assert_close(loss, want_loss, router_type, "loss")
        total, want_total = total + 3 * loss, want_total + 3 * want_loss
    total.backward()
    want_total.backward()
    assert_close(x.grad, x64.grad, dtype, "gradient of x")
    assert_close(gate.gate.weight.grad, w64.grad, dtype, "gradient of the router")
    if b64 is not None:
        # One direction of the bias cancels exactly: compare on the scale of the weight's gradient.
        scale = float(w64.grad.abs().max()) + 1e-6
        error = (gate.gate.bias.grad.cpu().double() - b64.grad).abs().max()
        assert error <= TOLERANCES[dtype] * max(scale, float(b64.grad.abs().max()))


def test_loss_is_one_at_balance(device):
    probs = torch.full((10, E), 1 / E, dtype=torch.float64, device=device)
    ids = torch.arange(10, device=device).remainder(E).reshape(10, 1)
    assert_close(balance_loss(probs, ids), torch.ones((), dtype=torch.float64), torch.float64)
    everything_to_one = torch.zeros(10, E, dtype=torch.float64, device=device)
    everything_to_one[:, 2] = 1
    worst = balance_loss(everything_to_one, torch.full((10, 1), 2, device=device))
    assert float(worst) == E


@pytest.mark.parametrize("cls", [SwitchGate, GShardGate])
def test_training_on_the_loss_balances_the_experts(cls):
    gate = cls(D, E, 1, capacity=None)
    with torch.no_grad():
        gate.gate.bias.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0, -3.0]))
    x = torch.randn(256, D)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.5)

    def largest_share():
        ids, _ = gate(x)
        return float(ids[:, 0].bincount(minlength=E).max()) / 256

    before = largest_share()
    for _ in range(60):
        gate(x)
        loss = gate.get_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = largest_share()
    assert before > 0.6
    assert after < 0.45
    assert float(loss.detach()) < 1.3


@pytest.mark.parametrize(
    ("factor", "T", "K", "num_experts", "rows"),
    [
        (1.2, 25, 1, 5, 6),
        (1.2, 26, 1, 5, 7),
        (2.4, 0, 2, 8, 0),
        (1.0, 8, 2, 16, 1),
        (0.1, 7, 2, 3, 1),
        (1.25, 16, 2, 8, 5),
    ],
)
def test_expert_capacity(factor, T, K, num_experts, rows):
    assert expert_capacity(factor, T, K, num_experts) == rows


def test_gshard_first_choices_win_over_earlier_second_choices(device):
    gate = GShardGate(2, 3, 1, capacity=0.5, random_routing=False).to(device)
    with torch.no_grad():
        # Token 0 prefers expert 0, then 1; tokens 1 and 2 prefer expert 1, then 0.
        gate.gate.weight.copy_(torch.tensor([[3.0, 2.0], [2.0, 3.0], [0.0, 0.0]]))
        gate.gate.bias.zero_()
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], device=device)
    ids, _ = gate(x)  # room for one pair per expert
    assert ids.tolist() == [[0, -1], [1, -1], [-1, -1]]


def test_gshard_keeps_second_choices_with_probability_twice_their_weight(device):
    gate = GShardGate(1, 2, 1, capacity=None).to(device)
    with torch.no_grad():
        gate.gate.weight.zero_()
        gate.gate.bias.copy_(torch.tensor([math.log(0.8), math.log(0.2)]))
    x = torch.ones(20000, 1, device=device)
    ids, weights = gate(x)
    assert_close(weights[0], torch.tensor([0.8, 0.2]), torch.float32)
    assert abs(float((ids[:, 1] == 1).float().mean()) - 0.4) < 0.02
    assert bool((ids[:, 0] == 0).all())
    gate.eval()
    assert bool((gate(x)[0][:, 1] == 1).all())
    gate.random_routing = "always"
    assert abs(float((gate(x)[0][:, 1] == 1).float().mean()) - 0.4) < 0.02


@pytest.mark.parametrize("jitter", ["input", "logits"])
def test_switch_jitter(jitter, device):
    gate = SwitchGate(1, 2, 1, switch_eps=0.25, capacity=None, jitter=jitter).to(device)
    with torch.no_grad():
        gate.gate.weight.copy_(torch.tensor([[1.0], [0.0]]))
        gate.gate.bias.zero_()
    x = torch.full((20000, 1), 2.0, device=device)
    _, weights = gate(x)
    difference = torch.log(weights / (1 - weights))[:, 0].detach().cpu()  # logit 0 minus logit 1
    if jitter == "input":  # 2 * U(0.75, 1.25)
        low, high, spread = 1.5, 2.5, 0.5 / math.sqrt(3)
    else:  # 2 + the difference of two U(0.75, 1.25)
        low, high, spread = 1.5, 2.5, 0.25 * math.sqrt(2 / 3)
    assert low - 1e-3 < float(difference.min()) < low + 0.05
    assert high - 0.05 < float(difference.max()) < high + 1e-3
    assert abs(float(difference.mean()) - 2) < 0.01
    assert abs(float(difference.std()) - spread) < 0.01
    _, quiet = gate.eval()(x)
    assert_close(quiet, torch.sigmoid(torch.full((20000, 1), 2.0)), torch.float32)


def test_switch_overflow_drops_the_last_tokens(device):
    gate = SwitchGate(1, 2, 1, switch_eps=0.0, capacity=1.0).to(device)
    with torch.no_grad():
        gate.gate.weight.zero_()
        gate.gate.bias.copy_(torch.tensor([1.0, 0.0]))
    ids, weights = gate(torch.ones(6, 1, device=device))
    assert ids[:, 0].tolist() == [0, 0, 0, -1, -1, -1]
    assert bool((weights > 0.5).all())
    assert_close(gate.get_loss(), 2 * torch.sigmoid(torch.tensor(1.0)), torch.float32)


def test_naive_with_one_choice_has_weight_one_and_no_gradient(device):
    gate = NaiveGate(D, E, 1, 1).to(device)
    x = torch.randn(9, D, device=device, requires_grad=True)
    ids, weights = gate(x)
    assert torch.equal(ids[:, 0], gate.gate(x).argmax(-1))
    assert_close(weights, torch.ones(9, 1), torch.float32)
    weights.square().sum().backward()
    assert float(x.grad.abs().max()) < 1e-6


def test_naive_returns_logits_on_request(device):
    gate = NaiveGate(D, E, 1, 2).to(device)
    x = torch.randn(4, D, device=device)
    ids, weights, logits = gate(x, return_all_scores=True)
    assert_close(logits, gate.gate(x), torch.float32)
    assert torch.equal(ids, best(logits, 2))
    assert weights.shape == (4, 2)


@each("name", GATES)
def test_router_stays_in_float32_under_autocast(name, device):
    gate = GATES[name][0]().to(device)
    x = torch.randn(32, D, device=device, requires_grad=True)
    torch.manual_seed(5)
    ids, weights = gate(x)
    torch.manual_seed(5)
    with torch.autocast(device, torch.bfloat16):
        cast_ids, cast_weights = gate(x)
    assert torch.equal(ids, cast_ids)
    assert torch.equal(weights, cast_weights)
    assert cast_weights.dtype == torch.float32
    cast_weights.square().sum().backward()
    assert x.grad.dtype == torch.float32


def test_loss_is_handed_over_once():
    gate = SwitchGate(D, E, 1)
    assert not gate.has_loss
    assert gate.get_loss() is None
    gate(torch.randn(4, D))
    assert gate.has_loss
    kept = gate.get_loss(clear=False)
    assert gate.has_loss
    assert gate.get_loss() is kept
    assert not gate.has_loss
    assert gate.get_loss() is None


def test_only_the_newest_loss_is_held():
    gate = SwitchGate(D, E, 1, switch_eps=0.0)
    gate(torch.randn(4, D))
    x = torch.randn(4, D)
    gate(x)
    newest = gate.get_loss()
    gate(x)
    assert torch.equal(newest, gate.get_loss())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_sets_the_loss_once(reentrant):
    gate = GShardGate(D, E, 1)
    x = torch.randn(16, D, requires_grad=True)
    torch.manual_seed(1)
    _, weights = gate(x)
    weights.square().sum().backward()
    expected = (gate.get_loss(), x.grad)
    x.grad = None

    torch.manual_seed(1)
    _, weights = checkpoint(gate, x, use_reentrant=reentrant)
    loss = gate.get_loss()
    assert torch.equal(loss, expected[0])
    assert loss.requires_grad is not reentrant
    weights.square().sum().backward()
    assert not gate.has_loss  # the recomputation did not bring a second one
    assert torch.equal(x.grad, expected[1])


@pytest.mark.parametrize("name", GATES)
def test_deepcopy_and_pickle_after_a_forward(name):
    gate = GATES[name][0]()
    x = torch.randn(6, D)
    gate(x)
    had_loss = gate.has_loss
    for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert not other.has_loss
        torch.manual_seed(2)
        expected = gate(x)
        torch.manual_seed(2)
        result = other(x)
        assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    assert gate.has_loss == had_loss


def test_own_gate():
    gate = OwnGate(D, 4, 1)
    x = torch.randn(9, D)
    ids, weights = gate(x)
    assert_close(weights, torch.sigmoid(gate.router(x)).gather(1, ids), torch.float32)
    gate.get_loss().backward()
    assert float(gate.router.weight.grad.abs().sum()) > 0


def test_base_gate_has_no_forward():
    with pytest.raises(NotImplementedError, match=r"BaseGate: forward must be written"):
        BaseGate(4)(torch.randn(2, 3))


@each(
    ("build", "error", "match"),
    [
        (
            lambda: NaiveGate(D, 4, 1, 5),
            ValueError,
            r"NaiveGate: top_k must be at most the 4 experts, got 5",
        ),
        (lambda: NaiveGate(D, 4, 1, 0), ValueError, r"NaiveGate: top_k must be at least 1, got 0"),
        (lambda: NaiveGate(D, 4, 1, 1.5), TypeError, r"NaiveGate: top_k must be an int, got 1\.5"),
        (lambda: NaiveGate(0, 4, 1), ValueError, r"NaiveGate: d_model must be at least 1, got 0"),
        (
            lambda: NaiveGate(D, -4, 1),
            ValueError,
            r"NaiveGate: num_expert must be at least 1, got -4",
        ),
        (
            lambda: NaiveGate(D, 4, 0),
            ValueError,
            r"NaiveGate: world_size must be at least 1, got 0",
        ),
        (
            lambda: SwitchGate(D, 4, 1, 2),
            ValueError,
            r"SwitchGate: top_k must be 1, got 2\. Pass top_k=1",
        ),
        (
            lambda: SwitchGate(D, 4, 1, switch_eps=1.5),
            ValueError,
            r"SwitchGate: switch_eps must .* got 1\.5",
        ),
        (
            lambda: SwitchGate(D, 4, 1, capacity=(1.2,)),
            ValueError,
            r"SwitchGate: capacity must .* got \(1\.2,\)",
        ),
        (
            lambda: SwitchGate(D, 4, 1, capacity=-1),
            ValueError,
            r"SwitchGate: capacity must .* got -1",
        ),
        (
            lambda: SwitchGate(D, 4, 1, jitter="x"),
            ValueError,
            r"SwitchGate: jitter must be one of .* got 'x'",
        ),
        (
            lambda: GShardGate(D, 4, 1, 3),
            ValueError,
            r"GShardGate: top_k must be 2, got 3\. Pass top_k=2",
        ),
        (
            lambda: GShardGate(D, 4, 1, random_routing="no"),
            ValueError,
            r"GShardGate: random_routing must .* got 'no'",
        ),
    ],
)
def test_bad_constructor_arguments(build, error, match):
    with pytest.raises(error, match=match):
        build()


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (
            torch.randn(4, D + 1),
            ValueError,
            r"router_logits: x must have size 8 .*torch\.float32 \[4, 9\]",
        ),
        (
            torch.randn(2, 4, D),
            ValueError,
            r"router_logits: x must have 2 dimensions, got .*\[2, 4, 8\]",
        ),
        (
            torch.ones(4, D, dtype=torch.int64),
            TypeError,
            r"router_logits: x must be float64.*got torch\.int64",
        ),
        ("tokens", TypeError, r"router_logits: x must be a tensor, got 'tokens'"),
    ],
)
def test_bad_input(x, error, match):
    with pytest.raises(error, match=match):
        NaiveGate(D, 4, 1)(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value):
    x = torch.randn(4, D)
    x[2, 3] = value
    with pytest.raises(RuntimeError, match=r"topk_route"):
        NaiveGate(D, 4, 1)(x)


@pytest.mark.parametrize(("gate", "k"), [(SwitchGate, 1), (GShardGate, 2), (DCGate, 2)])
def test_fastmoes_name_of_top_k(gate, k):
    assert gate(D, 4, topk=k).top_k == gate(D, 4, top_k=k).top_k == k
    with pytest.raises(ValueError, match=rf"{gate.__name__}: top_k must be {k}, got 3"):
        gate(D, 4, topk=3)
    with pytest.raises(
        TypeError, match=rf"{gate.__name__}: top_k must be given once, got topk too"
    ):
        gate(D, 4, top_k=k, topk=k)
