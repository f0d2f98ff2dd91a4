from __future__ import annotations

import pytest
import torch

import moeops
from cases import each
from moeops import reference
from samples import SAMPLES, SMALL, Sample, assert_matches_reference
from tolerances import assert_close

bias_options = each("with_bias", [False, True], ids=["no_bias", "bias"])


def problem(sample, dtype, device, with_bias):
    tensors = {
        "rows": sample.tensor(sample.R, sample.D, dtype=dtype, device=device),
        "weight": sample.tensor(sample.E, sample.H, sample.D, dtype=dtype, device=device),
    }
    if with_bias:
        tensors["bias"] = sample.tensor(sample.E, sample.H, dtype=dtype, device=device)
    return tensors


@each("sample", SAMPLES, ids=str)
@bias_options
def test_grouped_linear(sample, with_bias, values_dtype, device):
    offsets = sample.plan(device).expert_offsets
    out = assert_matches_reference(
        lambda rows, weight, bias=None: moeops.grouped_linear(rows, weight, offsets, bias=bias),
        lambda rows, weight, bias=None: reference.grouped_linear(
            rows, weight, offsets.cpu(), bias=bias
        ),
        problem(sample, values_dtype, device, with_bias),
        values_dtype,
    )
    tail = out[int(offsets[-1]) :]
    assert torch.equal(tail, torch.zeros_like(tail))


@each("sample", SAMPLES, ids=str)
def test_weight_grad_and_sum(sample, values_dtype, device):
    offsets = sample.plan(device).expert_offsets
    grad = sample.tensor(sample.R, sample.H, dtype=values_dtype, device=device)
    rows = sample.tensor(sample.R, sample.D, dtype=values_dtype, device=device)
    assert_matches_reference(
        lambda grad, rows: torch.ops.moeops.grouped_linear_weight_grad(grad, rows, offsets),
        lambda grad, rows: reference.grouped_linear_weight_grad(grad, rows, offsets.cpu()),
        {"grad": grad, "rows": rows},
        values_dtype,
    )
    assert_matches_reference(
        lambda rows: torch.ops.moeops.grouped_sum(rows, offsets),
        lambda rows: reference.grouped_sum(rows, offsets.cpu()),
        {"rows": rows},
        values_dtype,
    )


@each("sample", SAMPLES, ids=str)
def test_transposed_weight_grad(sample, values_dtype, device):
    offsets = sample.plan(device).expert_offsets
    grad = sample.tensor(sample.R, sample.H, dtype=values_dtype, device=device)
    rows = sample.tensor(sample.R, sample.D, dtype=values_dtype, device=device)

    def transposed(grad, rows):
        out = torch.ops.moeops.grouped_linear_weight_grad(grad, rows, offsets, transposed=True)
        assert out.transpose(1, 2).is_contiguous()
        return out

    assert_matches_reference(
        transposed,
        lambda grad, rows: reference.grouped_linear_weight_grad(grad, rows, offsets.cpu()),
        {"grad": grad, "rows": rows},
        values_dtype,
    )


def test_transposed_weight_grad_passes_opcheck(device):
    sample = Sample("plain")
    args = (
        sample.tensor(sample.R, sample.H, dtype=torch.float32, device=device).requires_grad_(),
        sample.tensor(sample.R, sample.D, dtype=torch.float32, device=device).requires_grad_(),
        sample.plan(device).expert_offsets,
    )
    results = torch.library.opcheck(
        torch.ops.moeops.grouped_linear_weight_grad.default, args, {"transposed": True}
    )
    assert set(results.values()) == {"SUCCESS"}


@each("shape", [(4, 6, 8), (1, 6, 8), (4, 1, 8), (4, 6, 1)], ids=str)
def test_gradient_has_the_layout_of_the_weight(shape, device):
    E, H, D = shape
    sample = Sample("layout", E=E, H=H, D=D, K=1)
    offsets = sample.plan(device).expert_offsets
    rows = torch.randn(sample.R, D, device=device)
    plain = torch.randn(shape, device=device).requires_grad_()
    stored = plain.detach().transpose(1, 2).contiguous().requires_grad_()  # [E, D, H]
    (want,) = torch.autograd.grad(moeops.grouped_linear(rows, plain, offsets).sum(), plain)
    (grad,) = torch.autograd.grad(
        moeops.grouped_linear(rows, stored.transpose(1, 2), offsets).sum(), stored
    )
    assert want.is_contiguous()
    assert grad.is_contiguous()
    torch.testing.assert_close(grad.transpose(1, 2), want)


