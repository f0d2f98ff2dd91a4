"""Parameters and tokens that are tensors of another kind: quantised weights, unknown subclasses, DTensors."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from layer_cases import D, E, ScaledTanh
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from moeops import FMoELinear, FMoETransformerMLP
from moeops.layers import _weights
from tensor_kinds import Quantised, Wrapped, wrap


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch):
    monkeypatch.setattr(_weights, "_warned", set())


@pytest.mark.parametrize("activation", ["swiglu", ScaledTanh()], ids=["fused", "composed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_quantised_experts_are_dequantised_with_one_warning(activation, compiled, fresh_dynamo):
    layer = FMoETransformerMLP(E, D, 12, activation=activation).eval().requires_grad_(False)
    plain = copy.deepcopy(layer)
    for name in ("w_up", "w_down"):
        wrapped = wrap(layer.experts, name, Quantised)
        getattr(plain.experts, name).copy_(wrapped.dequantize())
    run = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    x = torch.randn(6, D)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(x) for _ in range(2)]
    texts = [str(w.message) for w in caught if "dequantises" in str(w.message)]
    assert len(texts) == 1
    assert "w_up has the type Quantised, which no kernel reads" in texts[0]
    for y in results:
        torch.testing.assert_close(y, plain(x))


def test_one_matrix_per_expert():
    layer = FMoELinear(E, D, 3)
    plain = copy.deepcopy(layer)
    wrapped = wrap(layer, "weight", Quantised)
    with torch.no_grad():
        plain.weight.copy_(wrapped.dequantize())
    counts = torch.tensor([2, 0, 3, 1])
    x = torch.randn(6, D)
    with pytest.warns(UserWarning, match="weight has the type Quantised"):
        y = layer(x, counts)
    torch.testing.assert_close(y, plain(x, counts))


def test_other_subclasses_are_refused_by_name():
    layer = FMoETransformerMLP(E, D, 12)
    wrap(layer.experts, "w_down", Wrapped)
    with pytest.raises(
        TypeError, match=r"w_down must be a plain tensor or .* got Wrapped \[4, 8, 12\]"
    ):
        layer(torch.randn(6, D))


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_are_refused_by_name(mesh):
    layer, x = FMoETransformerMLP(E, D, 12), torch.randn(6, D)
    want = layer(x)
    tokens = distribute_tensor(x, mesh, [Shard(0)])
    with pytest.raises(
        NotImplementedError, match=r"moe_inp must be a plain tensor, .* Call .to_local\(\)"
    ):
        layer(tokens)
    torch.testing.assert_close(layer(tokens.to_local()), want)
    distribute_module(layer.experts, mesh)
    with pytest.raises(NotImplementedError, match="w_up must be a plain tensor, got a DTensor"):
        layer(x)
