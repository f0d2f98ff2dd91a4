"""What the tests of ``fmoe`` compute by hand. T tokens, K experts per token, E experts, D model width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

D, H = 6, 10


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
