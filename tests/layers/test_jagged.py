"""Sequences of different lengths as nested tensors: the layer of all their tokens, jagged again."""

from __future__ import annotations

import pytest
import torch
from layer_cases import GATES, D, E, make_layer
from torch import nn

from moeops import FMoE, FMoETransformerMLP

LENGTHS = (3, 0, 5, 1)


def jagged(*shape, lengths=LENGTHS):
    parts = [torch.randn(length, *shape) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


def check(layer, run, x, mask=None, flat_mask=None):
    """Values, offsets and gradients of ``run(x, mask)`` against the layer on the values."""
    torch.manual_seed(3)
    y = run(x, mask)
    (got,) = torch.autograd.grad(y.values().square().sum(), x)
    layer.gate.get_loss()
    values = x.detach().values().clone().requires_grad_()
    torch.manual_seed(3)
    want = layer(values, flat_mask)
    (want_grad,) = torch.autograd.grad(want.square().sum(), values)
    layer.gate.get_loss()
    torch.testing.assert_close(y.values(), want)
    torch.testing.assert_close(got.values(), want_grad)
    assert (
        y.shape == x.shape
    )  # the ragged dimension is the same one, so that a residual can be added
    assert (x + y).shape == x.shape


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kind", ["mlp", "composed"])
def test_values_and_gradients(kind, gate):
    layer = make_layer(kind, gate)
    check(layer, layer, jagged(D))


def test_more_dimensions_and_masks():
    layer = make_layer("mlp", "naive", mask_dict={1: 2.0})
    check(layer, layer, jagged(2, D))
    x = jagged(D)
    flat = torch.tensor([0, 1, 0, 0, 2, 0, 1, 0, 0])
    mask = torch.nested.nested_tensor_from_jagged(flat, offsets=x.offsets())
    check(layer, layer, x, mask, flat)
    check(layer, layer, x, flat, flat)


def test_compiled(fresh_dynamo):
    layer = make_layer("mlp", "gshard").eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (2, 4, 4, 1), (1, 2, 9, 6)):
        check(layer, compiled, jagged(D, lengths=lengths))


def test_a_block_of_torch_around_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(D), FMoETransformerMLP(E, D, 16)

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    block, x = Block(), jagged(D)
    y = block(x)
    values = x.detach().values()
    torch.testing.assert_close(y.values(), block(values))
    y.values().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_other_nested_tensors_are_refused_by_name():
    layer = FMoETransformerMLP(E, D, 16)
    with pytest.raises(
        NotImplementedError, match=r"layout torch.jagged if it is nested, got .*torch.strided"
    ):
        layer(torch.nested.nested_tensor([torch.randn(3, D), torch.randn(2, D)]))
    with pytest.raises(
        NotImplementedError, match=r"sequences in dimension 1 .* got the shape \(4, 8, j"
    ):
        layer(jagged(D).transpose(1, 2))
    with pytest.raises(ValueError, match="inp must have size d_model"):
        layer(jagged(D + 1))
    x = torch.nested.nested_tensor_from_jagged(
        torch.randn(10, D), offsets=torch.tensor([0, 4, 8]), lengths=torch.tensor([2, 3])
    )
    with pytest.raises(NotImplementedError, match="no holes between its sequences"):
        layer(x)
    with pytest.raises(
        NotImplementedError, match=r"moe_inp must hold tensors \[T, ...\], got a nested"
    ):
        FMoE(2, D, expert=lambda d: nn.Linear(d, d))(jagged(D))
