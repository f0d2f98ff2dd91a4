"""noisy_topk_route: values and gradients against the paper's equations in float64."""

from __future__ import annotations

import math

import pytest
import torch

import moeops
from cases import each
from moeops import reference
from moeops.losses import cv_squared, importance, noisy_load
from samples import accumulate_dtype
from tolerances import TOLERANCES, assert_close

# T, E, K: none, K = E, one expert, every count of registers per lane.
SIZES = [
    (9, 4, 2),
    (0, 4, 2),
    (7, 4, 4),
    (5, 1, 1),
    (6, 33, 5),
    (5, 70, 1),
    (4, 128, 8),
    (3, 200, 2),
]


@each(("T", "E", "K"), SIZES, ids=lambda n: str(n))
def test_outputs_and_gradients(T, E, K, values_dtype, device):
    tensors = [torch.randn(T, E).to(values_dtype) for _ in range(3)]
    mine = [t.to(device).requires_grad_(i < 2) for i, t in enumerate(t.clone() for t in tensors)]
    exact = [t.double().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    got = moeops.noisy_topk_route(*mine, K, min_noise=0.05)
    want = reference.noisy_topk_route(*exact, K, min_noise=0.05)
    assert torch.equal(got.topk_ids.cpu(), want.topk_ids)
    total, exact_total = 0.0, 0.0
    for name in ("topk_weights", "importance", "load", "loss"):
        output, truth = getattr(got, name), getattr(want, name)
        assert output.dtype == accumulate_dtype(values_dtype)
        assert_close(output, truth, values_dtype, name)
        direction = torch.randn(truth.shape, dtype=torch.float64)
        total = total + (output * direction.to(output)).sum()
        exact_total = exact_total + (truth * direction).sum()
    total.backward()
    exact_total.backward()
    for leaf, z in zip(mine[:2], exact[:2], strict=True):
        if z.numel():
            error = float((leaf.grad.cpu().double() - z.grad).abs().max())
            assert error <= TOLERANCES[values_dtype] * max(0.1, float(z.grad.abs().max()))


@each("output", ["topk_weights", "importance", "load", "loss"])
@each("K", [1, 3])
def test_gradient_of_one_output_alone(output, K, device):
    tensors = [torch.randn(6, 5, dtype=torch.float64, device=device) for _ in range(3)]
    clean, spread, noise = (t.requires_grad_(i < 2) for i, t in enumerate(tensors))
    assert torch.autograd.gradcheck(
        lambda c, s: getattr(moeops.noisy_topk_route(c, s, noise, K), output), (clean, spread)
    )


def test_is_the_functions_of_losses(device):
    clean, spread, noise = (torch.randn(300, 40, device=device) for _ in range(3))
    sigma = torch.nn.functional.softplus(spread) + 0.01
    noisy = clean + noise * sigma
    weights, ids = moeops.topk_route(noisy, 3)
    route = moeops.noisy_topk_route(clean, spread, noise, 3)
    assert torch.equal(route.topk_ids, ids)
    assert_close(route.topk_weights, weights.double(), torch.float32)
    sums, load = importance(weights, ids, 40), noisy_load(clean, noisy, sigma, ids)
    assert_close(route.importance, sums.double(), torch.float32)
    assert_close(route.load, load.double(), torch.float32)
    want = cv_squared(sums) + cv_squared(load)
    assert abs(float(route.loss - want)) <= 1e-5 * float(want)


def test_same_bits_every_time(device):
    tensors = [torch.randn(4099, 37, device=device) for _ in range(3)]
    first = moeops.noisy_topk_route(*tensors, 3)
    for _ in range(3):
        again = moeops.noisy_topk_route(*tensors, 3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_extreme_spreads(device):
    clean = torch.zeros(3, 4, device=device, requires_grad=True)
    spread = torch.tensor([-200.0, 0.0, 30.0, 200.0], device=device).repeat(3, 1).requires_grad_()
    noise = torch.randn(3, 4, device=device)
    route = moeops.noisy_topk_route(clean, spread, noise, 2)
    (route.loss + route.topk_weights[:, 0].sum()).backward()
    for tensor in (route.load, route.loss, clean.grad, spread.grad):
        assert tensor.isfinite().all()


def test_errors(device):
    z = torch.randn(5, 6, device=device)
    for arguments, error, text in (
        ((z, z[:, :5], z, 2), ValueError, r"spread must have size 6.*\[5, 5\]"),
        ((z, z, z[:4], 2), ValueError, r"noise must have size 5.*\[4, 6\]"),
        ((z, z, z.double(), 2), TypeError, r"noise must be torch.float32 like clean.*float64"),
        ((z, z, z, 7), ValueError, r"top_k must be at most the 6 experts, got 7"),
        ((z.long(), z, z, 2), TypeError, r"clean must be float64.*int64"),
    ):
        with pytest.raises(error, match=f"noisy_topk_route: {text}"):
            moeops.noisy_topk_route(*arguments)
    for least in (0.0, math.inf):
        with pytest.raises(ValueError, match=rf"min_noise must be above 0 .* got {least}"):
            moeops.noisy_topk_route(z, z, z, 2, min_noise=least)
    with pytest.raises(RuntimeError, match=r"min_noise must be above 0, got 0"):
        torch.ops.moeops.noisy_topk_route(z, z, z, 2, min_noise=0.0)


def test_values_are_checked_on_the_cpu():
    z = torch.randn(5, 6)
    bad = z.clone()
    bad[3, 1] = math.inf
    with pytest.raises(RuntimeError, match=r"noisy_topk_route: logits must be finite.*token 3"):
        moeops.noisy_topk_route(z, z, bad, 2)
