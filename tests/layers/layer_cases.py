"""Layers of every kind with every gate, small enough for a compiler to take seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeops import FMoE, FMoETransformerMLP
from moeops.gates import GShardGate, NaiveGate, SwitchGate

D, H, E = 8, 12, 4

# A capacity that drops some pairs, and enough jitter to be seen.
GATES = {
    "naive": (2, NaiveGate),
    "switch": (1, lambda *args: SwitchGate(*args, capacity=(1.0, 1.5), switch_eps=0.2)),
    "gshard": (2, lambda *args: GShardGate(*args, capacity=(0.9, 1.5))),
}
LAYERS = ("mlp", "composed", "modules")
TOKENS = (5, 6, 7, 9, 12, 3, 17, 33, 1, 0)


class ScaledTanh(nn.Module):
    """An activation with a parameter and without a fused kernel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)


def different_experts(d_in: int = D, d_out: int = D) -> list:
    """One expert of each way to give it; the last two are the same class of module."""
    return [
        nn.Linear(d_in, d_out),
        nn.Sequential(nn.Linear(d_in, H), nn.GELU(), nn.Linear(H, d_out)),
        lambda d_model: nn.Linear(d_model, d_out, bias=False),
        lambda d_model: nn.Linear(d_model, d_out),
    ]


def make_layer(kind: str, gate, device: str = "cpu", **options) -> FMoE:
    """Build a layer ``D -> D`` with ``E`` experts and a gate from ``GATES``, or another one for two experts."""
    top_k, build = GATES[gate] if isinstance(gate, str) else (2, gate)
    options = {"top_k": top_k, "gate": build, **options}
    if kind == "modules":
        return FMoE(E, D, expert=different_experts(), **options).to(device)
    activation = ScaledTanh() if kind == "composed" else "swiglu"
    return FMoETransformerMLP(E, D, H, activation=activation, **options).to(device)


def run(layer: nn.Module, gate: nn.Module, x: Tensor, seed: int = 7) -> dict[str, Tensor]:
    """Forward and backward with an auxiliary loss: the output, the loss and every gradient, by name."""
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    total = y.to(torch.promote_types(y.dtype, torch.float32)).square().sum()
    results = {"y": y.detach()}
    loss = gate.get_loss()
    if loss is not None:
        total = total + 0.5 * loss
        results["loss"] = loss.detach()
    total.backward()
    results["x"] = x.grad
    for name, parameter in layer.named_parameters():
        results[name.removeprefix("_orig_mod.")] = parameter.grad
    return results


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol=1e-5, atol=1e-6
) -> None:
    """Same names, and numbers that differ by no more than a changed order of sums explains."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] is not None, f"{name} has no gradient"
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
