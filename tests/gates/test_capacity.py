"""apply_capacity and queue_positions: who stays when an expert overflows."""

from __future__ import annotations

import math

import pytest
import torch
from gate_checks import E, check_compile, check_export
from torch._dynamo.testing import CompileCounterWithBackend

from cases import each
from moeops.gates import GShardGate, SwitchGate, apply_capacity, expert_capacity
from moeops.gates.functional import queue_positions
from reference_gates import fastmoe as fast


def pairs(T, K, device="cpu"):
    """Distinct experts per token, a fifth of the slots dropped, and weights with ties."""
    ids = torch.rand(T, E).argsort(-1)[:, :K]
    ids = torch.where(torch.rand(T, K) < 0.2, -1, ids)
    weights = torch.randint(1, 6, (T, K)) / 8
    return ids.to(device), weights.to(device)


@each("policy", ["position", "choice", "priority", "batch"])
@each(("T", "K"), [(0, 2), (1, 1), (17, 1), (17, 2), (40, E)])
def test_policies(policy, T, K, device):
    ids, weights = pairs(T, K, device)
    for ids_type in (torch.int64, torch.int32):
        for capacity in (0, 1, 3, T * K):
            got = apply_capacity(ids.to(ids_type), weights, E, capacity, policy=policy)
            order = fast.queue([ids.cpu()], [weights.cpu()], policy)
            (want,) = fast.keep([ids.cpu()], order, E, capacity)
            assert got.dtype == ids_type
            assert got.is_contiguous()
            assert torch.equal(got.cpu().long(), want)


def test_capacity_as_a_function_of_the_tokens(device):
    ids, weights = pairs(17, 2, device)
    got = apply_capacity(ids, weights, E, lambda tokens: expert_capacity(0.5, tokens, 2, E))
    assert torch.equal(got, apply_capacity(ids, weights, E, 3))  # ceil(0.5 * 17 * 2 / 6)


@pytest.mark.parametrize("policy", ["position", "choice", "priority", "batch"])
def test_masked_tokens_take_no_place(policy, device):
    """Neither with a capacity of the tokens that are there, which only the device knows, nor with a fixed one."""
    ids, weights = pairs(40, 3, device)
    mask = torch.arange(40, device=device) % 3
    there = mask == 0
    for factor, fixed in ((0.3, 2), (0.6, 5), (3.0, 60)):

        def rows(tokens, factor=factor):
            return expert_capacity(factor, tokens, 3, E)

        for capacity in (rows, fixed):
            got = apply_capacity(ids, weights, E, capacity, policy=policy, mask=mask)
            want = apply_capacity(ids[there], weights[there], E, capacity, policy=policy)
            assert got.dtype == ids.dtype
            assert torch.equal(got[there], want)
            assert bool((got[~there] == -1).all())


