from __future__ import annotations

import pytest
import torch

import moeops
from cases import each, every_pair
from moeops import reference
from samples import SAMPLES, SMALL, Sample, assert_matches_reference

every_size = each("sample, capacity", every_pair(SAMPLES, [0, 4, 40]))


@every_size
def test_pad_rows(sample, capacity, values_dtype, device):
    offsets = sample.plan(device).expert_offsets
    assert_matches_reference(
        lambda rows: moeops.pad_rows(rows, offsets, capacity),
        lambda rows: reference.pad_rows(rows, offsets.cpu(), capacity),
        {"rows": sample.tensor(sample.R, sample.D, dtype=values_dtype, device=device)},
        values_dtype,
    )


@every_size
def test_unpad_rows(sample, capacity, values_dtype, device):
    offsets = sample.plan(device).expert_offsets
    assert_matches_reference(
        lambda padded: moeops.unpad_rows(padded, offsets, sample.R),
        lambda padded: reference.unpad_rows(padded, offsets.cpu(), sample.R),
        {"padded": sample.tensor(sample.E, capacity, sample.D, dtype=values_dtype, device=device)},
        values_dtype,
    )


@each("sample", SMALL, ids=str)
def test_gradients_of_gradients(sample, device):
    offsets = sample.plan(device).expert_offsets
    rows = sample.tensor(sample.R, sample.D, dtype=torch.float64, device=device).requires_grad_()
    padded = sample.tensor(sample.E, 3, sample.D, dtype=torch.float64, device=device)
    padded.requires_grad_()
    for function, inputs in (
        (lambda rows: moeops.pad_rows(rows, offsets, 3), (rows,)),
        (lambda padded: moeops.unpad_rows(padded, offsets, sample.R), (padded,)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@each("sample", SAMPLES, ids=str)
def test_unpad_undoes_pad_where_everything_fits(sample, device):
    plan = sample.plan(device)
    x = sample.tensor(sample.T, sample.D, dtype=torch.float32, device=device)
    rows = moeops.permute_tokens(x, plan)
    capacity = int(plan.expert_offsets.diff().max())
    padded = moeops.pad_rows(rows, plan.expert_offsets, capacity)
    assert torch.equal(moeops.unpad_rows(padded, plan.expert_offsets, sample.R), rows)


def test_errors(device):
    offsets = Sample("plain").plan(device).expert_offsets
    rows = torch.randn(26, 8, device=device)
    with pytest.raises(ValueError, match=r"pad_rows: capacity must be at least 0, got -1"):
        moeops.pad_rows(rows, offsets, -1)
    with pytest.raises(TypeError, match=r"pad_rows: capacity must be an int, got 2.5"):
        moeops.pad_rows(rows, offsets, 2.5)
    with pytest.raises(TypeError, match=r"expert_offsets must be int32, got torch.int64 \[5\]"):
        moeops.pad_rows(rows, offsets.long(), 2)
    with pytest.raises(ValueError, match=r"expert_offsets must have E \+ 1 >= 2.*\[1\]"):
        moeops.pad_rows(rows, offsets[:1], 2)
    padded = torch.randn(3, 2, 8, device=device)
    with pytest.raises(ValueError, match=r"unpad_rows: padded must have size 4 .*\[3, 2, 8\]"):
        moeops.unpad_rows(padded, offsets, 26)
    with pytest.raises(ValueError, match=r"unpad_rows: num_rows must be at least 0, got -2"):
        moeops.unpad_rows(torch.randn(4, 2, 8, device=device), offsets, -2)


def test_bare_ops_refuse_bad_offsets():
    offsets = Sample("plain").plan().expert_offsets
    with pytest.raises(RuntimeError, match=r"pad_rows: expert_offsets .* the 25 rows, got 26"):
        torch.ops.moeops.pad_rows(torch.randn(25, 8), offsets, 2)
    with pytest.raises(RuntimeError, match=r"unpad_rows: expert_offsets .* the 7 rows, got 26"):
        torch.ops.moeops.unpad_rows(torch.randn(4, 9, 8), offsets, 7)
    with pytest.raises(RuntimeError, match=r"pad_rows: capacity must be at least 0, got -3"):
        torch.ops.moeops.pad_rows(torch.randn(26, 8), offsets, -3)
