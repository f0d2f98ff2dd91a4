"""Mixture-of-Experts for PyTorch in which every step is a torch op that compiles, exports and differentiates."""

from moeops import _extension

_extension.load()

from moeops import (  # noqa: E402  (the ops register themselves on the loaded libraries)
    gates,
    losses,
)
from moeops.gates.base import auxiliary_loss  # noqa: E402
from moeops.layers import FMoE, FMoELinear, FMoETransformerMLP  # noqa: E402
from moeops.ops import (  # noqa: E402
    count_tokens,
    grouped_linear,
    limit_capacity,
    moe_mlp,
    pad_rows,
    permute_tokens,
    sort_tokens,
    topk_route,
    unpad_rows,
    unpermute_tokens,
)
from moeops.types import Routing, SlotRouting, TokenPlan  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FMoE",
    "FMoELinear",
    "FMoETransformerMLP",
    "Routing",
    "SlotRouting",
    "TokenPlan",
    "auxiliary_loss",
    "count_tokens",
    "gates",
    "grouped_linear",
    "limit_capacity",
    "losses",
    "moe_mlp",
    "pad_rows",
    "permute_tokens",
    "sort_tokens",
    "topk_route",
    "unpad_rows",
    "unpermute_tokens",
]