def test_random_among_the_tokens_that_are_there(device):
    ids, weights = pairs(60, 2, device)
    mask = torch.arange(60, device=device) % 2
    got = apply_capacity(ids, weights, E, lambda t: t // 10, policy="random", mask=mask)
    assert bool((got[mask != 0] == -1).all())
    live = ids[mask == 0].flatten()
    for e in range(E):
        assert int((got == e).sum()) == min(3, int((live == e).sum()))


def test_random_keeps_each_pair_as_often_as_any_other(device):
    ids = torch.zeros(4, 1, dtype=torch.int64, device=device)
    weights = torch.ones(4, 1, device=device)
    count = 4000
    kept = torch.zeros(4, device=device)
    for _ in range(count):
        kept += (apply_capacity(ids, weights, 1, 1, policy="random")[:, 0] == 0).float()
    assert float(kept.sum()) == count
    bound = 5 * math.sqrt(0.25 * 0.75 / count)  # five standard deviations of the mean
    assert float((kept / count - 0.25).abs().max()) < bound


def test_random_is_reproducible(device):
    ids, weights = pairs(64, 2, device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(apply_capacity(ids, weights, E, 5, policy="random"))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    for run in runs:
        assert bool(((run == ids) | (run == -1)).all())
        live = ids[ids >= 0].bincount(minlength=E).clamp(max=5)
        assert torch.equal(run[run >= 0].bincount(minlength=E), live)


@pytest.mark.parametrize("policy", ["position", "choice"])
def test_queue_positions(policy, device):
    ids, _ = pairs(23, 3, device)
    positions, tokens = queue_positions(ids, E, policy=policy)
    assert int(tokens) == 23
    seen = [0] * E
    for _, t, k in fast.queue([ids.cpu()], None, policy):
        e = int(ids[t, k])
        if e < 0:
            assert int(positions[t, k]) == torch.iinfo(torch.int64).max
        else:
            assert int(positions[t, k]) == seen[e]
            seen[e] += 1


def test_compiles_with_dynamic_tokens(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def limit(ids, weights):
        rows = expert_capacity(0.75, ids.shape[0], ids.shape[1], E)
        out = [apply_capacity(ids, weights, E, rows, policy=p) for p in ("choice", "batch")]
        positions, tokens = queue_positions(ids, E, policy="choice")
        return *out, torch.where(positions < expert_capacity(0.75, tokens, 2, E), ids, -1)

    for T in (5, 17, 1, 0):
        ids, weights = pairs(T, 2, device)
        rows = expert_capacity(0.75, T, 2, E)
        want = [apply_capacity(ids, weights, E, rows, policy=p) for p in ("choice", "batch")]
        torch._dynamo.decorators.mark_unbacked(ids, 0)
        torch._dynamo.decorators.mark_unbacked(weights, 0)
        got = limit(ids, weights)
        assert all(torch.equal(a, b) for a, b in zip(got, (*want, want[0]), strict=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda i, w: apply_capacity(i, w, E, 1, policy="x"), r"policy must be one of .* got 'x'"),
        (lambda i, w: apply_capacity(i, w, E, -1), r"capacity must be at least 0, got -1"),
        (
            lambda i, w: apply_capacity(i, w, E, 1, policy="random", group=object()),
            r"policy must be one of \('position', 'choice'\) with a group, got 'random'",
        ),
        (
            lambda i, w: SwitchGate(4, 2, drop_policy="choice"),
            r"SwitchGate: drop_policy must be one of .* got 'choice'",
        ),
        (
            lambda i, w: SwitchGate(4, 2, drop_policy="random", global_capacity=True),
            r"SwitchGate: drop_policy must be .* with global_capacity, got 'random'",
        ),
        (
            lambda i, w: GShardGate(4, 2, drop_policy=None),
            r"GShardGate: drop_policy must be one of .* got None",
        ),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call(*pairs(3, 2))


@each("policy", ["position", "choice", "priority", "batch"])
@each("compat", [False, True], ids=["ours", "fastmoe"])
def test_gshard(policy, compat, device):
    T = 40
    gate = GShardGate(4, 3, 2, capacity=(0.7, 1.1), drop_policy=policy, compat=compat).double()
    gate = gate.to(device)
    x = torch.randn(T, 4, device=device, dtype=torch.float64)
    for training in (True, False):
        gate.train(training)
        torch.manual_seed(4)
        ids, weights = gate(x)
        torch.manual_seed(4)
        noise = torch.rand(T, dtype=torch.float64, device=device).cpu()
        want_ids, want_weights, want_loss = fast.gshard(
            [gate.gate(x).cpu()],
            [noise] if training or compat else None,
            0.7 if training else 1.1,
            policy=policy,
            world_size=2,
            compat=compat,
        )
        assert torch.equal(ids.cpu(), want_ids[0])
        assert int((ids == -1).sum()) > 0 or not training
        torch.testing.assert_close(weights.cpu(), want_weights[0])
        torch.testing.assert_close(gate.get_loss().cpu(), want_loss[0])


@pytest.mark.parametrize("policy", ["position", "priority"])
def test_switch_with_fastmoes_loss(policy, device):
    gate = SwitchGate(
        4, E, switch_eps=0.0, capacity=(0.7, 2.0), drop_policy=policy, compat=True
    ).to(device, torch.float64)
    x = torch.randn(40, 4, device=device, dtype=torch.float64, requires_grad=True)
    ids, weights = gate(x)
    loss = gate.get_loss()
    logits = gate.gate(x).cpu()
    first = fast.best(logits, 1)
    probs = fast.softmax(logits).gather(1, first)
    order = fast.queue([first], [probs], policy)
    (want_ids,) = fast.keep([first], order, E, expert_capacity(0.7, 40, 1, E))
    want = fast.kept_loss(logits, want_ids)
    assert torch.equal(ids.cpu(), want_ids)
    assert int((ids == -1).sum()) > 0
    torch.testing.assert_close(weights.cpu(), probs)
    torch.testing.assert_close(loss.cpu(), want)
    for actual, expected in zip(
        torch.autograd.grad(loss, (x, gate.gate.weight), retain_graph=True),
        torch.autograd.grad(want, (x, gate.gate.weight)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


def test_fastmoes_switch_loss_is_zero_when_none_is_kept():
    gate = SwitchGate(4, E, compat=True)
    gate(torch.randn(0, 4))
    loss = gate.get_loss()
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool(gate.gate.weight.grad.isfinite().all())


def test_switch_random_drops(device):
    gate = SwitchGate(4, 1, switch_eps=0.0, capacity=0.5, drop_policy="random").to(device)
    x = torch.randn(32, 4, device=device)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gate(x)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert all(int((ids == 0).sum()) == 16 for ids in runs)


def batch_gshard(d_model, num_expert, world_size, top_k, gate_bias=True):
    return GShardGate(d_model, num_expert, world_size, top_k, 0.8, drop_policy="batch", compat=True)


def random_switch(d_model, num_expert, world_size, top_k, gate_bias=True):
    return SwitchGate(
        d_model, num_expert, world_size, top_k, 0.1, 0.8, drop_policy="random", compat=True
    )


@pytest.mark.parametrize(("build", "top_k"), [(batch_gshard, 2), (random_switch, 1)])
def test_compile(build, top_k, device):
    check_compile(build, device, "aot_eager", top_k)


def test_export(device):
    check_export(batch_gshard, device, strict=False, training=False)
