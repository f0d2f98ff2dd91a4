"""Sample prototypes: each a routing rule in one function, compared with its reference and with the native op."""

from moeops.numba.gates.group_limited import GroupLimitedGate, group_limited
from moeops.numba.gates.hash import hash_route
from moeops.numba.gates.naive import NaiveTopkGate, naive_topk
from moeops.numba.gates.switch import SwitchJitterGate, switch_jitter
from moeops.numba.gates.top_p import TopPGate, top_p

__all__ = [
    "GroupLimitedGate",
    "NaiveTopkGate",
    "SwitchJitterGate",
    "TopPGate",
    "group_limited",
    "hash_route",
    "naive_topk",
    "switch_jitter",
    "top_p",
]
