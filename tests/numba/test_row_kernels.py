"""Rules over one row: values, types, gradients, compile and export, on the CPU and on CUDA."""

from __future__ import annotations

import pytest
import torch
from numba_prototypes import require_numba
from torch._dynamo.testing import CompileCounterWithBackend

require_numba()

import moeops.numba as prototype
from moeops.numba import scores
from moeops.reference import gates_prototypes
from tolerances import assert_close


def halve(value):
    """A plain function that a rule calls."""
    return value / 2


@prototype.row_kernel(
    "test_rows::mix",
    "x[T, D], factor[D], shift[T], flags[T]: bool, places[M]: int, scale: float = 2.0 -> "
    "y[T, D]: x, norm[T]: float, first[T, M + 1]: int64, _half[T, D]: float32",
    require=("M <= D",),
)
def mix(x, factor, shift, flags, places, scale, y, norm, first, _half, row):
    """Uses everything that a signature can declare."""
    norm[0] = 0.0
    for d in range(len(x)):
        _half[d] = halve(x[d])
        y[d] = scale * _half[d] * factor[d] + shift if flags else 0.0
        norm[0] += x[d] * x[d]
    for m in range(len(places)):
        first[m] = places[m] + row
    first[len(places)] = -row


def mix_reference(x, factor, shift, flags, places, scale=2.0):
    y = torch.where(flags[:, None], scale * x / 2 * factor + shift[:, None], 0)
    rows = torch.arange(x.shape[0], device=x.device)
    first = torch.cat((places + rows[:, None], -rows[:, None]), 1)
    return y, x.square().sum(1), first


def mix_inputs(dtype, device, T=7, D=5):
    return {
        "x": torch.randn(T, D, device=device).to(dtype),
        "factor": torch.randn(D, device=device).to(dtype),
        "shift": torch.randn(T, device=device).to(dtype),
        "flags": torch.rand(T, device=device) < 0.5,
        "places": torch.randint(0, 9, (3,), dtype=torch.int32, device=device),
    }


@pytest.mark.parametrize("T", [7, 0])
def test_values(device, dtype, T):
    inputs = mix_inputs(dtype, device, T)
    y, norm, first = mix(**inputs)
    assert y.dtype == dtype
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    for name, actual, expected in zip(
        ("y", "norm", "first"), (y, norm, first), mix_reference(**exact), strict=True
    ):
        bound = torch.float32 if name == "norm" and dtype != torch.float64 else dtype
        assert_close(actual, expected, bound, name)


def test_strides_threads_and_the_op_itself(device):
    inputs = mix_inputs(torch.float32, device, 40, 6)
    expected = mix(**inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(mix(**inputs), expected, strict=True))
    finally:
        torch.set_num_threads(threads)
    wide = torch.randn(6, 80, device=device)
    wide[:, ::2] = inputs["x"].t()
    inputs["x"] = wide[:, ::2].t()
    assert not inputs["x"].is_contiguous()
    for function in (mix, torch.ops.test_rows.mix):
        assert all(torch.equal(a, b) for a, b in zip(function(**inputs), expected, strict=True))


def test_schema():
    assert str(torch.ops.test_rows.mix.default._schema) == (
        "test_rows::mix(Tensor x, Tensor factor, Tensor shift, Tensor flags, Tensor places, float scale=2.) "
        "-> (Tensor, Tensor, Tensor)"
    )


@mix.gradient(saves=("factor", "flags"))
def mix_gradient(grads, inputs, outputs):
    """Of y to x only; norm's gradient is left out on purpose."""
    grad = torch.where(inputs["flags"][:, None], grads["y"], 0) * inputs["factor"]
    return {"x": grad * (inputs["scale"] / 2)}


def test_gradient_function(device):
    inputs = mix_inputs(torch.float64, device)
    x = inputs.pop("x").requires_grad_()

    def y(x):
        return mix(x, **inputs, scale=3.0)[0]

    # The scratch row is float32, which a small step would drown in; y is linear, so a large one will do.
    assert torch.autograd.gradcheck(y, x, eps=1.0, atol=1e-6)


@prototype.row_kernel(
    "test_rows::scaled_norm", "x[T, D], power: float = 2.0 -> y[T, D]: x, total[T]: float"
)
def scaled_norm(x, power, y, total):
    """``total = sum |x|^power``, ``y = x * total``."""
    total[0] = 0.0
    for d in range(len(x)):
        total[0] += abs(x[d]) ** power
    for d in range(len(x)):
        y[d] = x[d] * total[0]


@scaled_norm.backward
def scaled_norm_backward(x, power, total, grad_y, grad_total, grad_x):
    """Sums over the row first, as the gradient of ``total`` reaches every element."""
    inner = grad_total
    for d in range(len(x)):
        inner += grad_y[d] * x[d]
    for d in range(len(x)):
        sign = 1.0 if x[d] > 0 else -1.0
        grad_x[d] = grad_y[d] * total + inner * power * abs(x[d]) ** (power - 1) * sign


