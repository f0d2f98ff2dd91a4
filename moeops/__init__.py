"""Mixture-of-Experts for PyTorch in which every step is a torch op that compiles, exports and differentiates."""

import importlib
from typing import Any

from moeops import _cache_key, _extension

_extension.load()
_cache_key.tag_caches()

from moeops import (
    dispatch,
    distributed,
    gates,
    layers,
    losses,
)
from moeops.comm import all_to_all_rows, exchange_counts
from moeops.gates.base import auxiliary_loss, update_gates
from moeops.gates.injected_loss import inject_auxiliary_loss
from moeops.layers import FMoE, FMoELinear, FMoETransformerMLP
from moeops.logits import keep_logits, take_logits
from moeops.monitor import LayerLoad, LoadMonitor
from moeops.ops import (
    alignment_sum,
    chosen_weights,
    count_tokens,
    grouped_linear,
    limit_capacity,
    moe_mlp,
    noisy_topk_route,
    pad_rows,
    permute_tokens,
    prototype_route,
    relu_route,
    score_sums,
    sort_tokens,
    topk_route,
    topk_route_balance,
    unpad_rows,
    unpermute_tokens,
)
from moeops.replay import RoutingReplay
from moeops.types import (
    BalancedRoute,
    Glu,
    LoraFactors,
    NoisyRoute,
    Route,
    Routing,
    SlotRouting,
    TokenPlan,
)

__version__ = "0.2.0"

__all__ = [
    "BalancedRoute",
    "FMoE",
    "FMoELinear",
    "FMoETransformerMLP",
    "Glu",
    "LayerLoad",
    "LoadMonitor",
    "LoraFactors",
    "NoisyRoute",
    "Route",
    "Routing",
    "RoutingReplay",
    "SlotRouting",
    "TokenPlan",
    "alignment_sum",
    "all_to_all_rows",
    "auxiliary_loss",
    "chosen_weights",
    "count_tokens",
    "dispatch",
    "distributed",
    "exchange_counts",
    "gates",
    "grouped_linear",
    "inject_auxiliary_loss",
    "keep_logits",
    "layers",
    "limit_capacity",
    "losses",
    "moe_mlp",
    "noisy_topk_route",
    "pad_rows",
    "permute_tokens",
    "prototype_route",
    "relu_route",
    "score_sums",
    "sort_tokens",
    "take_logits",
    "topk_route",
    "topk_route_balance",
    "unpad_rows",
    "unpermute_tokens",
    "update_gates",
]


def __getattr__(name: str) -> Any:
    """Import ``moeops.compile`` when it is first asked for: torch's compiler takes a second to import."""
    if name == "compile":
        return importlib.import_module("moeops.compile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
