from __future__ import annotations

import math

import pytest
import torch

import moeops
from cases import each
from moeops import reference
from samples import assert_matches_reference
from tolerances import assert_close

# T, E: none, one row, every count of registers per lane, ragged last registers, several blocks and threads.
SIZES = [(13, 4), (0, 4), (1, 1), (7, 33), (40, 128), (21, 200), (9, 512), (5, 2048), (6001, 6)]
SIZE_IDS = [f"T{T}_E{E}" for T, E in SIZES]

scores = pytest.mark.parametrize("score", ["softmax", "sigmoid"])


@each(("T", "E"), SIZES, ids=SIZE_IDS)
@scores
def test_score_sums(T, E, score, values_dtype, device):
    logits = (2 * torch.randn(T, E)).to(device, values_dtype)
    sums = assert_matches_reference(
        lambda logits: moeops.score_sums(logits, score=score),
        lambda logits: reference.score_sums(logits, score=score),
        {"logits": logits},
        values_dtype,
    )
    assert sums.dtype == (torch.float64 if values_dtype == torch.float64 else torch.float32)
    assert sums.shape == (E,)
    assert_close(sums.sum(), torch.tensor(float(T), dtype=torch.float64), torch.float32)


@scores
def test_gradcheck(score, device):
    logits = torch.randn(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: moeops.score_sums(z, score=score), (logits,))


@scores
def test_gradient_is_taken_once(score):
    logits = torch.randn(3, 4, requires_grad=True)
    sums = moeops.score_sums(logits, score=score)
    (grad,) = torch.autograd.grad(sums.square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="score_sums_backward: a gradient must be"):
        grad.sum().backward()


def test_hand_worked(device):
    third = math.log(1 / 3)
    logits = torch.tensor([[0.0, third], [0.0, 0.0]], device=device)
    # Softmax: 3/4 and 1/4. Sigmoids 1/2 and 1/4: 2/3 and 1/3.
    for score, want in (("softmax", [1.25, 0.75]), ("sigmoid", [2 / 3 + 0.5, 1 / 3 + 0.5])):
        sums = moeops.score_sums(logits, score=score)
        torch.testing.assert_close(sums.cpu(), torch.tensor(want))


@each("value", [-1e4, -3e38, 0.0, 1e4, 3e38])
@scores
def test_extreme_logits_share_alike(value, score, device):
    """Sigmoids that all round to 0, or all to 1, have equal shares."""
    logits = torch.full((3, 4), value, device=device, requires_grad=True)
    sums = moeops.score_sums(logits, score=score)
    assert sums.tolist() == [0.75] * 4
    (grad,) = torch.autograd.grad(sums[0], logits)
    assert grad.isfinite().all()


@scores
def test_minus_infinity_is_an_expert_that_nobody_wants(score, device):
    logits = torch.tensor([[0.0, float("-inf"), 0.0]], device=device, requires_grad=True)
    sums = moeops.score_sums(logits, score=score)
    torch.testing.assert_close(sums.detach().cpu(), torch.tensor([0.5, 0.0, 0.5]))
    (grad,) = torch.autograd.grad(sums[0], logits)
    assert grad.isfinite().all()
    assert abs(float(grad[0, 1])) < 1e-30


@scores
def test_nan_is_not_hidden(score, device):
    logits = torch.zeros(40, 5, device=device)
    logits[3, 2] = float("nan")
    assert moeops.score_sums(logits, score=score).isnan().all()


@scores
def test_same_bits_every_time(score, device):
    logits = torch.randn(4099, 37, device=device)
    first = moeops.score_sums(logits, score=score)
    assert all(torch.equal(first, moeops.score_sums(logits, score=score)) for _ in range(5))


def test_long_sums_keep_their_digits(device):
    logits = torch.zeros(300_000, 3, device=device)
    sums = moeops.score_sums(logits)
    torch.testing.assert_close(sums.cpu(), torch.full((3,), 1e5), rtol=5e-6, atol=0)


def test_strided_input(device):
    logits = torch.randn(8, 11, device=device).t()
    assert torch.equal(moeops.score_sums(logits), moeops.score_sums(logits.contiguous()))


def test_public_errors(device):
    logits = torch.randn(5, 6, device=device)
    with pytest.raises(ValueError, match=r"score_sums: score must be one of .* got 'tanh'"):
        moeops.score_sums(logits, score="tanh")
    with pytest.raises(ValueError, match=r"score_sums: logits must have 2 dimensions.*\[30\]"):
        moeops.score_sums(logits.view(-1))
    with pytest.raises(TypeError, match=r"score_sums: logits must be float64.*got torch.int64"):
        moeops.score_sums(logits.long())


def test_bare_ops_refuse_bad_arguments(device):
    logits = torch.randn(5, 6, device=device)
    with pytest.raises(RuntimeError, match=r"score must be .* got 'tanh'"):
        torch.ops.moeops.score_sums(logits, score="tanh")
    backward = torch.ops.moeops.score_sums_backward
    with pytest.raises(RuntimeError, match=r"grad_sums must have size 6"):
        backward(torch.ones(5, device=device), logits)
    with pytest.raises(RuntimeError, match=r"grad_sums must be float32"):
        backward(torch.ones(6, dtype=torch.float64, device=device), logits)


@each(
    ("T", "E", "K", "size"),
    [(13, 12, 2, 4), (0, 4, 2, 2), (7, 33, 5, 11), (5, 128, 8, 32), (3, 512, 1, 64), (9, 6, 6, 6)],
)
def test_alignment_sum(T, E, K, size, values_dtype, device):
    logits = (2 * torch.randn(T, E)).to(device, values_dtype)
    groups = torch.randint(E // size, (T, 1))
    ids = groups * size + torch.rand(T, size).argsort(-1)[:, :K]
    ids = torch.where(torch.rand(T, 1) < 0.2, -1, ids)
    assert_matches_reference(
        lambda logits: moeops.alignment_sum(logits, ids.to(device), size),
        lambda logits: reference.alignment_sum(logits, ids, size),
        {"logits": logits},
        values_dtype,
    )


def test_alignment_sum_gradcheck(device):
    logits = torch.randn(7, 6, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.randint(3, (7, 2), device=device)
    assert torch.autograd.gradcheck(lambda z: moeops.alignment_sum(z, ids, 3), (logits,))


def test_alignment_sum_errors(device):
    logits = torch.randn(5, 6, device=device)
    ids = torch.zeros(5, 2, dtype=torch.int64, device=device)
    with pytest.raises(
        ValueError, match=r"alignment_sum: experts_per_group must be at least 1, got 0"
    ):
        moeops.alignment_sum(logits, ids, 0)
    with pytest.raises(ValueError, match=r"alignment_sum: topk_ids must have size 5.*\[4, 2\]"):
        moeops.alignment_sum(logits, ids[:4], 3)
    bad = ids.cpu().clone()
    bad[2, 1] = 6
    with pytest.raises(
        RuntimeError, match=r"alignment_sum: topk_ids must be in \[-1, 6\).* token 2"
    ):
        moeops.alignment_sum(logits.cpu(), bad, 3)
