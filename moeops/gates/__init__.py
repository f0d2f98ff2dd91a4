"""Gates: which experts a token goes to. Subclass ``BaseGate`` in plain PyTorch to write another one."""

from moeops.gates.base import BaseGate, auxiliary_loss, update_gates, with_losses
from moeops.gates.base_assignment import BASEGate, balanced_assignment
from moeops.gates.dc import DCGate
from moeops.gates.deepseek import DeepSeekV3Gate
from moeops.gates.deepspeed import DeepSpeedGate
from moeops.gates.dense_to_sparse import DenseToSparseGate
from moeops.gates.expert_choice import ExpertChoiceGate
from moeops.gates.faster import FasterGate, gen_faster_gate
from moeops.gates.forced_balance import ForcedBalanceGate
from moeops.gates.functional import (
    RouterLinear,
    apply_capacity,
    expert_capacity,
    router_logits,
)
from moeops.gates.gshard import GShardGate
from moeops.gates.hash import HashGate, token_ids
from moeops.gates.injected_loss import inject_auxiliary_loss
from moeops.gates.ktop1 import KTop1Gate
from moeops.gates.llama4 import Llama4Gate
from moeops.gates.naive import NaiveGate
from moeops.gates.noisy import NoisyGate
from moeops.gates.recording import add_up
from moeops.gates.remoe import ReMoEGate, update_coefficients
from moeops.gates.sam import SAMGate
from moeops.gates.sigmoid import SigmoidGate
from moeops.gates.soft import SoftMoEGate
from moeops.gates.swipe import SwipeGate
from moeops.gates.switch import SwitchGate
from moeops.gates.threshold import ThresholdGate
from moeops.gates.topk import GptOssGate, MixtralGate, Qwen3Gate, TopKGate
from moeops.gates.tutel import TutelGate
from moeops.gates.xmoe import XMoEGate
from moeops.gates.zero import ZeroGate
from moeops.losses import balance_loss

__all__ = [
    "BASEGate",
    "BaseGate",
    "DCGate",
    "DeepSeekV3Gate",
    "DeepSpeedGate",
    "DenseToSparseGate",
    "ExpertChoiceGate",
    "FasterGate",
    "ForcedBalanceGate",
    "GShardGate",
    "GptOssGate",
    "HashGate",
    "KTop1Gate",
    "Llama4Gate",
    "MixtralGate",
    "NaiveGate",
    "NoisyGate",
    "Qwen3Gate",
    "ReMoEGate",
    "RouterLinear",
    "SAMGate",
    "SigmoidGate",
    "SoftMoEGate",
    "SwipeGate",
    "SwitchGate",
    "ThresholdGate",
    "TopKGate",
    "TutelGate",
    "XMoEGate",
    "ZeroGate",
    "add_up",
    "apply_capacity",
    "auxiliary_loss",
    "balance_loss",
    "balanced_assignment",
    "expert_capacity",
    "gen_faster_gate",
    "inject_auxiliary_loss",
    "router_logits",
    "token_ids",
    "update_coefficients",
    "update_gates",
    "with_losses",
]
