from __future__ import annotations

import pytest
import torch

import moeops
from cases import each
from moeops import TokenPlan, reference
from samples import SAMPLES, SMALL, Sample, assert_matches_reference

BESIDE_DEAD_PAIRS = [
    s for s in SAMPLES if s.name in ("dropped", "few_rows", "more_rows", "expert_choice")
]


@each("sample", SAMPLES, ids=str)
def test_permute_tokens(sample, values_dtype, device):
    plan = sample.plan(device)
    cpu_plan = TokenPlan(*(t.cpu() for t in plan))
    rows = assert_matches_reference(
        lambda x: moeops.permute_tokens(x, plan),
        lambda x: reference.permute_tokens(x, cpu_plan),
        {"x": sample.tensor(sample.T, sample.D, dtype=values_dtype, device=device)},
        values_dtype,
    )
    tail = rows[int(plan.expert_offsets[-1]) :]
    assert torch.equal(tail, torch.zeros_like(tail))


@each("sample", SAMPLES, ids=str)
@each("weighted", [True, False], ids=["weighted", "plain_sum"])
def test_unpermute_tokens(sample, weighted, values_dtype, device):
    plan = sample.plan(device)
    cpu_plan = TokenPlan(*(t.cpu() for t in plan))
    tensors = {"rows": sample.tensor(sample.R, sample.D, dtype=values_dtype, device=device)}
    if weighted:
        tensors["topk_weights"] = sample.weights(values_dtype, device)
    assert_matches_reference(
        lambda rows, topk_weights=None: moeops.unpermute_tokens(rows, plan, topk_weights),
        lambda rows, topk_weights=None: reference.unpermute_tokens(rows, cpu_plan, topk_weights),
        tensors,
        values_dtype,
    )


