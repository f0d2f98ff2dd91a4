"""FMoELinear against a loop over experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cases import each
from moeops import FMoELinear
from tolerances import assert_close


def loop(layer, x, counts):
    parts, begin = [], 0
    for e, count in enumerate(counts):
        bias = None if layer.bias is None else layer.bias[e]
        parts.append(F.linear(x[begin : begin + count], layer.weight[e], bias))
        begin += count
    parts.append(x.new_zeros(x.shape[0] - begin, layer.out_feat))
    return torch.cat(parts)


@each("counts_type", [torch.int64, torch.int32, torch.uint8])
@each("counts_device", ["same", "cpu"])
@each("bias", [True, False], ids=["bias", "no_bias"])
@each("counts", [[3, 0, 4], [0, 0, 0], [7, 0, 0], [1, 1, 1]], ids=str)
def test_values_and_gradients(counts, bias, counts_device, counts_type, device):
    layer = FMoELinear(3, 5, 4, bias, dtype=torch.float64, device=device)
    x = torch.randn(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    place = device if counts_device == "same" else "cpu"
    y = layer(x, torch.tensor(counts, dtype=counts_type, device=place))
    expected = loop(layer, x, counts)
    assert_close(y, expected, torch.float64)
    leaves = [x, *layer.parameters()]
    # A count of zero everywhere leaves the reference without a graph to the parameters.
    want = torch.autograd.grad(expected.square().sum(), leaves, materialize_grads=True)
    for grad, w in zip(torch.autograd.grad(y.square().sum(), leaves), want, strict=True):
        assert_close(grad, w, torch.float64)


def test_starts_like_linear():
    layer = FMoELinear(4, 100, 300)
    for tensor in (layer.weight, layer.bias):
        assert 0.097 < float(tensor.detach().abs().max()) <= 0.1
    assert FMoELinear(2, 3, 4, bias=False).bias is None
    assert FMoELinear(2, 3, 4, True, 5).rank == 5


def test_autocast(device):
    layer = FMoELinear(2, 8, 8, device=device)
    x = torch.randn(6, 8, device=device)
    counts = torch.tensor([2, 4], device=device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x, counts)
    assert y.dtype == torch.bfloat16
    assert_close(y, layer(x, counts), torch.bfloat16)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, fresh_dynamo, device):
    layer = FMoELinear(3, 5, 4, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for counts in ([3, 0, 4], [1, 2, 3]):
        x = torch.randn(7, 5, device=device)
        grads = []
        for function in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y = function(leaf, torch.tensor(counts, device=device))
            grads.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])))
        for a, b in zip(*grads, strict=True):
            assert_close(a, b, torch.float32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@each(
    ("x", "counts", "error", "match"),
    [
        (torch.randn(4, 6), [2, 2], ValueError, r"FMoELinear: inp must have size 5 .*\[4, 6\]"),
        (torch.randn(4), [2, 2], ValueError, r"FMoELinear: inp must have 2 dimensions"),
        (torch.ones(4, 5).long(), [2, 2], TypeError, r"FMoELinear: inp must be float64"),
        (
            torch.randn(4, 5),
            [2, 3],
            ValueError,
            r"FMoELinear: fwd_expert_count .* 4 rows .*got \[2, 3\]",
        ),
        (torch.randn(4, 5), [-1, 3], ValueError, r"FMoELinear: fwd_expert_count .*got \[-1, 3\]"),
        (
            torch.randn(4, 5),
            [1, 1, 1],
            ValueError,
            r"FMoELinear: fwd_expert_count must have size 2",
        ),
        (
            torch.randn(4, 5),
            [1.0, 1.0],
            TypeError,
            r"FMoELinear: fwd_expert_count must be an integer",
        ),
        (torch.randn(4, 5).double(), [2, 2], TypeError, r"weight must be torch\.float64 like rows"),
    ],
)
def test_bad_input(x, counts, error, match):
    with pytest.raises(error, match=match):
        FMoELinear(2, 5, 3)(x, torch.tensor(counts))


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (1, 1, 0)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match=r"FMoELinear: \w+ must be at least 1, got (0|-2)"):
        FMoELinear(*sizes)
