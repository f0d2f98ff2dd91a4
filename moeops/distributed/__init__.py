"""Expert parallelism on torch.distributed: groups of ranks, collectives, dispatchers, gradients.

Importing this package neither initialises torch.distributed nor needs a torch that has it.
"""

from moeops.distributed.checkpoint import (
    load_checkpoint,
    merge_checkpoint,
    save_checkpoint,
)
from moeops.distributed.collectives import all_gather_counts, all_reduce_sum
from moeops.distributed.cost_model import CostModel
from moeops.distributed.failures import explain_failures
from moeops.distributed.grad_sync import (
    DistributedGroupedDataParallel,
    clip_grad_norm_,
    scale_expert_gradients,
)
from moeops.distributed.groups import RankGroup, expert_range, rank_group
from moeops.distributed.hierarchical import (
    Hierarchy,
    build_hierarchy,
    hierarchical_all_to_all,
    hierarchical_counts,
)
from moeops.distributed.placement import Placement
from moeops.distributed.shadowing import ShadowPolicy

__all__ = [
    "CostModel",
    "DistributedGroupedDataParallel",
    "Hierarchy",
    "Placement",
    "RankGroup",
    "ShadowPolicy",
    "all_gather_counts",
    "all_reduce_sum",
    "build_hierarchy",
    "clip_grad_norm_",
    "expert_range",
    "explain_failures",
    "hierarchical_all_to_all",
    "hierarchical_counts",
    "load_checkpoint",
    "merge_checkpoint",
    "rank_group",
    "save_checkpoint",
    "scale_expert_gradients",
]
