"""Every gate class of the library, for what all of them must do, and one that is not of the library."""

from __future__ import annotations

import torch

import moeops.gates
from moeops.gates import BaseGate, RouterLinear, balance_loss, router_logits

CLASSES = [
    gate
    for name in moeops.gates.__all__
    if isinstance(gate := getattr(moeops.gates, name), type)
    and issubclass(gate, BaseGate)
    and gate is not BaseGate
]
# Without an option the default of these gates leaves out a part of what they do.
OPTIONS = {
    "DeepSpeedGate": {"noisy_gate_policy": "Jitter"},
    "ForcedBalanceGate": {"gate": moeops.gates.NaiveGate},
    "HashGate": {"key": "feature"},
    "SAMGate": {"num_groups": 2},
    "TutelGate": {"gate_noise": 1.0, "balance": "load"},
}


def make_gate(cls: type[BaseGate], d_model: int, num_expert: int) -> BaseGate:
    """A gate with its own ``top_k``, on one rank."""
    return cls(d_model, num_expert, **OPTIONS.get(cls.__name__, {}))


class OwnGate(BaseGate):
    """The example of docs/gates.md."""

    def __init__(self, d_model, num_expert, world_size, top_k=2):
        super().__init__(num_expert, world_size)
        self.top_k = top_k
        self.router = RouterLinear(d_model, self.tot_expert, bias=False)

    def forward(self, x):
        scores = torch.sigmoid(router_logits(x, self.router))
        topk_weights, topk_ids = scores.topk(self.top_k)
        self.set_loss(balance_loss(scores / scores.sum(-1, keepdim=True), topk_ids))
        return topk_ids, topk_weights
