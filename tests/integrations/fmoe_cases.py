"""What the tests of ``fmoe`` import and compute by hand. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import moeops.integrations.fmoe as stand_in
from moeops.integrations.fmoe import _settings

D, H = 6, 10


@contextmanager
def imported(**options: Any) -> Iterator[ModuleType]:
    """``import fmoe`` as a program does it after ``install`` with these options; undone at the end."""
    before, finders = dict(sys.modules), list(sys.meta_path)
    stand_in.install(**options)
    try:
        yield importlib.import_module("fmoe")
    finally:
        for name in sys.modules.keys() - before.keys():
            if name.split(".")[0] == "fmoe":
                del sys.modules[name]
        sys.meta_path[:] = finders
        _settings.set_compat(False)


class Expert(nn.Module):
    """An expert as FastMoE 1.x calls it: rows, and how many these are."""

    def __init__(self, d_model):
        super().__init__()
        self.up = nn.Linear(d_model, H)
        self.down = nn.Linear(H, d_model)

    def forward(self, inp, count):
        if not torch.compiler.is_compiling():
            assert inp.shape[0] == int(count)
        return self.down(torch.relu(self.up(inp)))


def by_hand(x: Tensor, ids: Tensor, scores: Tensor, experts: list) -> Tensor:
    """Sum over each token's experts, one token and one choice at a time; an expert takes one row."""
    rows = []
    for token, chosen, weights in zip(x, ids, scores, strict=True):
        parts = [
            weight * experts[int(e)](token[None])[0]
            for e, weight in zip(chosen, weights, strict=True)
            if int(e) >= 0
        ]
        rows.append(sum(parts) if parts else token * 0)
    return torch.stack(rows)


def mlps(layer) -> list:
    """The experts of ``FMoETransformerMLP`` with GELU, one function each."""
    w = layer.experts

    def expert(e):
        def run(row):
            hidden = nn.functional.gelu(row @ w.w_up[e].T + w.b_up[e])
            return hidden @ w.w_down[e].T + w.b_down[e]

        return run

    return [expert(e) for e in range(len(w))]


def assert_same(actual, expected, dtype=torch.float64):
    tolerance = {
        torch.float64: 1e-10,
        torch.float32: 1e-5,
        torch.bfloat16: 3e-2,
        torch.float16: 5e-3,
    }
    bound = tolerance[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound)
