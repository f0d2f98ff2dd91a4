"""Sample prototypes: each a rule or a kernel in one function, compared with its reference and with the native op."""

from moeops.numba.gates import reference
from moeops.numba.gates.expert_choice import (
    ExpertChoiceGate,
    expert_choice,
    expert_choice_by_row,
)
from moeops.numba.gates.group_limited import GroupLimitedGate, group_limited
from moeops.numba.gates.hash import hash_route
from moeops.numba.gates.layout import (
    permute,
    permute_by_row,
    sort_tokens,
    unpermute,
    unpermute_by_row,
)
from moeops.numba.gates.naive import NaiveTopkGate, naive_topk
from moeops.numba.gates.switch import SwitchJitterGate, switch_jitter
from moeops.numba.gates.top_p import TopPGate, top_p

__all__ = [
    "ExpertChoiceGate",
    "GroupLimitedGate",
    "NaiveTopkGate",
    "SwitchJitterGate",
    "TopPGate",
    "expert_choice",
    "expert_choice_by_row",
    "group_limited",
    "hash_route",
    "naive_topk",
    "permute",
    "permute_by_row",
    "reference",
    "sort_tokens",
    "switch_jitter",
    "top_p",
    "unpermute",
    "unpermute_by_row",
]
