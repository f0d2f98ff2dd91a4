"""Routes with their balance loss: what they choose, weigh and add up, and the gradients of all of it."""

from __future__ import annotations

import math

import pytest
import torch

import moeops
from cases import each
from moeops import reference
from samples import accumulate_dtype
from tolerances import TOLERANCES, assert_close

# T, E, K: none, one row, every count of registers per lane, ragged registers, several blocks and threads.
SIZES = [
    (13, 4, 2),
    (0, 4, 2),
    (1, 1, 1),
    (7, 33, 5),
    (40, 128, 8),
    (21, 200, 3),
    (9, 512, 40),
    (5, 2048, 2),
    (6001, 6, 2),
]
SIZE_IDS = [f"T{T}_E{E}_K{K}" for T, E, K in SIZES]
scores = each("score", ["softmax", "sigmoid"])


def check(logits, K, **options):
    """Every output and the gradient of their weighted sum, against the reference in float64."""
    exact = {n: v.cpu().double() if torch.is_tensor(v) else v for n, v in options.items()}
    leaf, z = logits.clone().requires_grad_(), logits.cpu().double().requires_grad_()
    got = moeops.topk_route_balance(leaf, K, **options)
    want = reference.topk_route_balance(z, K, **exact)
    acc = accumulate_dtype(logits.dtype)
    assert torch.equal(got.topk_ids.cpu(), want.topk_ids)
    assert torch.equal(got.tokens_per_expert.cpu(), want.tokens_per_expert)
    total, exact_total = 0.0, 0.0
    for name in ("topk_weights", "score_sums", "balance_loss"):
        mine, truth = getattr(got, name), getattr(want, name)
        assert mine.dtype == acc
        assert_close(mine, truth, logits.dtype, name)
        direction = torch.randn(truth.shape, dtype=torch.float64)
        total = total + (mine * direction.to(mine)).sum()
        exact_total = exact_total + (truth * direction).sum()
    total.backward()
    exact_total.backward()
    assert leaf.grad.dtype == logits.dtype
    # Its terms are as large as the directions and may cancel.
    if z.numel():
        error = float((leaf.grad.cpu().double() - z.grad).abs().max())
        assert error <= TOLERANCES[logits.dtype] * max(0.1, float(z.grad.abs().max()))
    return got


@each(("T", "E", "K"), SIZES, ids=SIZE_IDS)
@each("renormalize", [True, False], ids=["renormalized", "as_scored"])
@scores
def test_outputs_and_gradients(T, E, K, score, renormalize, values_dtype, device):
    logits = (2 * torch.randn(T, E)).to(device, values_dtype)
    route = check(logits, K, score=score, renormalize=renormalize, scale=1.5, num_counted=1)
    assert int(route.tokens_per_expert.sum()) == T


@each("num_groups", [2, 4, 3, 12])
@each("group_score", ["top2", "sum"])
@each("with_bias", [False, True], ids=["no_bias", "bias"])
@scores
def test_groups(num_groups, group_score, with_bias, score, device):
    logits = torch.randn(33, 12, dtype=torch.float64, device=device)
    bias = torch.randn(12, dtype=torch.float64, device=device) if with_bias else None
    options = {"num_groups": num_groups, "top_groups": 2, "group_score": group_score}
    check(logits, 2, score=score, bias=bias, **options)


@pytest.mark.parametrize("experts_per_group", [16, 24, 64])
def test_wide_groups_by_sum(experts_per_group, device):
    logits = torch.randn(50, 192, dtype=torch.float64, device=device)
    groups = 192 // experts_per_group
    route = check(logits, 4, num_groups=groups, top_groups=1, group_score="sum", renormalize=False)
    sums = torch.softmax(logits, -1).view(50, groups, experts_per_group).sum(-1)
    assert torch.equal(
        route.topk_ids // experts_per_group, sums.argmax(-1, keepdim=True).expand(50, 4)
    )


@each("options", [{"top_p": 0.5}, {"min_score": 0.1}, {"top_p": 0.9, "min_score": 0.02}])
@each("renormalize", [True, False], ids=["renormalized", "as_scored"])
@each("K", [1, 4, 40])
@scores
def test_fewer_experts(options, renormalize, K, score, device):
    logits = 2 * torch.randn(60, 40, dtype=torch.float64, device=device)
    route = check(logits, K, score=score, renormalize=renormalize, **options)
    live = route.topk_ids >= 0
    assert bool(live[:, 0].all())
    assert torch.equal(live, route.topk_weights > 0)
    assert int(route.tokens_per_expert.sum()) == int(live.sum())
    if K > 1 and score == "softmax":
        assert int((~live).sum()) > 0


