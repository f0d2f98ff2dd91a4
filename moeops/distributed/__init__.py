"""What a program with experts on several ranks calls: groups, collectives, options, gradients, checkpoints.

Importing this package neither initialises torch.distributed nor needs a torch that has it. The library itself never
imports it: see ``moeops.comm``, ``moeops.dispatch`` and ``moeops.cost`` for the parts below the layers.
"""

from moeops.comm.collectives import all_gather_counts, all_reduce_sum
from moeops.comm.failures import explain_failures
from moeops.comm.groups import RankGroup, expert_range, rank_group
from moeops.comm.hierarchical import (
    Hierarchy,
    build_hierarchy,
    hierarchical_all_to_all,
    hierarchical_counts,
)
from moeops.cost.model import CostModel
from moeops.dispatch.degrees import AutoChunks
from moeops.dispatch.gather import Gather
from moeops.dispatch.options import Auto, Exact, Static
from moeops.dispatch.replicas import Placement
from moeops.dispatch.shadowing import ShadowPolicy
from moeops.distributed.checkpoint import (
    load_checkpoint,
    merge_checkpoint,
    read_extra,
    save_checkpoint,
)
from moeops.distributed.clipping import clip_grad_norm_
from moeops.distributed.dtensors import use_dtensor_state
from moeops.distributed.grad_sync import DistributedGroupedDataParallel, scale_expert_gradients

__all__ = [
    "Auto",
    "AutoChunks",
    "CostModel",
    "DistributedGroupedDataParallel",
    "Exact",
    "Gather",
    "Hierarchy",
    "Placement",
    "RankGroup",
    "ShadowPolicy",
    "Static",
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
    "read_extra",
    "save_checkpoint",
    "scale_expert_gradients",
    "use_dtensor_state",
]
