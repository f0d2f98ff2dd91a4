"""TopKGate and the routers of published models against straight-line float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from choice_checks import check_values
from gate_checks import (
    D,
    E,
    best,
    check_checkpoint,
    check_compile,
    check_export,
    gradcheck,
)

from cases import each
from moeops.gates import GptOssGate, MixtralGate, NaiveGate, Qwen3Gate, TopKGate
from tolerances import assert_close


def reference(logits, k, score, renormalize, scale):
    """Scores, choice, weights and the loss, token by token."""
    T, num_experts = logits.shape
    ids = best(logits, k)
    weights, probs = [], []
    for t in range(T):
        powers = torch.exp(logits[t])
        s = powers / powers.sum() if score == "softmax" else powers / (1 + powers)
        chosen = s[ids[t]]
        if renormalize:
            chosen = chosen / chosen.sum()
        weights.append(scale * chosen)
        probs.append(s / s.sum())
    loss = logits.new_zeros(())
    for e in range(num_experts):
        share = sum(int(e in ids[t]) for t in range(T)) / (T * k)
        loss = loss + num_experts * share * sum(p[e] for p in probs) / T
    return ids, torch.stack(weights), loss


def softmax_over_chosen(logits, k):
    """How gpt-oss and Mixtral state it."""
    ids = best(logits, k)
    chosen = torch.exp(logits.gather(1, ids))
    return ids, chosen / chosen.sum(-1, keepdim=True)


OPTIONS = [
    {"score": score, "renormalize": renormalize, "scale": scale}
    for score in ("softmax", "sigmoid")
    for renormalize, scale in ((True, 1.0), (False, 2.5))
]


@each("bias", [True, False], ids=["bias", "no_bias"])
@each("k", [1, 2, E])
@each("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_values_and_gradients(options, k, bias, dtype, device):
    gate = TopKGate(D, E, 1, k, bias, balance=True, **options)
    seen = []

    def wanted(logits):
        seen.append(logits)
        return reference(logits, k, **options)

    call = partial(gate, return_all_scores=True)
    _, weights, logits = check_values(gate, wanted, dtype, device, call=call)
    assert logits.dtype == weights.dtype
    assert_close(logits, seen[0], logits.dtype, "logits")


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_gradcheck(options):
    gradcheck(TopKGate(D, E, 1, 3, balance=True, **options))


def test_defaults_are_those_of_the_naive_gate():
    gate, naive = TopKGate(D, E, 1, 3), NaiveGate(D, E, 1, 3)
    naive.load_state_dict(gate.state_dict())
    x = torch.randn(9, D)
    assert all(torch.equal(a, b) for a, b in zip(gate(x), naive(x), strict=True))
    assert not gate.has_loss


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_no_tokens(score, device):
    gate = TopKGate(D, E, 1, 2, score=score, balance=True).to(device)
    ids, weights = gate(torch.randn(0, D, device=device))
    assert ids.shape == weights.shape == (0, 2)
    assert float(gate.get_loss().detach()) == 0


def test_loss_survives_scores_that_are_all_zero():
    gate = TopKGate(D, E, 1, 2, score="sigmoid", renormalize=False, balance=True)
    with torch.no_grad():
        gate.gate.weight.zero_()
        gate.gate.bias.fill_(-200.0)  # sigmoid underflows to 0 in float32
    gate(torch.randn(4, D))
    loss = gate.get_loss()
    loss.backward()
    assert_close(loss, torch.ones(()), torch.float32)
    assert bool(gate.gate.bias.grad.isfinite().all())


@each("k", [2, 4])
@each(("cls", "bias"), [(MixtralGate, False), (GptOssGate, True)])
def test_mixtral_and_gpt_oss(cls, bias, k, device):
    gate = cls(D, E, 1, k).to(device)
    assert (gate.gate.bias is not None) == bias
    x = torch.randn(17, D, device=device)
    logits = torch.nn.functional.linear(x, gate.gate.weight, gate.gate.bias).cpu().double()
    ids, weights = gate(x)
    want_ids, want_weights = softmax_over_chosen(logits, k)
    assert torch.equal(ids.cpu(), want_ids)
    assert_close(weights, want_weights, torch.float32)


@pytest.mark.parametrize("renormalize", [True, False])
def test_qwen3(renormalize, device):
    gate = Qwen3Gate(D, 12, 1, renormalize=renormalize).to(device)
    assert gate.gate.bias is None
    x = torch.randn(17, D, device=device)
    probs = torch.softmax((x @ gate.gate.weight.t()).cpu().double(), -1)
    want_ids = best(probs, 8)
    want = probs.gather(1, want_ids)
    ids, weights = gate(x)
    assert torch.equal(ids.cpu(), want_ids)
    assert_close(weights, want / want.sum(-1, keepdim=True) if renormalize else want, torch.float32)


def test_default_choices_of_the_published_models():
    assert [cls(D, 16).top_k for cls in (MixtralGate, Qwen3Gate, GptOssGate)] == [2, 8, 4]


def transformers_router(name, k):
    """The router of that model in transformers, and our gate with the same weights."""
    models = pytest.importorskip("transformers.models")
    if name == "mixtral":
        config = models.mixtral.MixtralConfig(num_local_experts=E, num_experts_per_tok=k)
        module, cls, gate = models.mixtral.modeling_mixtral, "MixtralTopKRouter", MixtralGate
    elif name == "gpt_oss":
        config = models.gpt_oss.GptOssConfig(num_local_experts=E, num_experts_per_tok=k)
        module, cls, gate = models.gpt_oss.modeling_gpt_oss, "GptOssTopKRouter", GptOssGate
    else:
        normalize = name == "qwen3"
        config = models.qwen3_moe.Qwen3MoeConfig(
            num_experts=E, num_experts_per_tok=k, norm_topk_prob=normalize
        )
        module, cls = models.qwen3_moe.modeling_qwen3_moe, "Qwen3MoeTopKRouter"
        gate = partial(Qwen3Gate, renormalize=normalize)
    config.hidden_size = D
    if not hasattr(module, cls):
        pytest.skip(f"this transformers has no {cls}")
    router, gate = getattr(module, cls)(config), gate(D, E, 1, k)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
        gate.gate.weight.copy_(router.weight)
        if gate.gate.bias is not None:
            gate.gate.bias.copy_(router.bias)
    return router, gate


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3", "qwen3_plain"])
def test_equals_transformers(name):
    router, gate = transformers_router(name, 3)
    x = torch.randn(32, D)
    _, want_weights, want_ids = router(x)
    ids, weights = gate(x)
    assert torch.equal(ids, want_ids)
    assert_close(weights, want_weights, torch.float32)


SIGMOID = partial(TopKGate, score="sigmoid", scale=2.5, balance=True)


@pytest.mark.parametrize(
    ("build", "backend", "k"),
    [
        (SIGMOID, "inductor", 2),
        (partial(TopKGate, renormalize=False), "aot_eager", 1),
        (MixtralGate, "aot_eager", 2),
        (Qwen3Gate, "aot_eager", E),
        (partial(GptOssGate, balance=True), "aot_eager", 4),
    ],
    ids=["sigmoid", "plain", "mixtral", "qwen3", "gpt_oss"],
)
def test_compile(build, backend, k, device):
    check_compile(build, device, backend, k)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_export(strict, training, device):
    check_export(SIGMOID, device, strict, training)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_checkpoint(compile_it):
    check_checkpoint(SIGMOID, compile_it)


@each(
    ("build", "error", "match"),
    [
        (lambda: TopKGate(D, 4, 1, 5), ValueError, r"TopKGate: top_k must be at most .* got 5"),
        (lambda: TopKGate(D, 4, score="x"), ValueError, r"TopKGate: score must be .* got 'x'"),
        (lambda: TopKGate(D, 4, scale=0), ValueError, r"TopKGate: scale must be .* got 0"),
        (
            lambda: TopKGate(D, 4, scale=float("nan")),
            ValueError,
            r"TopKGate: scale must be .* got nan",
        ),
        (lambda: TopKGate(D, 4, scale="2"), ValueError, r"TopKGate: scale must be .* got '2'"),
        (lambda: Qwen3Gate(D, 4), ValueError, r"Qwen3Gate: top_k must be at most .* got 8"),
        (lambda: MixtralGate(D, 1), ValueError, r"MixtralGate: top_k must be at most .* got 2"),
        (lambda: GptOssGate(D, 3), ValueError, r"GptOssGate: top_k must be at most .* got 4"),
    ],
)
def test_bad_arguments(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_bad_input():
    with pytest.raises(ValueError, match=r"router_logits: x must have size 8"):
        MixtralGate(D, 4)(torch.randn(3, D + 1))