@each("sample", SMALL, ids=str)
@bias_options
def test_gradients_of_gradients(sample, with_bias, device):
    offsets = sample.plan(device).expert_offsets
    tensors = problem(sample, torch.float64, device, with_bias)
    inputs = tuple(t.detach().requires_grad_() for t in tensors.values())

    def function(rows, weight, bias=None):
        return moeops.grouped_linear(rows, weight, offsets, bias=bias)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transposed_and_sliced_weights(dtype, device):
    sample = Sample("plain", D=24, H=16)
    offsets = sample.plan(device).expert_offsets
    rows = sample.tensor(sample.R, sample.D, dtype=dtype, device=device)
    weight = sample.tensor(sample.E, sample.H, sample.D, dtype=dtype, device=device)
    want = reference.grouped_linear(rows.cpu().double(), weight.cpu().double(), offsets.cpu())
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([weight, weight], dim=1)[:, : sample.H]
    expanded = weight[:1].expand(sample.E, -1, -1)
    assert_close(moeops.grouped_linear(rows, transposed, offsets), want, dtype)
    assert_close(moeops.grouped_linear(rows, both, offsets), want, dtype)
    assert_close(
        moeops.grouped_linear(rows, expanded, offsets),
        reference.grouped_linear(rows.cpu().double(), expanded.cpu().double(), offsets.cpu()),
        dtype,
    )


def test_expanded_gradient(dtype, device):
    sample = Sample("plain")
    offsets = sample.plan(device).expert_offsets
    tensors = problem(sample, dtype, device, with_bias=True)
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    out = moeops.grouped_linear(leaves[0], leaves[1], offsets, bias=leaves[2])
    want = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    for got, expected in zip(torch.autograd.grad(out.sum(), leaves), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("D", "H"), [(0, 6), (8, 0)])
def test_empty_dimensions(D, H, device):
    offsets = Sample("plain").plan(device).expert_offsets
    rows = torch.randn(26, D, device=device, requires_grad=True)
    weight = torch.randn(4, H, D, device=device, requires_grad=True)
    out = moeops.grouped_linear(rows, weight, offsets)
    assert torch.equal(out, torch.zeros(26, H, device=device))
    out.sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_only_needed_gradients_are_computed(device):
    sample = Sample("plain")
    offsets = sample.plan(device).expert_offsets
    tensors = problem(sample, torch.float64, device, with_bias=True)
    full = [t.detach().requires_grad_() for t in tensors.values()]
    grads = torch.autograd.grad(
        moeops.grouped_linear(full[0], full[1], offsets, bias=full[2]).square().sum(), full
    )
    for i, name in enumerate(tensors):
        args = [t.detach().requires_grad_(j == i) for j, t in enumerate(tensors.values())]
        out = moeops.grouped_linear(args[0], args[1], offsets, bias=args[2])
        (grad,) = torch.autograd.grad(out.square().sum(), args[i])
        torch.testing.assert_close(grad, grads[i], msg=lambda text, name=name: f"{name}: {text}")


def test_long_sums_stay_accurate(device):
    # One running float32 sum of 2^20 rows of 0.1 is off by 4e-2 relative, sums of partial sums are not.
    rows = torch.full((2**20, 1), 0.1, device=device)
    offsets = torch.tensor([0, 2**20], dtype=torch.int32, device=device)
    total = torch.ops.moeops.grouped_sum(rows, offsets).item()
    assert abs(total / (0.1 * 2**20) - 1) < 2e-4


