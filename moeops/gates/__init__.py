"""Gates: which experts a token goes to. Subclass ``BaseGate`` in plain PyTorch to write another one."""

from moeops.gates.base import BaseGate
from moeops.gates.functional import balance_loss, expert_capacity, router_logits
from moeops.gates.gshard import GShardGate
from moeops.gates.naive import NaiveGate
from moeops.gates.switch import SwitchGate

__all__ = [
    "BaseGate",
    "GShardGate",
    "NaiveGate",
    "SwitchGate",
    "balance_loss",
    "expert_capacity",
    "router_logits",
]