def test_signature_of_a_backward_rule():
    assert scaled_norm_backward.signature.schema("f") == (
        "f(Tensor x, float power, Tensor total, Tensor grad_y, Tensor grad_total) -> Tensor"
    )


def test_backward_rule(device):
    x = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scaled_norm(x, power=3.0), x)
    # One output without a gradient: its place is taken by zeros.
    _, total = scaled_norm(x)
    (grad,) = torch.autograd.grad(total.sum(), x)
    assert_close(grad, 2 * x, torch.float64, "gradient of the sum of squares")
    torch.library.opcheck(scaled_norm.overload, (x, 3.0))
    (grad,) = torch.autograd.grad(scaled_norm(x)[1].sum(), x, create_graph=True)
    with pytest.raises(
        NotImplementedError, match="scaled_norm_backward: the op must have a gradient"
    ):
        grad.sum().backward()


@pytest.mark.parametrize("score", scores.SCORES)
def test_score_gradients(score):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 2, 4], [1, -1, 3], [-1, -1, -1], [4, 3, 2], [0, 1, 2], [2, -1, -1]])
    grad = torch.randn(6, 3, dtype=torch.float64)
    weights = gates_prototypes.score_weights(score, logits, ids, 1.5)
    assert torch.equal(weights[ids < 0], torch.zeros_like(weights[ids < 0]))
    (expected,) = torch.autograd.grad(weights, logits, grad)
    assert_close(
        scores.logits_gradient(score, grad, logits, ids, 1.5), expected, torch.float64, score
    )


def best_rule(logits, top_k, scale, ids, weights):
    """The parameters in another order than the signature's."""
    for k in range(top_k):
        best = -1
        for e in range(len(logits)):
            taken = False
            for j in range(k):
                taken = taken or ids[j] == e
            if not taken and (best < 0 or logits[e] > logits[best]):
                best = e
        ids[k] = best
        weights[k] = max(logits[best], 0.0) * scale


relu_route = prototype.route(
    "test_rows::relu_route", "scale: float = 2.0", score="relu", scale="scale"
)(best_rule)


def test_route_end_to_end(device):
    """One op through gradcheck twice, opcheck, one dynamic graph with gradients, and export."""
    exact = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: relu_route(x, 2, 3.0)[0], exact)
    logits = torch.randn(5, 4, device=device, requires_grad=True)
    torch.library.opcheck(relu_route.overload, (logits, 2))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def loss(x):
        weights, ids = relu_route(x, top_k=2)
        return (weights * ids).sum(), ids

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for T in (5, 9, 2, 0):
        grads = []
        for function in (loss, compiled):
            x = torch.linspace(-1, 2, T * 4, device=device).view(T, 4).requires_grad_()
            if function is compiled:
                torch._dynamo.decorators.mark_unbacked(x, 0)
            total, ids = function(x)
            total.backward()
            grads.append((total.detach(), ids, x.grad))
        for actual, expected in zip(*grads, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1

    class Model(torch.nn.Module):
        def forward(self, x):
            return relu_route(x, 2)

    tokens = torch.export.Dim("tokens", max=64)
    program = torch.export.export(
        Model(), (logits.detach(),), dynamic_shapes=({0: tokens},), strict=True
    )
    x = torch.randn(9, 4, device=device)
    torch.testing.assert_close(program.module()(x), relu_route(x, 2))


def test_inspect():
    x = torch.randn(2, 4)
    assert "define" in prototype.inspect(relu_route, "llvm", x, 2)
    assert ".globl" in prototype.inspect(relu_route, "asm", x, 2)
    source = prototype.inspect(relu_route, "source")
    assert "__rule(logits[__t], top_k, scale, ids[__t], weights[__t])" in source
    with pytest.raises(ValueError, match=r"what must be one of .* got 'cubin'"):
        prototype.inspect(relu_route, "cubin")


def test_bench(capsys):
    rows = prototype.bench(
        relu_route, torch.randn(8, 4), 2, against={"itself": relu_route}, seconds=0.01
    )
    assert [row.name for row in rows] == ["test_rows::relu_route", "itself"]
    assert all(row.host > 0 and row.device is None for row in rows)
    printed = capsys.readouterr().out
    assert "test_rows::relu_route" in printed
    assert "ratio to last" in printed


def test_names_that_generated_code_could_use(device):
    @prototype.row_kernel("test_rows::names", "t[T, E], rule: int, loop[E] -> cuda[T, E]: t")
    def kernel(t, rule, loop, cuda):
        for e in range(len(t)):
            cuda[e] = rule * t[e] + loop[e]

    t, loop = torch.randn(3, 4, device=device), torch.randn(4, device=device)
    torch.testing.assert_close(kernel(t, 3, loop), 3 * t + loop)