def test_mass_and_least_score_by_hand(device):
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64, device=device)
    for options, count in (
        ({"top_p": 0.4}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.85}, 3),
        ({"min_score": 0.1}, 3),
        ({"min_score": 0.6}, 1),
        ({"top_p": 0.85, "min_score": 0.2}, 2),
        ({}, 4),
    ):
        route = moeops.topk_route_balance(probs.log(), 4, renormalize=False, **options)
        assert route.topk_ids.tolist() == [[k if k < count else -1 for k in range(4)]]
        want = torch.where(torch.arange(4) < count, probs.cpu(), 0)
        assert_close(route.topk_weights, want, torch.float64)


@each(("E", "K"), [(6, 1), (6, 2), (6, 6), (70, 3), (300, 2)])
@each("renormalize", [True, False], ids=["renormalized", "as_scored"])
def test_sampled_last_choice(E, K, renormalize, device):
    T = 200
    logits = 2 * torch.randn(T, E, dtype=torch.float64, device=device)
    uniform = torch.rand(T, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 1e-16])
    check(logits, K, uniform=uniform.to(device), renormalize=renormalize)


def test_samples_follow_the_softmax_of_what_is_left(device):
    """Pearson's statistic of T draws over 4 cells is below 30 but for one in a million times."""
    T = 200_000
    logits = torch.tensor([2.0, 0.5, 1.0, 0.0, -1.0], device=device)
    uniform = torch.rand(T, generator=torch.Generator().manual_seed(1)).to(device)
    route = moeops.topk_route_balance(logits.expand(T, 5), 2, uniform=uniform)
    assert bool((route.topk_ids[:, 0] == 0).all())
    want = T * torch.softmax(logits[1:].double().cpu(), -1)
    got = torch.bincount(route.topk_ids[:, 1].cpu(), minlength=5)[1:]
    assert float(((got - want).square() / want).sum()) < 30


def test_sampling_far_below_the_best(device):
    logits = torch.tensor([[500.0, -400.0, -401.0]], device=device).expand(1000, 3)
    uniform = torch.linspace(0, 0.999, 1000, device=device)
    route = moeops.topk_route_balance(logits, 2, uniform=uniform, renormalize=False)
    first = int((route.topk_ids[:, 1] == 1).sum())
    assert abs(first - 731) <= 1  # 1 / (1 + exp(-1))
    assert bool(route.topk_weights.isfinite().all())


def test_is_the_three_ops_it_replaces(device):
    logits = torch.randn(300, 24, device=device)
    route = moeops.topk_route_balance(logits, 3, num_counted=2)
    weights, ids = moeops.topk_route(logits, 3)
    assert torch.equal(route.topk_ids, ids)
    assert_close(route.topk_weights, weights.double(), torch.float32)
    assert torch.equal(route.tokens_per_expert, moeops.count_tokens(ids[:, :2], 24))
    assert_close(route.score_sums, moeops.score_sums(logits).double(), torch.float32)


@each("renormalize", [True, False], ids=["renormalized", "as_scored"])
@scores
def test_temperature(score, renormalize, device):
    logits = 2 * torch.randn(40, 12, dtype=torch.float64, device=device)
    temperature = torch.tensor(1.7, dtype=torch.float64, device=device)
    route = check(logits, 3, score=score, renormalize=renormalize, temperature=temperature)
    same = moeops.topk_route_balance(logits / 1.7, 3, score=score, renormalize=renormalize)
    assert_close(route.topk_weights, same.topk_weights, torch.float64)
    bfloat = moeops.topk_route_balance(logits.bfloat16(), 3, temperature=temperature.float())
    assert bfloat.topk_weights.dtype == torch.float32


@each("output", ["topk_weights", "score_sums", "balance_loss"])
@scores
def test_gradient_of_one_output_alone(output, score, device):
    logits = torch.randn(9, 7, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: getattr(moeops.topk_route_balance(z, 3, score=score, scale=0.7), output),
        (logits,),
    )


def test_gradcheck_with_everything(device):
    logits = torch.randn(9, 7, dtype=torch.float64, device=device, requires_grad=True)
    uniform = torch.rand(9, dtype=torch.float64, device=device)
    for options in ({"top_p": 0.6, "num_counted": 2}, {"uniform": uniform, "renormalize": False}):
        assert torch.autograd.gradcheck(
            lambda z, o=options: moeops.topk_route_balance(z, 3, **o)[:3], (logits,)
        )


def test_same_bits_every_time(device):
    logits = torch.randn(4099, 37, device=device)
    first = moeops.topk_route_balance(logits, 3)
    for _ in range(5):
        assert all(
            torch.equal(a, b)
            for a, b in zip(first, moeops.topk_route_balance(logits, 3), strict=True)
        )


