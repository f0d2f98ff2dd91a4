"""From an idea for a gate to a trained model, in one file and about a minute on two CPU cores.

    python examples/prototype_gate.py
    python examples/prototype_gate.py --steps 50 --out runs/prototype

The idea: a second expert only helps where the router is undecided, so take the experts whose logit lies within a margin
of the best one, at most K. The routing rule is one Python function over one token's row. It is checked against plain
PyTorch, timed against the native kernel, put into a layer, compiled, and trained beside gates that always take one or
two experts, on a task made of patches with a linear map each. Prints a table; writes it and a picture into --out.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import moeops
from moeops import FMoETransformerMLP
from moeops.gates import NaiveGate, SwitchGate, balance_loss

try:
    import moeops.numba as prototype
except ImportError as err:
    sys.exit(str(err))

PATCHES, D, EXPERTS, HIDDEN, TOKENS = 8, 16, 8, 16, 512
BALANCE = 0.01


# 1. The rule: one token's row of logits in, its weights and expert ids out.
@prototype.route("example::near_ties", "margin: float = 1.0", score="softmax_topk")
def near_ties(logits, weights, ids, top_k, margin):
    """Take the best experts within ``margin`` of the best one, at most ``top_k``, weighted by their softmax."""
    for k in range(top_k):
        weights[k] = -math.inf
        ids[k] = -1
    for e in range(len(logits)):
        if logits[e] > weights[top_k - 1]:
            k = top_k - 1
            while k > 0 and logits[e] > weights[k - 1]:
                weights[k] = weights[k - 1]
                ids[k] = ids[k - 1]
                k -= 1
            weights[k] = logits[e]
            ids[k] = e
    best = weights[0]
    total = 0.0
    for k in range(top_k):
        if best - weights[k] <= margin:
            weights[k] = math.exp(weights[k] - best)
            total += weights[k]
        else:
            weights[k] = 0.0
            ids[k] = -1
    for k in range(top_k):
        weights[k] /= total


# 2. What it should do, in PyTorch: slow is fine, obvious is better.
def near_ties_reference(logits: Tensor, top_k: int, margin: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same for all tokens at once."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    values, ids = values[:, :top_k], ids[:, :top_k]
    near = values[:, :1] - values <= margin
    weights = torch.softmax(values.masked_fill(~near, -math.inf), dim=-1)
    return weights, ids.masked_fill(~near, -1)


# 3. A gate for the layers, with a loss that keeps the experts busy.
NearTiesGate = prototype.as_gate(
    near_ties,
    margin=3.0,
    loss=lambda gate, logits, ids, weights: balance_loss(torch.softmax(logits, dim=-1), ids[:, :1]),
)


class Patches:
    """Tokens around centres, and for every centre another linear map: what one small network cannot fit."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.centres = torch.randn(PATCHES, D, generator=generator) * 2
        self.maps = torch.randn(PATCHES, D, D, generator=generator) / D**0.5
        self.generator = generator

    def batch(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets ``[T, D]``; near a border a target is a mixture of two maps."""
        which = torch.randint(0, PATCHES, (TOKENS,), generator=self.generator)
        x = self.centres[which] + torch.randn(TOKENS, D, generator=self.generator)
        share = torch.softmax(-torch.cdist(x, self.centres).square() / 4, dim=-1)  # [T, patches]
        return x, torch.einsum("tp,pij,tj->ti", share, self.maps, x)


def build(gate: Callable[..., nn.Module], top_k: int) -> nn.Module:
    """A layer of experts that sees the tokens, with the gate in question."""
    torch.manual_seed(1)
    return FMoETransformerMLP(EXPERTS, D, HIDDEN, activation="swiglu", top_k=top_k, gate=gate)


def train(name: str, layer: nn.Module, steps: int) -> dict[str, object]:
    """Train compiled, then measure what the gate does on fresh tokens."""
    data = Patches()
    compiled = torch.compile(layer, fullgraph=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    begin = 0.0
    for step in range(steps):
        if step == 1:
            begin = time.perf_counter()  # the first step compiles
        x, target = data.batch()
        error = (compiled(x) - target).square().mean()
        (error + BALANCE * moeops.auxiliary_loss(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(error.item())
    seconds = time.perf_counter() - begin
    layer.eval()
    with torch.no_grad():
        x, target = data.batch()
        ids = layer.gate(x)[0]
        error = (layer(x) - target).square().mean().item()
    loads = ids[ids >= 0].bincount(minlength=EXPERTS).float()
    return {
        "gate": name,
        "error": error,
        "experts_per_token": float((ids >= 0).sum(1).float().mean()),
        "max_load": float(loads.max() / loads.mean()),
        "step_ms": 1e3 * seconds / max(1, steps - 1),
        "losses": losses,
    }


def table(results: list[dict[str, object]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| gate | error | experts per token | max / mean load | ms per step |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['gate']} | {r['error']:.4f} | {r['experts_per_token']:.2f} | {r['max_load']:.2f} | "
            f"{r['step_ms']:.1f} |"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, object]], path: Path) -> None:
    """Error by step, and the experts per token it took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for r in results:
        losses = torch.tensor(r["losses"])
        window = max(1, len(losses) // 50)
        left.plot(losses.unfold(0, window, 1).mean(1), label=r["gate"])
    left.set(xlabel="step", ylabel="error", yscale="log", title="Training")
    left.legend()
    names = [str(r["gate"]).replace(" (", "\n(") for r in results]
    right.bar(names, [r["experts_per_token"] for r in results])
    right.set(ylabel="experts per token", title="Cost")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Check, time, train, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="training steps [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/prototype_gate"))
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps must be at least 2, got {args.steps}")
    args.out.mkdir(parents=True, exist_ok=True)

    print("Is the rule right? moeops.numba.check compares it with the reference.")
    print(prototype.check(near_ties, near_ties_reference))

    print("\nIs it fast enough? Against the native kernel, which takes both experts always:")
    logits = torch.randn(8192, 64)
    prototype.bench(near_ties, logits, 2, against=moeops.topk_route)

    print(f"\nIs it any good? {args.steps} steps of {TOKENS} tokens, {EXPERTS} experts:")
    results = [
        train(name, build(gate, top_k), args.steps)
        for name, gate, top_k in (
            ("near ties (at most 2)", NearTiesGate, 2),
            ("naive (always 2)", NaiveGate, 2),
            ("switch (always 1)", partial(SwitchGate, capacity=None), 1),
        )
    ]
    text = table(results)
    print(text)
    (args.out / "table.md").write_text(text + "\n")
    (args.out / "results.json").write_text(json.dumps(results))
    draw(results, args.out / "prototype_gate.png")
    print(f"\nWrote table.md, results.json and prototype_gate.png into {args.out}")


if __name__ == "__main__":
    main()