def test_autocast(device):
    sample = Sample("plain")
    offsets = sample.plan(device).expert_offsets
    tensors = problem(sample, torch.float32, device, with_bias=True)
    rows, weight, bias = (t.requires_grad_() for t in tensors.values())
    with torch.autocast(device, dtype=torch.bfloat16):
        out = moeops.grouped_linear(rows, weight, offsets, bias=bias)
    assert out.dtype == torch.bfloat16
    want = moeops.grouped_linear(rows.bfloat16(), weight.bfloat16(), offsets, bias=bias.bfloat16())
    assert torch.equal(out, want)
    out.float().sum().backward()
    assert {t.grad.dtype for t in (rows, weight, bias)} == {torch.float32}


def test_public_errors(device):
    offsets = Sample("plain").plan(device).expert_offsets
    rows, weight = torch.randn(26, 8, device=device), torch.randn(4, 6, 8, device=device)
    linear = moeops.grouped_linear
    with pytest.raises(ValueError, match=r"grouped_linear: weight must have size 8 .*\[4, 6, 7\]"):
        linear(rows, weight[:, :, 1:], offsets)
    with pytest.raises(ValueError, match=r"grouped_linear: weight must have size 4 .*\[3, 6, 8\]"):
        linear(rows, weight[1:], offsets)
    with pytest.raises(
        TypeError, match=r"weight must be torch.float32 like rows, got torch.float64"
    ):
        linear(rows, weight.double(), offsets)
    with pytest.raises(TypeError, match=r"rows must be float64, .* got torch.int32 \[26, 8\]"):
        linear(rows.int(), weight, offsets)
    with pytest.raises(ValueError, match=r"bias must have size 6 in dimension 1 .*\[4, 5\]"):
        linear(rows, weight, offsets, bias=torch.ones(4, 5, device=device))
    with pytest.raises(ValueError, match=r"weight must have 3 dimensions, got .*\[6, 8\]"):
        linear(rows, weight[0], offsets)


def test_bare_ops_refuse_bad_arguments():
    offsets = Sample("plain").plan().expert_offsets
    rows, weight = torch.randn(26, 8), torch.randn(4, 6, 8)
    linear = torch.ops.moeops.grouped_linear
    with pytest.raises(RuntimeError, match=r"expert_offsets must end at .* the 20 rows, got 26"):
        linear(rows[:20], weight, offsets, None)
    with pytest.raises(RuntimeError, match=r"weight must have size 8 in dimension 2.*\[4, 6, 7\]"):
        linear(rows, weight[:, :, 1:], offsets, None)
    with pytest.raises(RuntimeError, match=r"weight must be Float like rows, got Double"):
        linear(rows, weight.double(), offsets, None)
    with pytest.raises(RuntimeError, match=r"bias must have size 6 in dimension 1.*\[4, 7\]"):
        linear(rows, weight, offsets, torch.ones(4, 7))
    with pytest.raises(RuntimeError, match=r"rows must have size 26 in dimension 0.*\[25, 8\]"):
        torch.ops.moeops.grouped_linear_weight_grad(torch.randn(26, 6), rows[1:], offsets)
    with pytest.raises(RuntimeError, match=r"grouped_sum: expert_offsets .* 25 rows, got 26"):
        torch.ops.moeops.grouped_sum(rows[1:], offsets)


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_bias_is_added_before_the_sum_is_rounded(rows, dtype):
    """Rounding the product first would change a third of all values by a rounding, and a sign near zero."""
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, 16), (1, 17, 16), (1, 17)))
    exact = x.double() @ weight[0].double().t() + bias[0].double()
    block = {"b_down": bias, "activation": "relu"}
    plan = moeops.sort_tokens(torch.zeros(rows, 1, dtype=torch.int64), 1)
    eye = torch.eye(16, dtype=dtype)[None]
    positive = x.abs()
    for got, want in (
        (moeops.grouped_linear(x, weight, offsets, bias=bias), exact),
        (
            moeops.moe_mlp(positive, plan, torch.ones(rows, 1), eye, weight, **block),
            positive.double() @ weight[0].double().t() + bias[0].double(),
        ),
    ):
        differs = (got != want.to(dtype)).double().mean()  # float32 sums seldom lie at a half-way
        assert float(differs) < 0.02
