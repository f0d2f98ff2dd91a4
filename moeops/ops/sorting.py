"""From chosen experts to index maps. T tokens, K experts per token, N = T * K pairs, E experts, C capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops.ops import _checks
from moeops.ops._checks import fake_check
from moeops.types import TokenPlan


@torch.library.register_fake("moeops::sort_tokens")
def _sort_tokens_fake(topk_ids, num_experts, drop_out_of_range):
    fake_check(topk_ids.dim() == 2, "sort_tokens: topk_ids must have 2 dimensions. Reshape them.")
    return (
        topk_ids.new_empty((topk_ids.shape[0] * topk_ids.shape[1],), dtype=torch.int32),
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty((num_experts + 1,), dtype=torch.int32),
    )


@torch.library.register_fake("moeops::limit_capacity")
def _limit_capacity_fake(topk_ids, priority, num_experts, capacity):
    return topk_ids.new_empty(topk_ids.shape)


def sort_tokens(
    topk_ids: Tensor, num_experts: int, *, drop_out_of_range: bool = False
) -> TokenPlan:
    """Sort token-expert pairs by expert with a stable counting sort on the device.

    Rows of one expert are contiguous and in token order. Pairs whose id is -1 are dropped: their rows come last, from
    ``expert_offsets[E]`` on.

    Args:
        topk_ids: chosen experts, ``[T, K]``, int32 or int64, values in ``[-1, E)``.
        num_experts: ``E``, at least 1.
        drop_out_of_range: treat ids of ``E`` and more as dropped instead of as an error.

    Returns:
        A TokenPlan: row_to_pair ``[N]``, pair_to_row ``[T, K]``, expert_offsets ``[E + 1]``, all int32.

    Raises:
        ValueError: a shape or ``num_experts`` does not fit.  TypeError: ``topk_ids`` is not int32 or int64.
        RuntimeError: an id is out of range (checked on CPU; on CUDA with ``MOEOPS_DEBUG_CHECKS=1``, where such a pair
        is otherwise dropped).
    Gradients: none.  Host sync: none.  Deterministic: yes.  Cost: reads the ids twice, writes 2 N + E integers.

    Example:
        >>> plan = sort_tokens(torch.tensor([[0], [2], [0], [1]]), 3)
        >>> plan.row_to_pair.tolist(), plan.expert_offsets.tolist()
        ([0, 2, 3, 1], [0, 2, 3, 4])
    """
    if not torch.compiler.is_compiling():
        _checks.check_ids("sort_tokens", "topk_ids", topk_ids)
        _checks.check_int("sort_tokens", "num_experts", num_experts, 1, "Pass the expert count.")
    return TokenPlan(*torch.ops.moeops.sort_tokens(topk_ids, num_experts, drop_out_of_range))


def limit_capacity(
    topk_ids: Tensor, num_experts: int, capacity: int, *, priority: Tensor | None = None
) -> Tensor:
    """Set to -1 every pair that does not fit into its expert's capacity.

    Each expert keeps its first ``capacity`` pairs in (token, choice) order, or its ``capacity`` pairs of highest
    ``priority``, ties in (token, choice) order.

    Args:
        topk_ids: chosen experts, ``[T, K]``, int32 or int64, values in ``[-1, E)``.
        num_experts: ``E``, at least 1.
        capacity: ``C`` in rows per expert, at least 0.
        priority: ``[T, K]``, any float type; a larger value is kept first.

    Returns:
        The ids that fit, -1 elsewhere: ``[T, K]``, dtype of ``topk_ids``.

    Raises:
        ValueError: a shape or number does not fit.  TypeError: a dtype is wrong.  RuntimeError: an id is out of range
        (checked as in ``sort_tokens``).
    Gradients: none.  Host sync: none.  Deterministic: yes.
    Source: GShard, arXiv:2006.16668; priority: batch-prioritised routing, arXiv:2106.05974.

    Example:
        >>> limit_capacity(torch.tensor([[0], [0], [1]]), 2, 1).tolist()
        [[0], [-1], [1]]
    """
    if not torch.compiler.is_compiling():
        op = "limit_capacity"
        _checks.check_ids(op, "topk_ids", topk_ids)
        _checks.check_int(op, "num_experts", num_experts, 1, "Pass the expert count.")
        _checks.check_int(op, "capacity", capacity, 0, "Pass rows per expert.")
        if priority is not None:
            _checks.check_tensor(op, "priority", priority, 2)
            _checks.check_float(op, "priority", priority)
            _checks.check_size(op, "priority", priority, 0, topk_ids.shape[0], "like topk_ids")
            _checks.check_size(op, "priority", priority, 1, topk_ids.shape[1], "like topk_ids")
            _checks.check_device(op, "priority", priority, "topk_ids", topk_ids)
    return torch.ops.moeops.limit_capacity(topk_ids, priority, num_experts, capacity)
