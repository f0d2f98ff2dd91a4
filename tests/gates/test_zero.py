"""ZeroGate: everything goes to expert 0."""

from __future__ import annotations

import pytest
import torch
from gate_checks import D, check_compile, check_export

from cases import each
from moeops import FMoE, FMoETransformerMLP
from moeops.gates import ZeroGate


@each("k", [1, 2, 5])
@each("T", [0, 1, 7])
def test_shape_and_values(T, k, dtype, device):
    gate = ZeroGate(D, 3, 2, k).to(device)
    ids, weights = gate(torch.randn(T, D, device=device).to(dtype))
    assert ids.shape == weights.shape == (T, k)
    assert ids.dtype == torch.int64
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ids.device == weights.device == torch.empty(0, device=device).device
    assert bool((ids == 0).all())
    assert bool((weights == torch.tensor(1 / k, dtype=weights.dtype)).all())
    assert not gate.has_loss
    assert not list(gate.parameters())


@pytest.mark.parametrize("k", [1, 2])
def test_the_layer_is_its_first_expert(k):
    layer = FMoE(3, D, top_k=k, gate=ZeroGate, expert=lambda d_model: torch.nn.Linear(d_model, 4))
    x = torch.randn(6, D)
    torch.testing.assert_close(layer(x), layer.experts[0](x))


def test_compile(device):
    check_compile(ZeroGate, device, "aot_eager")


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, device):
    check_export(ZeroGate, device, strict, training=True)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"ZeroGate: top_k must be at least 1, got 0"):
        ZeroGate(D, 4, 1, 0)
    with pytest.raises(TypeError, match=r"ZeroGate: top_k must be an int, got 1\.5"):
        ZeroGate(D, 4, 1, 1.5)
    with pytest.raises(ValueError, match=r"ZeroGate: num_expert must be at least 1, got 0"):
        FMoETransformerMLP(4, D, 8, gate=lambda *args: ZeroGate(D, 0))