def test_balance_is_one_at_balance(device):
    logits = (8 * torch.eye(6, device=device)).repeat(50, 1)
    route = moeops.topk_route_balance(logits, 1)
    assert float(route.balance_loss) == pytest.approx(1, abs=1e-6)
    route = moeops.topk_route_balance(torch.tensor([[40.0, 0.0, 0.0]], device=device), 1)
    assert float(route.balance_loss) == pytest.approx(3)


def test_long_sums_keep_their_digits(device):
    route = moeops.topk_route_balance(torch.zeros(300_000, 3, device=device), 1)
    torch.testing.assert_close(route.score_sums.cpu(), torch.full((3,), 1e5), rtol=5e-6, atol=0)
    assert route.tokens_per_expert.tolist() == [300_000, 0, 0]


def test_strided_input(device):
    logits = torch.randn(8, 11, device=device).t()
    for a, b in zip(
        moeops.topk_route_balance(logits, 2),
        moeops.topk_route_balance(logits.contiguous(), 2),
        strict=True,
    ):
        assert torch.equal(a, b)


PROTOTYPES = [
    (13, 4, 2),
    (0, 4, 2),
    (1, 1, 1),
    (40, 128, 8),
    (21, 200, 5),
    (9, 512, 512),
    (5, 2048, 1),
]
PROTOTYPES += [(7, 33, 11), (6, 192, 2), (6001, 6, 3)]


def check_route(got, want, leaf, z):
    """As ``check``, of outputs that are there already."""
    assert torch.equal(got.topk_ids.cpu(), want.topk_ids)
    assert torch.equal(got.tokens_per_expert.cpu(), want.tokens_per_expert)
    total, exact_total = 0.0, 0.0
    for name in ("topk_weights", "score_sums", "balance_loss"):
        mine, truth = getattr(got, name), getattr(want, name)
        assert mine.dtype == accumulate_dtype(leaf.dtype)
        assert_close(mine, truth, leaf.dtype, name)
        direction = torch.randn(truth.shape, dtype=torch.float64)
        total = total + (mine * direction.to(mine)).sum()
        exact_total = exact_total + (truth * direction).sum()
    total.backward()
    exact_total.backward()
    if z.numel():
        error = float((leaf.grad.cpu().double() - z.grad).abs().max())
        assert error <= TOLERANCES[leaf.dtype] * max(0.1, float(z.grad.abs().max()))
    return got


@each(("T", "E", "K"), PROTOTYPES, ids=lambda n: str(n))
def test_prototype_route(T, E, K, values_dtype, device):
    logits = (2 * torch.randn(T, E)).to(device, values_dtype)
    leaf, z = logits.clone().requires_grad_(), logits.cpu().double().requires_grad_()
    got, want = moeops.prototype_route(leaf, K), reference.prototype_route(z, K)
    check_route(got, want, leaf, z)
    assert_close(got.score_sums.sum(), torch.tensor(float(T * K)).double(), torch.float32)


@each(("T", "E"), [(13, 4), (0, 4), (40, 128), (9, 512), (5, 2048), (6001, 6)])
def test_relu_route(T, E, values_dtype, device):
    logits = torch.randn(T, E).to(device, values_dtype)
    leaf, z = logits.clone().requires_grad_(), logits.cpu().double().requires_grad_()
    check_route(moeops.relu_route(leaf), reference.relu_route(z), leaf, z)


def test_prototype_ties_go_to_the_lower_id(device):
    route = moeops.prototype_route(torch.zeros(3, 70, device=device), 2)
    assert route.topk_ids.tolist() == [[0, 35]] * 3


@pytest.mark.parametrize("output", ["topk_weights", "score_sums", "balance_loss"])
def test_gradcheck_of_other_routes(output, device):
    logits = torch.randn(9, 6, dtype=torch.float64, device=device, requires_grad=True)
    for route in (lambda z: moeops.prototype_route(z, 2), moeops.relu_route):
        assert torch.autograd.gradcheck(lambda z, r=route: getattr(r(z), output), (logits,))


@each("renormalize", [True, False], ids=["renormalized", "as_scored"])
@each(("T", "E", "K"), SIZES, ids=SIZE_IDS)
@scores
def test_chosen_weights(T, E, K, score, renormalize, values_dtype, device):
    logits = torch.randn(T, E).to(device, values_dtype)
    ids = torch.rand(T, E).argsort(-1)[:, :K]
    ids = torch.where(torch.rand(T, K) < 0.3, -1, ids)
    options = {"score": score, "renormalize": renormalize, "scale": 1.5}
    leaf, z = logits.clone().requires_grad_(), logits.cpu().double().requires_grad_()
    got = moeops.chosen_weights(leaf, ids.to(device), **options)
    want = reference.chosen_weights(z, ids, **options)
    assert_close(got, want, values_dtype)
    direction = torch.randn(T, K)
    (grad,) = torch.autograd.grad(got, leaf, direction.to(got))
    (want_grad,) = torch.autograd.grad(want, z, direction.double())
    assert_close(grad, want_grad, values_dtype)


