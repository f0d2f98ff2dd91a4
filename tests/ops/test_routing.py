from __future__ import annotations

import pytest
import torch

import moeops
from cases import each
from moeops import reference
from samples import assert_matches_reference
from tolerances import assert_close

# T, E, K
SIZES = [
    (13, 4, 2),
    (0, 4, 2),
    (1, 4, 1),
    (7, 4, 4),
    (6, 1, 1),
    (40, 512, 8),
    (9, 64, 64),  # past the insertion sort
    (3001, 6, 2),  # several threads
]
SIZE_IDS = [f"T{T}_E{E}_K{K}" for T, E, K in SIZES]

score_options = each("score", ["softmax", "sigmoid"])
renormalize_options = each("renormalize", [True, False], ids=["renormalized", "as_scored"])


@each(("T", "E", "K"), SIZES, ids=SIZE_IDS)
@each("with_bias", [False, True], ids=["no_bias", "bias"])
@score_options
@renormalize_options
def test_topk_route(T, E, K, with_bias, score, renormalize, values_dtype, device):
    logits = torch.randn(T, E).to(device, values_dtype)
    bias = torch.randn(E, dtype=torch.float64) * 0.3 if with_bias else None
    options = {"score": score, "renormalize": renormalize, "scale": 1.5}
    chosen = {}

    def op(logits):
        on_device = None if bias is None else bias.to(device)
        weights, chosen["op"] = moeops.topk_route(logits, K, bias=on_device, **options)
        return weights

    def truth(logits):
        weights, chosen["truth"] = reference.topk_route(logits, K, bias=bias, **options)
        return weights

    weights = assert_matches_reference(op, truth, {"logits": logits}, values_dtype)
    assert weights.dtype == (torch.float64 if values_dtype == torch.float64 else torch.float32)
    assert chosen["op"].dtype == torch.int64
    assert torch.equal(chosen["op"].cpu(), chosen["truth"])


@each(("num_groups", "top_groups"), [(2, 1), (4, 2), (8, 3), (4, 4)])
@each("with_bias", [False, True], ids=["no_bias", "bias"])
@score_options
def test_expert_groups(num_groups, top_groups, with_bias, score, device):
    T, E, K = 33, 8, 2
    logits = torch.randn(T, E, dtype=torch.float64)
    bias = torch.randn(E, dtype=torch.float64) if with_bias else None
    options = {"score": score, "num_groups": num_groups, "top_groups": top_groups}
    weights, ids = moeops.topk_route(
        logits.to(device), K, bias=None if bias is None else bias.to(device), **options
    )
    want_weights, want_ids = reference.topk_route(logits, K, bias=bias, **options)
    assert torch.equal(ids.cpu(), want_ids)
    assert_close(weights, want_weights, torch.float64)
    groups = ids.cpu() // (E // num_groups)
    assert all(len(set(row)) <= top_groups for row in groups.tolist())


def test_hand_worked_groups(device):
    # Group worths 0.9 + 0.1, 0.5 + 0.45 and 0.4 + 0.3: the first two groups are in, the best lies in the first.
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.45, 0.4, 0.3]], dtype=torch.float64, device=device)
    logits = torch.logit(scores)
    _, ids = moeops.topk_route(logits, 3, score="sigmoid", num_groups=3, top_groups=2)
    assert ids.tolist() == [[0, 2, 3]]
    # The bias steers the choice and leaves the weights alone.
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0], device=device)
    weights, ids = moeops.topk_route(logits, 2, score="sigmoid", renormalize=False, bias=bias)
    assert ids.tolist() == [[4, 0]]
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.4, 0.9]], dtype=torch.float64))


@pytest.mark.parametrize("K", [2, 20])
def test_ties_go_to_the_lower_id(K, device):
    logits = torch.zeros(3, 32, device=device)
    logits[1, 5] = logits[1, 9] = 1.0
    _, ids = moeops.topk_route(logits, K)
    assert ids[0].tolist() == list(range(K))
    assert ids[1, :2].tolist() == [5, 9]
    _, ids = moeops.topk_route(logits, K, score="sigmoid", bias=torch.zeros(32, device=device))
    assert ids[0].tolist() == list(range(K))


def test_close_logits_are_told_apart(device):
    # In float32 the sigmoids of 30 and 31 are both 1, the logits differ.
    logits = torch.tensor([[30.0, 31.0, 32.0]], device=device)
    assert moeops.topk_route(logits, 3, score="sigmoid")[1].tolist() == [[2, 1, 0]]


def test_minus_infinity_in_the_bias_bars_an_expert(device):
    logits = torch.randn(50, 4, device=device)
    bias = torch.tensor([0.0, float("-inf"), 0.0, 0.0], device=device)
    _, ids = moeops.topk_route(logits, 3, bias=bias)
    assert (ids != 1).all()


def test_extreme_logits_give_finite_results(device):
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]], device=device)
    logits.requires_grad_()
    for score in ("softmax", "sigmoid"):
        weights, _ = moeops.topk_route(logits, 2, score=score)
        assert weights.isfinite().all()
        (grad,) = torch.autograd.grad(weights[:, 0].sum(), logits)
        assert grad.isfinite().all()


def test_weights_sum_to_the_scale(device):
    logits = torch.randn(21, 8, dtype=torch.float64, device=device)
    for score in ("softmax", "sigmoid"):
        weights, ids = moeops.topk_route(logits, 3, score=score, scale=2.5)
        torch.testing.assert_close(weights.sum(-1), torch.full_like(logits[:, 0], 2.5))
        assert (weights.diff(dim=-1) <= 0).all()
        assert all(len(set(row)) == 3 for row in ids.tolist())


