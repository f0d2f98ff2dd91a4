"""What prototype authors get wrong: every message names the rule, its file and line, or the offending value."""

from __future__ import annotations

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from numba_prototypes import require_numba

require_numba()

import moeops.numba as prototype
from moeops.numba.gates import naive_topk, top_p
from moeops.reference import gates_prototypes

LOGITS = torch.tensor([[0.5, 2.0, 1.0], [3.0, -1.0, 0.0]])


def zeros(logits, weights, ids, top_k):
    for k in range(top_k):
        weights[k] = 0.0
        ids[k] = k


def here(function):
    code = function.__code__
    return rf"{function.__name__} \(.*test_prototype_errors\.py:{code.co_firstlineno}\)"


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("x[T, D]", "must have one '->'"),
        ("x[T] -> y[T]", "output dimensions and a type, got 'y\\[T\\]'"),
        ("x[T] -> y: x", "output dimensions and a type, got 'y: x'"),
        ("n: int -> y[n]: float32", "must name an input tensor"),
        ("x[] -> y[T]: x", "at least one dimension, got 'x\\[\\]'"),
        ("x[T]: str -> y[T]: x", "one of the kinds"),
        ("x[T], s: text -> y[T]: x", "one of the types"),
        ("x[T], s -> y[T]: x", "one of the types"),
        ("x[T], s: int = 1.5 -> y[T]: x", "a int default, got 's: int = 1.5'"),
        ("x[T], x[T] -> y[T]: x", "a name once, got 'x' twice"),
        ("x[T] -> y[T, D]: x", "sizes of its inputs, got 'D' in 'D'"),
        ("x[T] -> y[T ** 2]: x", "sizes made of names, whole numbers"),
        ("x[T] -> y[T, f(1)]: x", "sizes made of names, whole numbers"),
        ("x[T] -> ids[T]: int64, y[T]: x", "float outputs before others"),
        ("x[T] -> y[T]: z", "y a type out of .* got 'z'"),
        ("x[T], w[D] -> y[D]: x", "the rows 'T' as first dimension, got 'D'"),
        ("x[T] -> _y[T]: x", "must have an output"),
        ("x(T) -> y[T]: x", "items like 'x\\[T, D\\]', got 'x\\(T\\)'"),
    ],
)
def test_signatures(signature, message):
    with pytest.raises(ValueError, match=f"bad::op: signature .*{message}"):
        prototype.row_kernel("bad::op", signature)


def test_parameters():
    def too_few(logits, weights, ids):
        pass

    def too_many(logits, weights, ids, top_k, bias):
        pass

    def default(logits, weights, ids, top_k=2):
        pass

    for function, message in (
        (too_few, r"\(logits, weights, ids\); missing: top_k"),
        (too_many, "not in the signature: bias"),
        (default, "without defaults"),
    ):
        with pytest.raises(
            TypeError, match=here(function) + f" must have the parameters .*{message}"
        ):
            prototype.route("bad::parameters")(function)
    with pytest.raises(TypeError, match="must be a plain Python function, got <built-in"):
        prototype.route("bad::parameters")(print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "tanh"}, "score must be one of .* got 'tanh'"),
        (
            {"score": "relu", "scale": "alpha"},
            "scale must be a number or name a float .* got 'alpha'",
        ),
        ({"threads": 2048}, "threads must be at most 1024, got 2048"),
        ({"require": ("top_k < F",)}, "sizes of its inputs, got 'F'"),
    ],
)
def test_options(options, message):
    with pytest.raises(
        ValueError, match=f"bad::option: {message}|bad::option: signature .*{message}"
    ):
        prototype.route("bad::option", **options)(zeros)


def test_op_names():
    first = prototype.route("bad::taken")(zeros)

    def other(logits, weights, ids, top_k):
        for k in range(top_k):
            weights[k] = 1.0
            ids[k] = k

    with pytest.raises(
        ValueError, match=f"bad::taken: .* made from {here(zeros)}, and now .*other"
    ):
        prototype.route("bad::taken")(other)
    assert float(first(LOGITS, 1)[0].sum()) == 0
    second = prototype.route("bad::taken", replace=True)(other)
    assert float(second(LOGITS, 1)[0].sum()) == 2
    assert float(torch.ops.bad.taken(LOGITS, 1)[0].sum()) == 2
    for name in ("nocolons", "a b::c", "moeops::mine"):
        with pytest.raises(ValueError, match=r"op name must be|namespace must be your own"):
            prototype.route(name)(zeros)


