"""Losses against straight-line float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.utils import counters

import moeops
from cases import each
from moeops import auxiliary_loss
from moeops.gates import NaiveGate
from moeops.losses import (
    alignment_loss,
    balance_loss,
    cv_squared,
    gshard_loss,
    importance,
    noisy_load,
    router_entropy,
    sequence_loss,
    switch_loss,
    z_loss,
)
from tolerances import assert_close

T, E, K = 9, 5, 3
D = 8


def probabilities(logits):
    return torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)


def balance_reference(probs, ids):
    total = probs.new_zeros(())
    for e in range(E):
        share = sum(int(i) == e for i in ids.reshape(-1)) / ids.numel()
        total = total + E * share * probs[:, e].sum() / T
    return total


def z_reference(logits):
    return sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits) / T


def entropy_reference(logits):
    p = probabilities(logits)
    return sum(-(p[t, e] * torch.log(p[t, e])) for t in range(T) for e in range(E)) / T


def sequence_reference(z, ids, length=4):
    p, total, count = probabilities(z), z.new_zeros(()), 0
    for start in range(0, T, length):
        tokens = range(start, min(start + length, T))
        for e in range(E):
            f = E / K / len(tokens) * sum(int((ids[t] == e).any()) for t in tokens)
            total = total + f * sum(p[t, e] for t in tokens) / len(tokens)
        count += 1
    return total / count


LOSSES = {
    "sequence": (
        lambda z, ids: sequence_loss(
            torch.softmax(z.to(torch.promote_types(z.dtype, torch.float32)), -1), ids, 4
        ),
        sequence_reference,
    ),
    "switch": (switch_loss, lambda z, ids: balance_reference(probabilities(z), ids)),
    "gshard": (gshard_loss, lambda z, ids: balance_reference(probabilities(z), ids[:, :1])),
    "z": (lambda z, ids: z_loss(z), lambda z, ids: z_reference(z)),
    "entropy": (lambda z, ids: router_entropy(z), lambda z, ids: entropy_reference(z)),
}


def choose(num_tokens=T, device="cpu"):
    """Random choices, no expert twice in a row."""
    return torch.rand(num_tokens, E, device=device).argsort(-1)[:, :K]


@each("name", LOSSES)
def test_values_and_gradients(name, dtype, device):
    function, reference = LOSSES[name]
    logits = (2 * torch.randn(T, E, device=device)).to(dtype).requires_grad_()
    ids = choose(device=device)
    z64 = logits.detach().cpu().double().requires_grad_()
    loss, want = function(logits, ids), reference(z64, ids.cpu())
    result_type = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == result_type
    assert_close(loss, want, result_type)
    loss.backward()
    want.backward()
    assert_close(logits.grad, z64.grad, dtype, "gradient")


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    ids = choose()
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name][0](z, ids), (logits,))


MASKED = {
    "balance": lambda z, ids, **mask: balance_loss(torch.softmax(z, -1), ids, **mask),
    "switch": switch_loss,
    "gshard": gshard_loss,
    "z": lambda z, ids, **mask: z_loss(z, **mask),
    "entropy": lambda z, ids, **mask: router_entropy(z, **mask),
    "noisy_load": lambda z, ids, **mask: noisy_load(
        z, z + 0.1, z.sigmoid(), best(z, 2), **mask
    ).square(),
    "noisy_load_of_all": lambda z, ids, **mask: noisy_load(z, z, z.sigmoid(), best(z, E), **mask),
    "alignment": lambda z, ids, **mask: alignment_loss(
        torch.softmax(z[:, :4], -1), best(z[:, :2], 2), 2, **mask
    ),
}


def best(z, k):
    return z.detach().topk(k).indices


@pytest.mark.parametrize("name", MASKED)
def test_masked_tokens_count_for_nothing(name, device):
    """The loss of the other tokens alone, whatever ids the masked ones have."""
    function = MASKED[name]
    logits = torch.randn(T, E, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.tensor([0, 1, 0, 0, 2, 1, 0, 0, 1], device=device)
    there, ids = mask == 0, choose(device=device)
    for given in (ids, ids.masked_fill(~there[:, None], -1)):
        for kind in (mask, mask != 0):
            loss = function(logits, given, mask=kind)
            alone = logits.detach()[there].requires_grad_()
            want = function(alone, ids[there])
            assert_close(loss, want, torch.float64)
            assert loss.requires_grad == want.requires_grad
            if not loss.requires_grad:  # a count
                continue
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            (want_grad,) = torch.autograd.grad(want.sum(), alone)
            assert_close(grad[there], want_grad, torch.float64, "gradient")
            assert not grad[~there].any()
    assert not function(logits, ids, mask=torch.ones_like(mask)).any()


def test_masked_tokens_keep_their_places_in_sequences(device):
    """Each sequence is averaged over the tokens that it has left; the last one has none."""
    probs = torch.softmax(torch.randn(12, E, dtype=torch.float64, device=device), -1)
    ids = choose(12, device)
    mask = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1], device=device)
    parts = [[0, 2, 3], [6, 7]]
    want = sum(sequence_loss(probs[part], ids[part], 4) for part in parts) / 2
    assert_close(sequence_loss(probs, ids, 4, mask=mask), want, torch.float64)
    short = sequence_loss(probs[:7], ids[:7], 4, mask=mask[:7])
    want = sum(sequence_loss(probs[part], ids[part], 4) for part in ([0, 2, 3], [6])) / 2
    assert_close(short, want, torch.float64)


@each("name", LOSSES)
def test_no_tokens(name, device):
    logits = torch.randn(0, E, device=device, requires_grad=True)
    loss = LOSSES[name][0](logits, choose(0, device))
    loss.backward()
    assert float(loss.detach()) == 0


def test_known_values():
    uniform = torch.zeros(4, E, dtype=torch.float64)
    ids = torch.arange(4)[:, None]
    assert float(z_loss(uniform)) == pytest.approx(math.log(E) ** 2, rel=1e-12)
    assert float(router_entropy(uniform)) == pytest.approx(math.log(E), rel=1e-12)
    assert float(switch_loss(uniform, ids)) == pytest.approx(1, rel=1e-12)
    certain = torch.full((4, E), -1000.0, dtype=torch.float64)
    certain[:, 2] = 1000.0
    assert float(router_entropy(certain)) == 0
    assert float(switch_loss(certain, torch.full((4, 1), 2))) == E
    assert float(z_loss(certain)) == 1e6


@each("ids_type", [torch.int32, torch.int64])
def test_importance(ids_type, dtype, device):
    ids = choose(device=device).to(ids_type)
    ids[2, 0] = ids[2, 2] = ids[5, 1] = -1
    weights = torch.rand(T, K, device=device).to(dtype).requires_grad_()
    w64 = weights.detach().cpu().double().requires_grad_()
    want = [w64.new_zeros(()) for _ in range(E)]
    for t in range(T):
        for k in range(K):
            if ids[t, k] >= 0:
                want[ids[t, k]] = want[ids[t, k]] + w64[t, k]
    want = torch.stack(want)
    result = importance(weights, ids, E)
    assert result.dtype == dtype
    assert_close(result, want, dtype)
    factors = torch.randn(E, dtype=torch.float64).to(dtype).double()
    (result * factors.to(result)).sum().backward()
    (want * factors).sum().backward()
    assert_close(weights.grad, w64.grad, dtype, "gradient")


def test_noisy_load(device):
    clean = torch.randn(T, E, dtype=torch.float64)
    noise = torch.rand(T, E, dtype=torch.float64) + 0.1
    noisy = clean + noise * torch.randn(T, E, dtype=torch.float64)
    ids = noisy.argsort(-1, descending=True)[:, :K]
    normal = torch.distributions.Normal(0.0, 1.0)
    want = torch.zeros(E, dtype=torch.float64)
    for t in range(T):
        for e in range(E):
            others = sorted((float(noisy[t, o]) for o in range(E) if o != e), reverse=True)
            want[e] += normal.cdf((clean[t, e] - others[K - 1]) / noise[t, e])
    inputs = [v.to(device).requires_grad_() for v in (clean, noisy, noise)]
    assert_close(noisy_load(*inputs, ids.to(device)), want, torch.float64)
    assert torch.autograd.gradcheck(lambda *v: noisy_load(*v, ids.to(device)), inputs)
    everyone = torch.arange(E, device=device).expand(T, E)
    assert noisy_load(*inputs, everyone).tolist() == [T] * E
    none = [v[:0] for v in inputs]
    assert noisy_load(*none, ids[:0].to(device)).tolist() == [0] * E


def test_sequence_loss_of_sequences_alone():
    """Whole sequences: the mean of their balance losses; a dropped pair counts for nobody."""
    probs, ids = torch.rand(8, E, dtype=torch.float64).softmax(-1), choose(8)
    halves = [balance_loss(p, i) for p, i in zip(probs.split(4), ids.split(4), strict=True)]
    assert_close(sequence_loss(probs, ids, 4), sum(halves) / 2, torch.float64)
    dropped = ids.clone()
    dropped[0, 0] = -1
    less = E / K * probs[:4, ids[0, 0]].sum() / 16 / 2
    assert_close(sequence_loss(probs, dropped, 4), sum(halves) / 2 - less, torch.float64)


def test_cv_squared(device):
    values = torch.rand(E, dtype=torch.float64, device=device, requires_grad=True)
    v = values.detach().tolist()
    mean = sum(v) / E
    want = sum((a - mean) ** 2 for a in v) / E / mean**2
    assert_close(cv_squared(values), torch.tensor(want, dtype=torch.float64), torch.float64)
    assert torch.autograd.gradcheck(cv_squared, (values,))
    one_for_all = torch.zeros(E, dtype=torch.float64, device=device)
    assert float(cv_squared(one_for_all)) == 0
    one_for_all[1] = 7
    assert_close(cv_squared(one_for_all), torch.tensor(E - 1.0), torch.float64)
    assert float(cv_squared(torch.ones(1, device=device))) == 0


def test_all_of_them_compile_in_one_graph(device):
    torch._dynamo.reset()
    counters.clear()

    def everything(logits, weights, ids):
        total = switch_loss(logits, ids) + gshard_loss(logits, ids) + z_loss(logits)
        total = total + sequence_loss(torch.softmax(logits, -1), ids, 4)
        total = total + cv_squared(noisy_load(logits, logits + 0.1, logits.abs() + 1, ids))
        return total + router_entropy(logits) + cv_squared(importance(weights, ids, E))

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for num_tokens in (5, 9, 1, 0, 30):
        logits = torch.randn(num_tokens, E, device=device)
        weights, ids = torch.rand(num_tokens, K, device=device), choose(num_tokens, device)
        leaves = [t.clone().requires_grad_() for t in (logits, weights)]
        marked = [t.clone().requires_grad_() for t in (logits, weights)]
        for tensor in (*marked, ids):
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        want = everything(*leaves, ids)
        result = compiled(*marked, ids)
        torch.testing.assert_close(result, want)
        want.backward()
        result.backward()
        for actual, expected in zip(marked, leaves, strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
    assert counters["stats"]["unique_graphs"] == 1


def test_old_import_paths():
    assert moeops.gates.balance_loss is balance_loss
    assert moeops.gates.auxiliary_loss is auxiliary_loss


@each(
    ("call", "error", "match"),
    [
        (lambda: z_loss(torch.ones(3)), ValueError, r"z_loss: logits must have 2 dimensions"),
        (lambda: z_loss([1.0]), TypeError, r"z_loss: logits must be a tensor, got \[1\.0\]"),
        (
            lambda: router_entropy(torch.ones(3, 2, dtype=torch.int64)),
            TypeError,
            r"router_entropy: logits must be float64.*got torch\.int64",
        ),
        (
            lambda: switch_loss(torch.ones(3, 2), torch.zeros(4, 1, dtype=torch.int64)),
            ValueError,
            r"switch_loss: topk_ids must have size 3 .*\[4, 1\]",
        ),
        (
            lambda: gshard_loss(torch.ones(3, 2), torch.ones(3, 1)),
            TypeError,
            r"gshard_loss: topk_ids must be int32 or int64, got torch\.float32",
        ),
        (
            lambda: importance(torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), 4),
            ValueError,
            r"importance: topk_ids must have size 2 .*\[3, 1\]",
        ),
        (
            lambda: importance(torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64), 0),
            ValueError,
            r"importance: num_experts must be at least 1, got 0",
        ),
        (lambda: cv_squared(torch.ones(2, 2)), ValueError, r"cv_squared: values must have 1"),
        (
            lambda: sequence_loss(torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), 0),
            ValueError,
            r"sequence_loss: sequence_length must be at least 1, got 0",
        ),
        (
            lambda: noisy_load(*[torch.ones(3, 2)] * 2, torch.ones(3, 4), torch.zeros(3, 1).long()),
            ValueError,
            r"noisy_load: noise must have size 2 .*\[3, 4\]",
        ),
        (
            lambda: NaiveGate(D, 4).add_loss("zz"),
            ValueError,
            r"NaiveGate\.add_loss: loss must be one of .*'z'.* got 'zz'",
        ),
        (
            lambda: NaiveGate(D, 4).add_loss(1e-3),
            TypeError,
            r"NaiveGate\.add_loss: loss must be a name or a function .* got 0\.001",
        ),
        (
            lambda: NaiveGate(D, 4).add_loss("z", math.nan),
            ValueError,
            r"NaiveGate\.add_loss: weight must be a finite number, got nan",
        ),
        (
            lambda: auxiliary_loss("model"),
            TypeError,
            r"auxiliary_loss: model must be .* got 'model'",
        ),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
