"""Expert parallelism on torch.distributed: groups of ranks, collectives, dispatchers, gradients.

Importing this package neither initialises torch.distributed nor needs a torch that has it.
"""

from moeops.distributed.collectives import all_gather_counts, all_reduce_sum
from moeops.distributed.grad_sync import (
    DistributedGroupedDataParallel,
    clip_grad_norm_,
    scale_expert_gradients,
)
from moeops.distributed.groups import RankGroup, expert_range, rank_group

__all__ = [
    "DistributedGroupedDataParallel",
    "RankGroup",
    "all_gather_counts",
    "all_reduce_sum",
    "clip_grad_norm_",
    "expert_range",
    "rank_group",
    "scale_expert_gradients",
]
