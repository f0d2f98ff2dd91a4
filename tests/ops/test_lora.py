"""Low-rank additions to experts' weights, against weights to which the product was added."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import moeops
from cases import each
from moeops import LoraFactors, TokenPlan, reference
from samples import (
    SAMPLES,
    SMALL,
    UNITS,
    Sample,
    assert_matches_reference,
    mlp_tensors,
    unit_id,
)

RANK, SCALING = 3, 0.7
ACTIVATIONS = ("swiglu", "geglu_tanh", "gelu", "relu", "silu", "relu_squared", UNITS[2], UNITS[4])


def factors(sample, name, inputs, outputs, dtype, device):
    return {
        f"{name}_a": sample.tensor(sample.E, RANK, inputs, dtype=dtype, device=device),
        f"{name}_b": sample.tensor(sample.E, outputs, RANK, dtype=dtype, device=device),
    }


def linear_problem(sample, dtype, device):
    return {
        "rows": sample.tensor(sample.R, sample.D, dtype=dtype, device=device),
        "weight": sample.tensor(sample.E, sample.H, sample.D, dtype=dtype, device=device),
        "bias": sample.tensor(sample.E, sample.H, dtype=dtype, device=device),
        **factors(sample, "lora", sample.D, sample.H, dtype, device),
    }


def block_problem(sample, dtype, device, activation, adapted=("up", "down")):
    tensors = mlp_tensors(sample, dtype, device, activation, with_bias=True)
    for name in adapted:
        _, outputs, inputs = tensors[f"w_{name}"].shape
        tensors |= factors(sample, name, inputs, outputs, dtype, device)
    return tensors


def on_rows(plan, activation):
    """moe_mlp of named tensors, factors given as factors."""

    def call(x, topk_weights, up_a=None, up_b=None, down_a=None, down_b=None, **weights):
        return moeops.moe_mlp(
            x,
            plan,
            topk_weights,
            activation=activation,
            lora_up=None if up_a is None else (up_a, up_b, SCALING),
            lora_down=None if down_a is None else (down_a, down_b, SCALING),
            **weights,
        )

    return call


def on_weights(plan, activation):
    """The reference of the block on weights with the product added."""

    def call(x, topk_weights, up_a=None, up_b=None, down_a=None, down_b=None, **weights):
        if up_a is not None:
            weights["w_up"] = weights["w_up"] + SCALING * up_b @ up_a
        if down_a is not None:
            weights["w_down"] = weights["w_down"] + SCALING * down_b @ down_a
        return reference.moe_mlp(x, plan, topk_weights, activation=activation, **weights)

    return call


@each("sample", SAMPLES)
def test_grouped_linear(sample, values_dtype, device):
    offsets = sample.plan(device).expert_offsets
    out = assert_matches_reference(
        lambda rows, weight, bias, lora_a, lora_b: moeops.grouped_linear(
            rows, weight, offsets, bias=bias, lora=(lora_a, lora_b, SCALING)
        ),
        lambda rows, weight, bias, lora_a, lora_b: reference.grouped_linear(
            rows, weight + SCALING * lora_b @ lora_a, offsets.cpu(), bias=bias
        ),
        linear_problem(sample, values_dtype, device),
        values_dtype,
    )
    tail = out[int(offsets[-1]) :]
    assert torch.equal(tail, torch.zeros_like(tail))


@each("activation", ACTIVATIONS, ids=unit_id)
@each("adapted", [("up", "down"), ("up",), ("down",)], ids="-".join)
def test_moe_mlp(activation, adapted, dtype, device):
    sample = Sample("dropped", T=37, D=9, H=11, dropped=0.2)
    plan = sample.plan(device)
    assert_matches_reference(
        on_rows(plan, activation),
        on_weights(TokenPlan(*(t.cpu() for t in plan)), activation),
        block_problem(sample, dtype, device, activation, adapted),
        dtype,
    )


@pytest.mark.parametrize("sample", SMALL, ids=str)
def test_gradcheck(sample, device):
    plan = sample.plan(device)
    tensors = block_problem(sample, torch.float64, device, "swiglu")
    leaves = tuple(t.detach().requires_grad_() for t in tensors.values())
    call = on_rows(plan, "swiglu")
    assert torch.autograd.gradcheck(
        lambda *args: call(**dict(zip(tensors, args, strict=True))), leaves
    )


class Sizes(TorchDispatchMode):
    """How many elements each tensor has that an op returned."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else [out]
        # A view, such as the transposed weight of the backward, holds no memory of its own.
        self.seen += [
            t.numel()
            for t in outputs
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.inputs
        ]
        return out

    def watch(self, *tensors):
        self.inputs = {t.untyped_storage()._cdata for t in tensors}
        return self