def test_unsupported_python():
    def uses_torch(logits, weights, ids, top_k):
        weights[0] = torch.softmax(logits, 0)[0]

    op = prototype.route("bad::unsupported")(uses_torch)
    line = uses_torch.__code__.co_firstlineno + 1
    with pytest.raises(
        prototype.RuleError, match=rf"(?s){here(uses_torch)} must compile under Numba.*line {line}"
    ):
        op(LOGITS, 1)


def test_out_of_bounds_under_the_debug_switch():
    def writes_past_the_end(logits, weights, ids, top_k):
        for k in range(top_k):
            weights[k] = 0.0
            ids[k + (1 if logits[0] > 1 else 0)] = 0

    op = prototype.route("bad::bounds")(writes_past_the_end)
    assert op.debug is False
    op.debug = True
    with pytest.raises(
        prototype.RuleError,
        match=f"{here(writes_past_the_end)} must not raise, got IndexError in row 1",
    ):
        op(LOGITS, 1)


def test_check_finds_what_is_never_written():
    def forgets(logits, weights, ids, top_k):
        for k in range(top_k):
            weights[k] = 1.0
            if logits[0] < 3:
                ids[k] = k

    op = prototype.route("bad::forgets")(forgets)
    with pytest.raises(
        prototype.CheckError, match=rf"ids must be written .* got none at \[1, 0\].*{here(forgets)}"
    ):
        prototype.check(op, naive_reference, [{"logits": LOGITS, "top_k": 1}])


def naive_reference(logits, top_k):
    return torch.ones(logits.shape[0], top_k), torch.arange(top_k).expand(logits.shape[0], top_k)


def test_check_reports_the_first_row_that_differs():
    def second_best(logits, weights, ids, top_k):
        for k in range(top_k):
            weights[k] = 1.0
            ids[k] = 2 if logits[0] > 1 and k == 1 else k

    op = prototype.route("bad::second_best")(second_best)
    with pytest.raises(prototype.CheckError) as caught:
        prototype.check(op, naive_reference, [{"logits": LOGITS, "top_k": 2}])
    text = str(caught.value)
    assert (
        "ids must equal the reference's, got the first difference in row 1 at [1, 1]: 2 instead of 1"
        in text
    )
    assert "row 1 of the op:        [0, 2]" in text
    assert "test_prototype_errors.py" in text


def test_check_compares_gradients():
    def biased(logits, weights, ids, top_k):
        for k in range(top_k):
            weights[k] = 1.0 / (1.0 + math.exp(-logits[k]))
            ids[k] = k

    op = prototype.route("bad::gradient", score="relu")(biased)

    def truth(logits, top_k):
        weights = torch.sigmoid(logits[:, :top_k])
        return weights, torch.arange(top_k).expand_as(weights)

    with pytest.raises(
        prototype.CheckError, match="the gradient of logits must equal the reference's"
    ):
        prototype.check(op, truth, [{"logits": LOGITS, "top_k": 2}])


def test_calls():
    for call, error, message in (
        (
            lambda: naive_topk(LOGITS[0], 1),
            ValueError,
            "logits must have 2 dimensions, got torch.float32 \\[3\\]",
        ),
        (
            lambda: naive_topk(LOGITS.long(), 1),
            TypeError,
            "logits must be float64.*got torch.int64",
        ),
        (
            lambda: naive_topk(LOGITS, 4),
            ValueError,
            "top_k must meet 1 <= top_k <= E, got top_k = 4, E = 3",
        ),
        (
            lambda: naive_topk(LOGITS / 0, 1),
            RuntimeError,
            "logits must be finite, got NaN or infinity in row [01]",
        ),
        (lambda: naive_topk.bind(LOGITS), TypeError, "a call must have the arguments"),
    ):
        with pytest.raises(error, match=f"moeops_numba::naive_topk: {message}"):
            call()
    with pytest.raises(
        ValueError, match=r"first must have size 3|y must have size 3 in dimension 1"
    ):
        pair(LOGITS, LOGITS[:, :2])
    with pytest.raises(RuntimeError, match="NUMBA_ENABLE_CUDASIM must be 1"):
        naive_topk.simulate(LOGITS, 1)
    bad = torch.empty(2, 3, device="meta")
    with pytest.raises((ValueError, RuntimeError), match="y must have size"):
        pair(bad, torch.empty(2, 2, device="meta"))