@each("sample", SMALL, ids=str)
def test_gradients_of_gradients(sample, device):
    plan = sample.plan(device)
    x = sample.tensor(sample.T, sample.D, dtype=torch.float64, device=device).requires_grad_()
    rows = sample.tensor(sample.R, sample.D, dtype=torch.float64, device=device).requires_grad_()
    weights = sample.weights(torch.float64, device).requires_grad_()
    for function, inputs in (
        (lambda x: moeops.permute_tokens(x, plan), (x,)),
        (lambda rows: moeops.unpermute_tokens(rows, plan), (rows,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradcheck(
        lambda rows, weights: moeops.unpermute_tokens(rows, plan, weights), (rows, weights)
    )


def test_hand_worked(device):
    plan = moeops.sort_tokens(torch.tensor([[1, 0], [0, -1]], device=device), 2)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    rows = moeops.permute_tokens(x, plan)
    assert rows.tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]
    weights = torch.tensor([[0.5, 0.25], [2.0, 100.0]], device=device)
    y = moeops.unpermute_tokens(rows, plan, weights)
    assert y.tolist() == [[0.75, 1.5], [6.0, 8.0]]


@each("sample", [s for s in SAMPLES if s.dropped == 0], ids=str)
def test_unpermute_undoes_permute(sample, device):
    plan = sample.plan(device)
    x = sample.tensor(sample.T, sample.D, dtype=torch.float64, device=device)
    weights = sample.weights(torch.float64, device)
    weights = weights / weights.sum(-1, keepdim=True)
    y = moeops.unpermute_tokens(moeops.permute_tokens(x, plan), plan, weights)
    torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)


@each("sample", BESIDE_DEAD_PAIRS, ids=str)
def test_nan_in_dropped_rows_is_not_read(sample, device):
    plan = sample.plan(device)
    live = int(plan.expert_offsets[-1])
    assert 0 < live < sample.R
    rows = sample.tensor(sample.R, sample.D, dtype=torch.float32, device=device)
    weights = sample.weights(torch.float32, device)
    weights[plan.pair_to_row >= live] = float("nan")
    poisoned = rows.clone()
    poisoned[live:] = float("nan")
    poisoned.requires_grad_()
    weights.requires_grad_()
    y = moeops.unpermute_tokens(poisoned, plan, weights)
    clean = moeops.unpermute_tokens(rows, plan, weights.detach().nan_to_num())
    torch.testing.assert_close(y, clean, rtol=0, atol=0)
    y.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert torch.equal(poisoned.grad[live:], torch.zeros_like(rows[live:]))
    assert torch.equal(
        weights.grad[plan.pair_to_row >= live], torch.zeros(sample.N - live, device=device)
    )


@each("sample", SMALL, ids=str)
def test_expanded_gradient(sample, device):
    plan = sample.plan(device)
    rows = sample.tensor(sample.R, sample.D, dtype=torch.float32, device=device).requires_grad_()
    weights = sample.weights(torch.float32, device).requires_grad_()
    y = moeops.unpermute_tokens(rows, plan, weights)
    expected = torch.autograd.grad(y, (rows, weights), torch.ones_like(y), retain_graph=True)
    for got, want in zip(torch.autograd.grad(y.sum(), (rows, weights)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@each("weighted", [True, False], ids=["weighted", "plain_sum"])
def test_rows_without_tokens(weighted, dtype, device):
    plan = moeops.sort_tokens(torch.zeros(0, 2, dtype=torch.int64, device=device), 3, 5)
    rows = moeops.permute_tokens(torch.empty(0, 8, dtype=dtype, device=device), plan)
    assert torch.equal(rows, torch.zeros(5, 8, dtype=dtype, device=device))
    rows = torch.full_like(rows, float("nan")).requires_grad_()
    weights = torch.ones(0, 2, device=device) if weighted else None
    y = moeops.unpermute_tokens(rows, plan, weights)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert torch.equal(rows.grad, torch.zeros(5, 8, dtype=dtype, device=device))


def test_dead_rows_may_hold_anything(device):
    # Only the live rows' pairs are read: a plan of one's own may leave the others as they are.
    sample = next(s for s in SAMPLES if s.name == "more_rows")
    plan = sample.plan(device)
    live = int(plan.expert_offsets[-1])
    own = plan._replace(row_to_pair=plan.row_to_pair.clone())
    own.row_to_pair[live:] = -5
    x = torch.randn(sample.T, sample.D, device=device)
    rows = moeops.permute_tokens(x, own)
    assert torch.equal(rows, moeops.permute_tokens(x, plan))
    weights = sample.weights(torch.float32, device)
    for got, want in zip(
        torch.ops.moeops.unpermute_tokens_backward(x, rows, *own, weights),
        torch.ops.moeops.unpermute_tokens_backward(x, rows, *plan, weights),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_no_columns(device):
    plan = Sample("plain").plan(device)
    x = torch.empty(13, 0, device=device)
    rows = moeops.permute_tokens(x, plan)
    assert rows.shape == (26, 0)
    assert moeops.unpermute_tokens(rows, plan, torch.ones(13, 2, device=device)).shape == (13, 0)


def test_public_errors(device):
    plan = Sample("plain").plan(device)
    x = torch.randn(13, 8, device=device)
    with pytest.raises(ValueError, match=r"permute_tokens: x must have 2 dimensions, got .*\[13\]"):
        moeops.permute_tokens(x[:, 0], plan)
    with pytest.raises(TypeError, match=r"permute_tokens: x must be float64.*got torch.int64"):
        moeops.permute_tokens(x.long(), plan)
    with pytest.raises(ValueError, match=r"permute_tokens: x must have size 13 in dim.*\[12, 8\]"):
        moeops.permute_tokens(x[1:], plan)
    with pytest.raises(TypeError, match=r"permute_tokens: plan must be a moeops.TokenPlan, got 3"):
        moeops.permute_tokens(x, 3)
    with pytest.raises(TypeError, match=r"row_to_pair must be int32, got torch.int64 \[26\]"):
        moeops.permute_tokens(x, plan._replace(row_to_pair=plan.row_to_pair.long()))
    rows = torch.randn(26, 8, device=device)
    with pytest.raises(ValueError, match=r"unpermute_tokens: rows must have size 26.*\[25, 8\]"):
        moeops.unpermute_tokens(rows[1:], plan)
    with pytest.raises(ValueError, match=r"topk_weights must have size 2 in dim.*\[13, 3\]"):
        moeops.unpermute_tokens(rows, plan, torch.ones(13, 3, device=device))
    with pytest.raises(TypeError, match=r"topk_weights must be float64.*got torch.int64"):
        moeops.unpermute_tokens(rows, plan, torch.ones(13, 2, dtype=torch.int64, device=device))


def test_bare_ops_refuse_bad_maps():
    row_to_pair, pair_to_row, offsets = Sample("plain").plan()
    x = torch.randn(13, 8)
    permute = torch.ops.moeops.permute_tokens

    def changed(tensor, index, value):
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    with pytest.raises(RuntimeError, match=r"row_to_pair must be in \[0, 26\), got 26 at \[3\]"):
        permute(x, changed(row_to_pair, 3, 26), pair_to_row, offsets)
    with pytest.raises(RuntimeError, match=r"row_to_pair must be in \[0, 26\), got -1 at \[0\]"):
        permute(x, changed(row_to_pair, 0, -1), pair_to_row, offsets)
    pair = int(row_to_pair[5])
    with pytest.raises(RuntimeError, match=rf"inverse of row_to_pair, got row 99 for pair {pair} "):
        permute(x, row_to_pair, changed(pair_to_row, pair, 99), offsets)
    first, second = row_to_pair[0], row_to_pair[1]
    with pytest.raises(RuntimeError, match=rf"inverse of row_to_pair, got row 1 for pair {first} "):
        permute(x, row_to_pair, changed(pair_to_row, first, 1), offsets)
    fewer = changed(offsets, 4, 25)  # the last pair counts no more, but claims the first row
    last = int(row_to_pair[25])
    with pytest.raises(
        RuntimeError,
        match=rf"name the row that holds the pair, or none below 25 .* got row 0 for pair {last}",
    ):
        permute(x, row_to_pair, changed(pair_to_row, last, 0), fewer)
    with pytest.raises(RuntimeError, match=rf"name the row .* got row -1 for pair {last}"):
        permute(x, row_to_pair, changed(pair_to_row, last, -1), fewer)
    with pytest.raises(RuntimeError, match=rf"inverse of row_to_pair.* for pair {second} of row 0"):
        permute(x, changed(row_to_pair, 0, second), pair_to_row, offsets)
    with pytest.raises(RuntimeError, match=r"expert_offsets must start with 0, got 1 at \[0\]"):
        permute(x, row_to_pair, pair_to_row, changed(offsets, 0, 1))
    with pytest.raises(
        RuntimeError, match=r"expert_offsets must not fall, got -5 at \[1\] after 0"
    ):
        permute(x, row_to_pair, pair_to_row, changed(offsets, 1, -5))
    with pytest.raises(RuntimeError, match=r"end at or below the 26 rows, got 27 at \[4\]"):
        permute(x, row_to_pair, pair_to_row, changed(offsets, 4, 27))
    with pytest.raises(RuntimeError, match=r"permute_tokens: x must have size 13 .*\[12, 8\]"):
        permute(x[1:], row_to_pair, pair_to_row, offsets)
    with pytest.raises(RuntimeError, match=r"permute_tokens: x must be float64.*got Long"):
        permute(x.long(), row_to_pair, pair_to_row, offsets)
    with pytest.raises(RuntimeError, match=r"topk_weights must be float32.*got Double"):
        torch.ops.moeops.unpermute_tokens(
            torch.randn(26, 8),
            row_to_pair,
            pair_to_row,
            offsets,
            torch.ones(13, 2, dtype=torch.float64),
        )