def test_chosen_weights_take_int32(device):
    ids = torch.tensor([[3, -1]], dtype=torch.int32, device=device)
    weights = moeops.chosen_weights(torch.zeros(1, 4, device=device), ids, renormalize=False)
    assert weights.tolist() == [[0.25, 0.0]]


def test_public_errors(device):
    logits = torch.randn(5, 6, device=device)
    for options, text in (
        ({"top_k": 7}, r"top_k must be at most the 6 experts .* got 7"),
        ({"group_score": "max"}, r"group_score must be one of .* got 'max'"),
        ({"top_p": 0.0}, r"top_p must be above 0, got 0"),
        ({"min_score": -0.1}, r"min_score must be at least 0, got -0\.1"),
        ({"min_score": math.nan}, r"min_score must be at least 0, got nan"),
        ({"num_counted": 3}, r"num_counted must be at most top_k = 2, got 3"),
        ({"uniform": torch.rand(4, device=device)}, r"uniform must have size 5.*\[4\]"),
        (
            {"uniform": torch.rand(5, device=device), "score": "sigmoid"},
            r"uniform must be None unless the score is a softmax",
        ),
    ):
        with pytest.raises(ValueError, match=f"topk_route_balance: {text}"):
            moeops.topk_route_balance(logits, **{"top_k": 2, **options})
    with pytest.raises(ValueError, match=r"prototype_route: num_prototypes must divide the 6 .* 4"):
        moeops.prototype_route(logits, 4)
    with pytest.raises(ValueError, match=r"relu_route: logits must have 2 dimensions.*\[30\]"):
        moeops.relu_route(logits.view(-1))
    with pytest.raises(ValueError, match=r"topk_route_balance: temperature must have 0 dim.*\[1\]"):
        moeops.topk_route_balance(logits, 2, temperature=torch.ones(1, device=device))
    with pytest.raises(TypeError, match=r"topk_route_balance: logits must be float64.*int64"):
        moeops.topk_route_balance(logits.long(), 2)
    with pytest.raises(ValueError, match=r"chosen_weights: topk_ids must have size 5.*\[4, 2\]"):
        moeops.chosen_weights(logits, torch.zeros(4, 2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match=r"chosen_weights: score must be one of .* got 'tanh'"):
        moeops.chosen_weights(logits, torch.zeros(5, 2, dtype=torch.int64), score="tanh")


def test_values_are_checked_on_the_cpu():
    logits = torch.randn(9, 5)
    bad = logits.clone()
    bad[4, 3] = math.nan
    with pytest.raises(
        RuntimeError, match=r"topk_route_balance: logits must be finite, got nan at \[4, 3\]"
    ):
        moeops.topk_route_balance(bad, 2)
    with pytest.raises(RuntimeError, match=r"prototype_route: logits must be finite, got nan"):
        moeops.prototype_route(bad, 5)
    with pytest.raises(RuntimeError, match=r"relu_route: logits must be finite, got nan"):
        moeops.relu_route(bad)
    with pytest.raises(RuntimeError, match=r"temperature must be above 0, got 0"):
        moeops.topk_route_balance(logits, 2, temperature=torch.zeros(()))
    ids = torch.zeros(9, 2, dtype=torch.int64)
    ids[3, 1] = 5
    with pytest.raises(
        RuntimeError, match=r"chosen_weights: topk_ids must be in \[-1, 5\), got 5 at pair 7"
    ):
        moeops.chosen_weights(logits, ids)


def test_bare_ops_refuse_bad_arguments(device):
    logits = torch.randn(5, 6, device=device)
    route = torch.ops.moeops.topk_route_balance
    uniform, sums = torch.rand(6, device=device), torch.ones(6, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"num_counted must be from 0 to top_k = 2, got 3"):
        route(logits, 2, num_counted=3)
    with pytest.raises(RuntimeError, match=r"uniform must have size 5"):
        route(logits, 2, uniform=uniform)
    with pytest.raises(RuntimeError, match=r'group_score must be "top2" or "sum", got "mean"'):
        route(logits, 2, group_score="mean")
    _, _, _, ids, counts = moeops.topk_route_balance(logits, 2)
    backward = torch.ops.moeops.topk_route_balance_backward
    one = torch.ones((), device=device)
    with pytest.raises(RuntimeError, match=r"tokens_per_expert must have size 6"):
        backward(None, None, one, logits, None, ids, counts[:5])
    with pytest.raises(RuntimeError, match=r"grad_loss must have 0 dimensions"):
        backward(None, None, one[None], logits, None, ids, counts)
    with pytest.raises(RuntimeError, match=r"grad_sums must be float32"):
        backward(None, sums, None, logits, None, ids, counts)
