"""A watched model, and what its monitor must say."""

from __future__ import annotations

import torch
from torch import nn

from moeops import FMoETransformerMLP
from moeops.gates import NaiveGate, SwitchGate

D, E = 8, 4


def layer_with(gate, top_k=2):
    return FMoETransformerMLP(E, D, 12, top_k=top_k, gate=gate)


class Model(nn.Module):
    """Two layers with different gates, one of which drops."""

    def __init__(self):
        super().__init__()
        self.first = layer_with(NaiveGate)
        self.second = layer_with(lambda *a: SwitchGate(*a, capacity=0.5, switch_eps=0.0), 1)

    def forward(self, x):
        return self.second(self.first(x))


def straight_line(model, batches):
    """Loads, tokens and empty slots of both layers, counted in Python."""
    want = {
        n: {"loads": [0] * E, "tokens": 0, "empty": 0, "without": 0} for n in ("first", "second")
    }
    for x in batches:
        for name in want:
            layer = getattr(model, name)
            ids = layer.gate(x)[0].tolist()
            x = layer(x)
            for row in ids:
                want[name]["tokens"] += 1
                want[name]["without"] += all(i < 0 for i in row)
                for i in row:
                    if i < 0:
                        want[name]["empty"] += 1
                    else:
                        want[name]["loads"][i] += 1
    return want


def assert_counts(summary, want, forwards):
    assert list(summary) == list(want)
    for name, load in summary.items():
        assert load.loads.tolist() == want[name]["loads"]
        assert load.loads.dtype == torch.float64
        assert load.loads.device.type == "cpu"
        assert load.tokens == want[name]["tokens"]
        assert load.empty == want[name]["empty"]
        assert load.slots == sum(want[name]["loads"]) + want[name]["empty"]
        assert load.without_expert == want[name]["without"]
        assert load.forwards == forwards


def make_batches(device="cpu", sizes=(7, 0, 12)):
    return [torch.randn(size, D, device=device) for size in sizes]
