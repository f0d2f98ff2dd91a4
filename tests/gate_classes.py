"""Every gate class of the library, for what all of them must do."""

from __future__ import annotations

import moeops.gates
from moeops.gates import BaseGate

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