def test_nothing_of_the_size_of_a_weight_is_built(device):
    sample = Sample("few_tokens", T=5, E=8, D=32, H=24)
    tensors = block_problem(sample, torch.float32, device, "swiglu")
    frozen = ("w_up", "w_down", "b_up", "b_down")
    for name, tensor in tensors.items():
        tensor.requires_grad_(name not in frozen)
    with Sizes().watch(*tensors.values()) as sizes:
        on_rows(sample.plan(device), "swiglu")(**tensors).square().sum().backward()
    assert max(sizes.seen) < tensors["w_down"].numel() / 2
    assert all((t.grad is None) == (name in frozen) for name, t in tensors.items())


def test_factors_of_another_type(device):
    """Optimizers keep float32 factors beside half weights; their gradients are float32 too."""
    sample = Sample("plain")
    offsets = sample.plan(device).expert_offsets
    given = linear_problem(sample, torch.bfloat16, device)
    a, b = (given.pop(f"lora_{part}").float().requires_grad_() for part in "ab")
    out = moeops.grouped_linear(
        given["rows"], given["weight"], offsets, bias=given["bias"], lora=(a, b, SCALING)
    )
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert a.grad.dtype == b.grad.dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        cast = moeops.grouped_linear(
            *(given[name].float() for name in ("rows", "weight")),
            offsets,
            bias=given["bias"].float(),
            lora=(a, b, SCALING),
        )
    assert torch.equal(cast, out)


def test_dropout_is_of_what_the_factors_see(device):
    sample = Sample("plain", T=300, K=1)
    offsets = sample.plan(device).expert_offsets
    rows = torch.ones(sample.R, sample.D, dtype=torch.float64, device=device)
    weight = torch.zeros(sample.E, sample.D, sample.D, dtype=torch.float64, device=device)
    eye = torch.eye(sample.D, dtype=torch.float64, device=device).expand(sample.E, -1, -1)
    out = moeops.grouped_linear(rows, weight + eye, offsets, lora=LoraFactors(eye, eye, 3.0, 0.25))
    added = out - 1  # the weight saw whole rows
    torch.testing.assert_close(added[added != 0], torch.full_like(added[added != 0], 4.0))
    assert 0.2 < float((added == 0).double().mean()) < 0.3
    same = moeops.grouped_linear(rows, weight + eye, offsets, lora=LoraFactors(eye, eye, 3.0, 1.0))
    assert torch.equal(same, rows)


def test_compiles_in_one_graph(fresh_dynamo, device):
    compiled = torch.compile(on_rows_of_ids, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (13, 6):
        sample = Sample("tokens", T=tokens)
        tensors = block_problem(sample, torch.float64, device, "swiglu")
        ids = sample.ids(device)
        grads = []
        for function in (on_rows_of_ids, compiled):
            leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
            y = function(ids, sample.E, leaves)
            grads.append(torch.autograd.grad(y.square().sum(), list(leaves.values())))
        for name, eager, one_graph in zip(tensors, *grads, strict=True):
            torch.testing.assert_close(one_graph, eager, msg=lambda m, n=name: f"{n}: {m}")


def on_rows_of_ids(ids, num_experts, tensors):
    return on_rows(moeops.sort_tokens(ids, num_experts), "swiglu")(**tensors)


def test_errors(device):
    sample = Sample("plain")
    plan = sample.plan(device)
    given = linear_problem(sample, torch.float32, device)
    a, b = given.pop("lora_a"), given.pop("lora_b")

    def call(lora):
        return moeops.grouped_linear(given["rows"], given["weight"], plan.expert_offsets, lora=lora)

    with pytest.raises(TypeError, match=r"grouped_linear: lora must be \(a, b, scaling\)"):
        call(a)
    with pytest.raises(
        ValueError, match=r"lora.a must have size 8 in dimension 2.*inputs of weight"
    ):
        call((a[:, :, 1:], b, 1.0))
    with pytest.raises(
        ValueError, match=r"lora.b must have size 6 in dimension 1.*outputs of weight"
    ):
        call((a, b[:, 1:], 1.0))
    with pytest.raises(ValueError, match=r"lora.b must have size 3 in dimension 2.*rank of lora.a"):
        call((a, b[:, :, 1:], 1.0))
    with pytest.raises(ValueError, match=r"lora.a must have size 4 in dimension 0.*one per expert"):
        call((a[1:], b, 1.0))
    with pytest.raises(TypeError, match=r"lora.a must be .*got torch.int64"):
        call((a.long(), b, 1.0))
    with pytest.raises(ValueError, match=r"lora.dropout must be between 0 and 1, got 1.5"):
        call(LoraFactors(a, b, 1.0, 1.5))
    block = mlp_tensors(sample, torch.float32, device, "swiglu", with_bias=False)
    with pytest.raises(ValueError, match=r"moe_mlp: lora_down.a must have size 6 in dimension 2"):
        moeops.moe_mlp(
            block["x"],
            plan,
            block["topk_weights"],
            block["w_up"],
            block["w_down"],
            lora_down=(a, b, 1),
        )
