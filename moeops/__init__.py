"""Mixture-of-Experts for PyTorch in which every step is a torch op that compiles, exports and differentiates."""

from moeops import _extension

_extension.load()

from moeops import (  # noqa: E402  (the ops register themselves on the loaded libraries)
    gates,
    losses,
)
from moeops.gates.base import auxiliary_loss  # noqa: E402
from moeops.layers import FMoE, FMoELinear, FMoETransformerMLP  # noqa: E402
from moeops.monitor import LayerLoad, LoadMonitor  # noqa: E402
from moeops.ops import (  # noqa: E402
    all_to_all_rows,
    count_tokens,
    exchange_counts,
    grouped_linear,
    limit_capacity,
    moe_mlp,
    pad_rows,
    permute_tokens,
    score_sums,
    sort_tokens,
    topk_route,
    unpad_rows,
    unpermute_tokens,
)
from moeops.replay import RoutingReplay  # noqa: E402
from moeops.types import Routing, SlotRouting, TokenPlan  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FMoE",
    "FMoELinear",
    "FMoETransformerMLP",
    "LayerLoad",
    "LoadMonitor",
    "Routing",
    "RoutingReplay",
    "SlotRouting",
    "TokenPlan",
    "all_to_all_rows",
    "auxiliary_loss",
    "count_tokens",
    "exchange_counts",
    "gates",
    "grouped_linear",
    "limit_capacity",
    "losses",
    "moe_mlp",
    "pad_rows",
    "permute_tokens",
    "score_sums",
    "sort_tokens",
    "topk_route",
    "unpad_rows",
    "unpermute_tokens",
]
