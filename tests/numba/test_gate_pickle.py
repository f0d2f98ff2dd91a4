"""Gates made by as_gate are pickled and copied with the layer that holds them, whatever the variable's name is."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from numba_prototypes import require_numba

require_numba()

import moeops
import moeops.numba as prototype
from moeops.numba.gates import top_p

Gate = prototype.as_gate(top_p, mass=0.5)
Other = prototype.as_gate(top_p, "Other", mass=0.25)


class Subclass(Gate):
    """A subclass with a name of its own."""


def through_torch(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("gate", [Gate, Other, Subclass], ids=["variable", "named", "subclass"])
def test_a_layer_comes_back(gate):
    layer = moeops.FMoETransformerMLP(4, 8, 16, top_k=2, gate=gate)
    x = torch.randn(5, 8)
    for other in (pickle.loads(pickle.dumps(layer)), through_torch(layer), copy.deepcopy(layer)):
        assert type(other.gate) is gate
        assert other.gate.options == layer.gate.options
        assert torch.equal(other(x), layer(x))
    assert pickle.loads(pickle.dumps(gate)) is gate
    assert copy.deepcopy(gate) is gate


def test_a_class_that_no_variable_holds():
    layer = moeops.FMoETransformerMLP(4, 8, 16, gate=prototype.as_gate(top_p, mass=0.5))
    with pytest.raises(TypeError, match=r"TopPGate must be a variable of the module"):
        pickle.dumps(layer)
