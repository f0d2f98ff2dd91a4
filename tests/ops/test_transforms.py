"""Forward-mode AD, torch.func's transforms and higher derivatives, by way of the ATen ops that an op is made of."""

from __future__ import annotations

import functools
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn

import moeops
from moeops.ops._decompositions import DECOMPOSITIONS
from samples import OP_CASES, SAMPLES, op_cases

SIZED = tuple(s for s in SAMPLES if s.name not in ("wide", "long"))
FEW = tuple(s for s in SAMPLES if s.name in ("plain", "dropped", "few_rows"))


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_every_op_of_a_forward_has_a_decomposition():
    forward = {op for op in OP_CASES if "_backward" not in op}
    assert set(DECOMPOSITIONS) == forward


@pytest.mark.parametrize("op", DECOMPOSITIONS)
def test_decomposition_equals_the_kernel(op):
    for sample in SIZED:
        for case in op_cases(op, sample, torch.float64):
            got = as_tuple(DECOMPOSITIONS[op](*case.positional, **case.keywords))
            for mine, kernel in zip(got, as_tuple(case.run()), strict=True):
                torch.testing.assert_close(mine, kernel, msg=lambda text, s=sample: f"{s}: {text}")


DIFFERENTIABLE = [
    pytest.param(op, index, id=f"{op}_{index}")
    for op in DECOMPOSITIONS
    for index, case in enumerate(op_cases(op, FEW[0], torch.float64))
    if case.differentiable
]


# Ops whose backward is made of ops that have gradients.
TWICE = (
    *("permute_tokens", "pad_rows", "unpad_rows", "unpermute_tokens"),
    *("grouped_linear", "grouped_linear_weight_grad", "grouped_sum"),
)


def split(case):
    """The differentiable arguments, and a function of them that returns the float outputs."""
    places = case.differentiable
    floats = [i for i, out in enumerate(as_tuple(case.run())) if out.is_floating_point()]
    if case.op == "moe_mlp":
        floats = floats[:1]  # the pre-activation is for the backward, and has no gradient

    def function(*values):
        args = list(case.positional)
        for place, value in zip(places, values, strict=True):
            args[place] = value
        outputs = as_tuple(case.overload(*args, **case.keywords))
        return tuple(outputs[i] for i in floats)

    return [case.args[i] for i in places], function


