"""Gated units with options, the order of their rows, and weights stored the other way round."""

from __future__ import annotations

import pytest
import torch
from block_cases import call, uneven_plan

import moeops
from cases import each
from moeops import Glu, TokenPlan, reference
from moeops.ops.activations import activate
from samples import (
    SAMPLES,
    UNITS,
    Sample,
    assert_matches_reference,
    mlp_tensors,
    unit_for,
    unit_id,
)


@each("sample", SAMPLES, ids=str)
@each("activation", [UNITS[0], UNITS[1]], ids=unit_id)
def test_gated_units(sample, activation, dtype, device):
    activation = unit_for(activation, dtype)
    plan = sample.plan(device)
    cpu_plan = TokenPlan(*(t.cpu() for t in plan))
    assert_matches_reference(
        call(moeops.moe_mlp, plan, activation),
        call(reference.moe_mlp, cpu_plan, activation),
        mlp_tensors(sample, dtype, device, activation, with_bias=False),
        dtype,
    )


@each("name, unit", [("swiglu", Glu()), ("geglu_tanh", Glu("gelu_tanh"))], ids=["swiglu", "geglu"])
def test_names_are_units_without_options(name, unit, device):
    sample = Sample("plain")
    plan = sample.plan(device)
    tensors = mlp_tensors(sample, torch.float32, device, name, with_bias=True)
    assert torch.equal(
        call(moeops.moe_mlp, plan, name)(**tensors), call(moeops.moe_mlp, plan, unit)(**tensors)
    )


@each("activation", UNITS, ids=unit_id)
def test_rows_in_turns_are_rows_one_by_one_in_another_order(activation, device):
    sample = Sample("dropped", T=41, D=13, H=9, dropped=0.2)
    plan = sample.plan(device)
    tensors = mlp_tensors(sample, torch.float64, device, activation, with_bias=True)
    turns = {
        n: t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if n in ("w_up", "b_up") else t
        for n, t in tensors.items()
    }

    def run(interleaved, tensors):
        leaves = {n: t.detach().requires_grad_() for n, t in tensors.items()}
        y = call(moeops.moe_mlp, plan, activation._replace(interleaved=interleaved))(**leaves)
        return y, *torch.autograd.grad(y.square().sum(), leaves.values())

    order = list(tensors)
    for name, got, want in zip(["y", *order], run(True, turns), run(False, tensors), strict=True):
        if name in ("w_up", "b_up"):
            got = torch.cat((got[:, ::2], got[:, 1::2]), 1)
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


@each("stored", ["up", "down", "both"])
@each("rows", [(13, 9, 0, 4), (700, 3, 0, 257)], ids=["whole", "cut"])
def test_gradients_of_transposed_weights_are_stored_like_them(stored, rows, device):
    plan, num_tokens = uneven_plan(rows, 1)
    plan = TokenPlan(*(t.to(device) for t in plan))
    sample = Sample("uneven", T=num_tokens, K=1, E=len(rows), D=40, H=72)
    tensors = mlp_tensors(sample, torch.float64, device, UNITS[0], with_bias=True)

    def run(names):
        leaves = {
            n: (t.mT.contiguous().mT if n in names else t).detach().requires_grad_()
            for n, t in tensors.items()
        }
        y = call(moeops.moe_mlp, plan, UNITS[0])(**leaves)
        grads = torch.autograd.grad(y.square().sum(), leaves.values())
        for name, grad in zip(leaves, grads, strict=True):
            assert grad.stride() == leaves[name].stride(), name
        return grads

    names = ("w_up", "w_down") if stored == "both" else (f"w_{stored}",)
    for name, got, want in zip(tensors, run(names), run(()), strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{name}: {text}")


def test_what_is_clamped_has_no_gradient_and_the_limits_have(device):
    """As torch.clamp has it, and NaN comes through."""
    pre = torch.tensor([[1.0, 0.5], [0.5, 1.0], [2.0, -2.0], [-2.0, -1.0], [float("nan"), 0.5]])
    plan = reference.sort_tokens(torch.zeros(len(pre), 1, dtype=torch.int64), 1)
    unit = Glu(alpha=1.5, limit=1.0, offset=1.0, interleaved=True)
    tensors = {
        "topk_weights": torch.ones(len(pre), 1),
        "w_up": torch.eye(2)[None],
        "w_down": torch.ones(1, 1, 1),
    }

    def run(function, device):
        x = pre.to(device, copy=True).requires_grad_()
        on_device = TokenPlan(*(t.to(device) for t in plan))
        given = {n: t.to(device) for n, t in tensors.items()}
        y = call(function, on_device, unit)(x=x, **given)
        return y.detach().cpu(), torch.autograd.grad(y.sum(), x)[0].cpu()

    (y, grad), (want, want_grad) = run(moeops.moe_mlp, device), run(reference.moe_mlp, "cpu")
    torch.testing.assert_close(y, want, equal_nan=True)
    torch.testing.assert_close(grad[:4], want_grad[:4])
    assert (grad[2] == 0).all()
    assert y[4].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "limit", "below", "above"),
    [
        (torch.bfloat16, 359 / 512, 0.69921875, 0.703125),
        (torch.float16, 2871 / 4096, 1435 / 2048, 1436 / 2048),
        (torch.bfloat16, 7.0, 7.0, 7.03125),
    ],
)
def test_composed_units_compare_with_a_limit_that_the_type_does_not_hold(
    dtype, limit, below, above
):
    """What is above the limit has no gradient, though the limit rounds to it."""
    pre = torch.tensor([[below, below], [above, below], [below, above]], dtype=dtype)
    pre.requires_grad_()
    activate(pre, Glu("silu", limit=limit)).sum().backward()
    assert (pre.grad != 0).tolist() == [[True, True], [False, True], [True, False]]
