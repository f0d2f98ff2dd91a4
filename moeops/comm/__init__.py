"""Ranks and wires: groups, agreement between ranks, exchanges of rows and counts. No gates, experts or layers here."""

import moeops.comm.order  # noqa: F401  (registers the op, for compiled code from a cache)
from moeops.comm.collectives import all_gather_counts, all_reduce_sum
from moeops.comm.exchange import all_to_all_rows, exchange_counts
from moeops.comm.failures import explain_failures
from moeops.comm.groups import RankGroup, expert_range, rank_group
from moeops.comm.hierarchical import (
    Hierarchy,
    build_hierarchy,
    hierarchical_all_to_all,
    hierarchical_counts,
)

__all__ = [
    "Hierarchy",
    "RankGroup",
    "all_gather_counts",
    "all_reduce_sum",
    "all_to_all_rows",
    "build_hierarchy",
    "exchange_counts",
    "expert_range",
    "explain_failures",
    "hierarchical_all_to_all",
    "hierarchical_counts",
    "rank_group",
]