@prototype.row_kernel("bad::pair", "x[T, D], y[T, D] -> z[T, D]: x")
def pair(x, y, z):
    for d in range(len(x)):
        z[d] = x[d] + y[d]


def test_gradients_that_are_missing_or_doubled():
    x = LOGITS.clone().requires_grad_()
    with pytest.raises(
        NotImplementedError, match=f"bad::pair: .* got none for {here(pair.rule.function)}"
    ):
        pair(x, LOGITS).sum().backward()
    with pytest.raises(ValueError, match="the gradient must be given once"):
        naive_topk.gradient(lambda grads, inputs, outputs: {})
    with pytest.raises(ValueError, match=r"saves must name tensors out of .* got \['w'\]"):
        pair.gradient(saves=("w",))(lambda grads, inputs, outputs: {})

    @prototype.row_kernel("bad::whole", "x[T, D], w[D] -> y[T, D]: x")
    def whole(x, w, y):
        for d in range(len(x)):
            y[d] = x[d] * w[d]

    def to_whole(x, w, grad_y, grad_w):
        pass

    def to_nothing(x, grad_y):
        pass

    def unknown(x, grad_y, grad_z):
        pass

    def untyped(grad_y, grad_x):
        pass

    for rule, error, message in (
        (to_whole, ValueError, "gradients of row tensors only, got grad_w"),
        (to_nothing, ValueError, "a parameter grad_<input> to write"),
        (unknown, TypeError, "parameters out of .* got 'grad_z'"),
        (untyped, TypeError, "also have the parameter 'x'"),
    ):
        with pytest.raises(
            error, match=f"bad::whole_backward: rule .*{here(rule)} must .*{message}"
        ):
            whole.backward(rule)


def test_block_kernels():
    def kernel(x, y):
        pass

    for options, message in (
        ({"grid": lambda M: M}, "grid must be a function of sizes out of \\['N'\\], got \\['M'\\]"),
        ({"grid": "many"}, "grid must be 1 to 3 whole numbers"),
    ):
        with pytest.raises(ValueError, match=f"bad::block: {message}"):
            prototype.block_kernel("bad::block", "x[N] -> y[N]: x", **options)(kernel)
    op = prototype.block_kernel("bad::block", "x[N] -> y[N]: x", grid=1)(kernel)
    with pytest.raises(NotImplementedError, match=f"bad::block: .* got cpu, .*{here(kernel)}"):
        op(torch.ones(2))
    op.cpu(lambda x: x + 1)
    assert op(torch.ones(2)).tolist() == [2, 2]
    with pytest.raises(ValueError, match="cpu must be given once"):
        op.cpu(lambda x: x)


def test_gates():
    with pytest.raises(TypeError, match=r"op must be made with moeops\.numba\.route"):
        prototype.as_gate(pair)
    with pytest.raises(ValueError, match=r"options must be numbers .* got \['speed'\]"):
        prototype.as_gate(top_p, speed=1.0)
    with pytest.raises(ValueError, match=r"inputs must have a function for each of \[\]"):
        prototype.as_gate(top_p, inputs={"bias": lambda gate, logits: logits})
    gate = prototype.as_gate(top_p, mass=0.5)
    assert gate(4, 3, 1).options == {"mass": 0.5, "margin": 0.0}
    with pytest.raises(TypeError, match="TopPGate: the numbers"):
        gate(4, 3, 1, speed=1.0)
    with pytest.raises(ValueError, match="top_k must be at most the 3 experts, got 4"):
        gate(4, 3, 1, top_k=4)
    with pytest.raises(ValueError, match="got None for an op with other tensors"):
        prototype.check(pair, gates_prototypes.top_p)


def test_tangents_are_refused_and_not_dropped():
    def weights(logits):
        return naive_topk(logits, top_k=2)[0]

    with pytest.raises(NotImplementedError, match=r"naive_topk: arguments must have no tangent"):
        torch.func.jvp(weights, (LOGITS,), (torch.ones_like(LOGITS),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no tangent"):
        weights(forward_ad.make_dual(LOGITS, torch.ones_like(LOGITS)))