@score_options
@renormalize_options
@each("K", [1, 3, 5])
def test_gradcheck(score, renormalize, K, device):
    logits = torch.randn(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: moeops.topk_route(z, K, score=score, renormalize=renormalize, scale=0.7)[0],
        (logits,),
    )


def test_strided_and_expanded_inputs(device):
    logits = torch.randn(8, 11, device=device).t()
    weights, ids = moeops.topk_route(logits, 2)
    want, want_ids = moeops.topk_route(logits.contiguous(), 2)
    assert torch.equal(weights, want)
    assert torch.equal(ids, want_ids)
    leaf = logits.detach().requires_grad_()
    weights, _ = moeops.topk_route(leaf, 2, renormalize=False)
    (grad,) = torch.autograd.grad(weights.sum(), leaf, retain_graph=True)
    (want,) = torch.autograd.grad(weights, leaf, torch.ones_like(weights))
    assert torch.equal(grad, want)


def test_public_errors(device):
    logits = torch.randn(5, 6, device=device)
    for arguments, error, text in (
        ({"top_k": 7}, ValueError, r"top_k must be at most the 6 experts .* got 7"),
        ({"top_k": 0}, ValueError, r"top_k must be at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, r"top_k must be an int, got 1\.5 \(float\)"),
        ({"top_k": 2, "score": "tanh"}, ValueError, r"score must be one of .* got 'tanh'"),
        ({"top_k": 2, "num_groups": 4}, ValueError, r"num_groups must divide the 6 .* got 4"),
        ({"top_k": 2, "top_groups": 2}, ValueError, r"top_groups must be at most .* got 2"),
        (
            {"top_k": 4, "num_groups": 2},
            ValueError,
            r"top_k must be at most the 3 experts .* got 4",
        ),
        (
            {"top_k": 2, "bias": torch.ones(5, device=device)},
            ValueError,
            r"bias must have size 6.*\[5\]",
        ),
    ):
        with pytest.raises(error, match=f"topk_route: {text}"):
            moeops.topk_route(logits, **arguments)
    with pytest.raises(
        TypeError, match=r"topk_route: logits must be float64.*got torch.int64 \[5, 6\]"
    ):
        moeops.topk_route(logits.long(), 2)
    with pytest.raises(ValueError, match=r"topk_route: logits must have 2 dimensions.*\[30\]"):
        moeops.topk_route(logits.view(-1), 2)
    with pytest.raises(TypeError, match=r"topk_route: logits must be a tensor, got None"):
        moeops.topk_route(None, 2)


@each("bad", ["nan", "inf", "-inf"])
def test_logits_must_be_finite(bad, dtype):
    logits = torch.randn(9, 5).to(dtype)
    logits[4, 3] = logits[7, 0] = float(bad)
    with pytest.raises(
        RuntimeError, match=rf"topk_route: logits must be finite, got {bad} at \[4, 3\]"
    ):
        moeops.topk_route(logits, 2)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_bias_must_not_be_nan_or_infinite(bad):
    bias = torch.zeros(5)
    bias[2] = float(bad)
    with pytest.raises(RuntimeError, match=rf"topk_route: bias must be .* got {bad} at \[2\]"):
        moeops.topk_route(torch.randn(3, 5), 2, bias=bias)


def test_bare_ops_refuse_bad_arguments():
    logits = torch.randn(5, 6)
    route = torch.ops.moeops.topk_route
    with pytest.raises(RuntimeError, match=r"top_k must be from 1 to the 6 experts .* got 7"):
        route(logits, 7)
    with pytest.raises(RuntimeError, match=r"score must be .* got 'tanh'"):
        route(logits, 2, score="tanh")
    with pytest.raises(RuntimeError, match=r"num_groups must divide the 6 experts, got 0"):
        route(logits, 2, num_groups=0)
    with pytest.raises(RuntimeError, match=r"top_groups must be from 1 to .* got 3"):
        route(logits, 2, num_groups=2, top_groups=3)
    backward = torch.ops.moeops.topk_route_backward
    ids = torch.zeros(5, 2, dtype=torch.int64)
    ids[3, 1] = 6
    with pytest.raises(RuntimeError, match=r"topk_ids must be in \[-1, 6\), got 6 at pair 7"):
        backward(torch.ones(5, 2), logits, ids)


@each("num_experts", [5, 31, 64, 257])
@each("spread", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softmax_is_as_exact_as_torch(num_experts, spread, dtype):
    logits = torch.randn(400, num_experts, dtype=torch.float64).mul(spread).to(dtype)
    weights, ids = torch.ops.moeops.topk_route(logits, num_experts, renormalize=False)
    got = torch.zeros_like(logits).scatter(1, ids, weights)
    exact = torch.softmax(logits.double(), -1)
    normal = exact > torch.finfo(dtype).tiny
    unit = torch.finfo(dtype).eps * exact

    def errors(values):
        return ((values.double() - exact).abs() / unit)[normal]

    if dtype == torch.float64:  # torch's, the truth here, is itself off by 3 to 4 units
        assert errors(got).max() <= 8
    else:
        torchs = errors(torch.softmax(logits, -1))
        assert errors(got).max() <= torchs.max() + 1
        assert errors(got).mean() <= 1.1 * torchs.mean()
    small = got[~normal].double()
    assert (small - exact[~normal]).abs().le(2 * torch.finfo(dtype).smallest_normal).all()