def directional(how, function, inputs, tangents):
    if how == "func":
        return torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]
    with fwAD.dual_level():
        duals = [fwAD.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        parts = [fwAD.unpack_dual(out) for out in function(*duals)]
    # torch leaves out the tangent of what is constant, such as the load where every expert is chosen.
    return [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts]


@pytest.mark.parametrize("how", ["func", "dual"])
@pytest.mark.parametrize(("op", "index"), DIFFERENTIABLE)
def test_tangents_are_the_transposes_of_the_kernels_gradients(op, index, how):
    """``u . J v`` of forward mode is ``v . J^T u`` of the kernel's own backward, for random ``u`` and ``v``."""
    for sample in FEW:
        inputs, function = split(op_cases(op, sample, torch.float64)[index])
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        us, vs = [torch.randn_like(out) for out in outputs], [torch.randn_like(x) for x in inputs]
        grads = torch.autograd.grad(outputs, leaves, us)
        tangents = directional(how, function, inputs, vs)
        forward = sum((u * t).sum() for u, t in zip(us, tangents, strict=True))
        backward = sum((v * g).sum() for v, g in zip(vs, grads, strict=True))
        torch.testing.assert_close(forward, backward)
        assert backward != 0 or sample is not FEW[0]  # six groups of one expert have no gradient
        # The same where the backward is wanted too, as inside of a model with parameters.
        again = directional(how, function, leaves, vs)
        torch.testing.assert_close(tuple(again), tuple(tangents))


@pytest.mark.parametrize(("op", "index"), DIFFERENTIABLE)
def test_grad_and_vmap(op, index):
    inputs, function = split(op_cases(op, FEW[1], torch.float64)[index])

    def loss(*values):
        return sum(out.square().sum() for out in function(*values))

    leaves = [x.detach().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)
    torch.testing.assert_close(got, want)
    stacked = [torch.stack([x, x + 0.1 * torch.randn_like(x)]) for x in inputs]
    batched = torch.func.vmap(function)(*stacked)
    for item in range(2):
        one = function(*(x[item] for x in stacked))
        torch.testing.assert_close(tuple(out[item] for out in batched), one)


@pytest.mark.parametrize(("op", "index"), DIFFERENTIABLE)
def test_a_second_gradient_is_right_or_refused(op, index):
    """Along random directions against differences of first gradients; elsewhere an error that names the backward."""
    inputs, function = split(op_cases(op, FEW[0], torch.float64)[index])
    vs, ws = ([torch.randn_like(x) for x in inputs] for _ in range(2))

    def along(values):
        """The first gradient along ``vs``, and the leaves that it depends on."""
        leaves = [x.detach().requires_grad_() for x in values]
        loss = sum(out.square().sum() for out in function(*leaves))
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return sum((v * g).sum() for v, g in zip(vs, grads, strict=True)), leaves

    slope, leaves = along(inputs)
    if op not in TWICE or (op == "unpermute_tokens" and len(inputs) > 1):
        with pytest.raises(NotImplementedError, match=r"_backward\w*: a gradient must be diff"):
            torch.autograd.grad(slope, leaves)
        return
    second = torch.autograd.grad(slope, leaves, allow_unused=True)
    got = sum((w * g).sum() for w, g in zip(ws, second, strict=True) if g is not None)
    ahead, behind = (
        along([x + step * w for x, w in zip(inputs, ws, strict=True)])[0] for step in (1e-5, -1e-5)
    )
    torch.testing.assert_close(got, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)
    assert got != 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_refuses_a_second_gradient(compiled, fresh_dynamo):
    layer, x = Layer(), torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    (grad,) = torch.autograd.grad(function(x), x, create_graph=True)
    match = (
        "double backward" if compiled else r"_backward\w*: a gradient must be differentiated once"
    )
    with pytest.raises(RuntimeError, match=match):  # NotImplementedError is one
        torch.autograd.grad(grad.square().sum(), x)


def test_rows_without_an_expert_are_not_read():
    """What stands in them, NaN say, reaches no gradient."""
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    rows = torch.randn(5, 4, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    dirty = rows.clone()
    dirty[3:] = float("nan")

    def loss(rows, weight, bias):
        return moeops.grouped_linear(rows, weight, offsets, bias=bias).square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(dirty, weight, bias)
    want = torch.func.grad(loss, argnums=(0, 1, 2))(rows, weight, bias)
    torch.testing.assert_close(got, want)
    assert not got[0][3:].any()


def test_rows_without_columns():
    """An empty sum is 0, to which the bias is added."""
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    bias = torch.randn(2, 3, dtype=torch.float64)
    function = functools.partial(moeops.grouped_linear, expert_offsets=offsets)
    rows, weight = torch.zeros(4, 0, dtype=torch.float64), torch.zeros(2, 3, 0, dtype=torch.float64)
    want = torch.stack([bias[0], bias[1], bias[1], torch.zeros(3, dtype=torch.float64)])
    assert torch.equal(function(rows, weight, bias=bias), want)
    assert torch.equal(
        torch.func.jvp(lambda b: function(rows, weight, bias=b), (bias,), (bias,))[1], want
    )


def test_a_plan_without_slots():
    """K = 0: tokens have no experts, and the rows that were asked for hold nobody."""
    plan = moeops.sort_tokens(torch.zeros(4, 0, dtype=torch.int64), 3, 2)
    x = torch.randn(4, 5)
    rows, tangent = torch.func.jvp(lambda x: moeops.permute_tokens(x, plan), (x,), (x,))
    for got in (moeops.permute_tokens(x, plan), rows, tangent):
        assert torch.equal(got, torch.zeros(2, 5))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = moeops.FMoETransformerMLP(4, 6, 5, activation="gelu", dtype=torch.float64)

    def forward(self, x):
        return self.mlp(x).square().sum()


def test_second_derivatives_of_a_layer():
    """Hessian times vector, forward over reverse and reverse over reverse, against differences of first gradients."""
    layer, x = Layer(), torch.randn(7, 6, dtype=torch.float64)
    v = torch.randn_like(x)

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layer(x), x)[0]

    want = (gradient(x + 1e-6 * v) - gradient(x - 1e-6 * v)) / 2e-6
    forward = torch.func.jvp(torch.func.grad(layer), (x,), (v,))[1]
    reverse = torch.func.grad(lambda x: (torch.func.grad(layer)(x) * v).sum())(x)
    torch.testing.assert_close(forward, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reverse, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_transforms_compile(transform, fresh_dynamo):
    layer, x = Layer(), torch.randn(7, 6, dtype=torch.float64)

    def function(x):
        if transform == "grad":
            return torch.func.grad(layer)(x)
        return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


def test_per_sample_gradients_of_parameters():
    layer = moeops.FMoETransformerMLP(4, 6, 5)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(3, 7, 6)

    def loss(params, x):
        return torch.func.functional_call(layer, params, (x,)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for item in range(3):
        layer.zero_grad(set_to_none=True)
        layer(x[item]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(got[name][item], parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_backward_op_refuses_tangents():
    case = op_cases("moe_mlp_backward_data", FEW[0], torch.float64)[0]
    with fwAD.dual_level():
        dual = fwAD.make_dual(case.args[0], torch.ones_like(case.args[0]))
        with pytest.raises(
            NotImplementedError, match="moe_mlp_backward_data: arguments must have no tan"
        ):
            case.overload(dual, *case.positional[1:], **case.keywords)


def test_ops_without_gradients_have_no_kernel_in_python_until_something_is_exported():
    """It would cost every small call some microseconds, in a process that has compiled something too."""
    source = """
import torch, torch._dynamo, torch.onnx, moeops
layer = moeops.FMoETransformerMLP(4, 8, 16).eval()
torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.ones(5, 8)).sum().backward()
ops = ("count_tokens", "limit_capacity", "sort_tokens")
keys = [torch._C._dispatch_has_kernel_for_dispatch_key(f"moeops::{op}", "Autograd") for op in ops]
assert not any(keys), keys
import torch.onnx._internal.exporter._core
keys = [torch._C._dispatch_has_kernel_for_dispatch_key(f"moeops::{op}", "Autograd") for op in ops]
assert all(keys), keys
"""
    if find_spec("onnxscript"):
        source += "torch.onnx.export(layer, (torch.ones(5, 8),), dynamo=True, verbose=False)"
    subprocess.run([sys.executable, "-c", source], check=True)
