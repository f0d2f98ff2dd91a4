"""Gates: which experts a token goes to. Subclass ``BaseGate`` in plain PyTorch to write another one."""

from moeops.gates.base import BaseGate, auxiliary_loss
from moeops.gates.deepseek import DeepSeekV3Gate
from moeops.gates.functional import expert_capacity, expert_loads, router_logits
from moeops.gates.gshard import GShardGate
from moeops.gates.naive import NaiveGate
from moeops.gates.noisy import NoisyGate
from moeops.gates.switch import SwitchGate
from moeops.gates.topk import GptOssGate, MixtralGate, Qwen3Gate, TopKGate
from moeops.losses import balance_loss

__all__ = [
    "BaseGate",
    "DeepSeekV3Gate",
    "GShardGate",
    "GptOssGate",
    "MixtralGate",
    "NaiveGate",
    "NoisyGate",
    "Qwen3Gate",
    "SwitchGate",
    "TopKGate",
    "auxiliary_loss",
    "balance_loss",
    "expert_capacity",
    "expert_loads",
    "router_logits",
]
