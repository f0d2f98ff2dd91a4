"""From chosen experts to index maps. T tokens, K experts per token, N = T * K pairs, R rows, E experts, C capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.types import TokenPlan


@torch.library.register_fake("moeops::sort_tokens")
def _sort_tokens_fake(topk_ids, num_experts, num_rows=None, **_options):
    fake_check(topk_ids.dim() == 2, "sort_tokens: topk_ids must have 2 dimensions. Reshape them.")
    if num_rows is None:
        num_rows = topk_ids.shape[0] * topk_ids.shape[1]
    else:
        fake_check(num_rows >= 0, "sort_tokens: num_rows must be at least 0. Pass a bound.")
    return (
        topk_ids.new_empty((num_rows,), dtype=torch.int32),
        topk_ids.new_empty(topk_ids.shape, dtype=torch.int32),
        topk_ids.new_empty((num_experts + 1,), dtype=torch.int32),
    )


@torch.library.register_fake("moeops::count_tokens")
def _count_tokens_fake(topk_ids, num_experts):
    return topk_ids.new_empty((num_experts,), dtype=torch.int32)


@torch.library.register_fake("moeops::limit_capacity")
def _limit_capacity_fake(topk_ids, num_experts, capacity, priority=None, **_options):
    return topk_ids.new_empty(topk_ids.shape)


def sort_tokens(
    topk_ids: Tensor,
    num_experts: int,
    num_rows: int | None = None,
    *,
    drop_out_of_range: bool = False,
) -> TokenPlan:
    """Sort token-expert pairs by expert with a stable counting sort on the device.

    Rows of one expert are contiguous and in token order. Pairs whose id is -1 are dropped: their rows come last, from
    ``expert_offsets[E]`` on, or, with fewer rows than pairs, they have none and ``R`` stands in pair_to_row. Rows that
    no pair owns hold 0 in row_to_pair.

    Args:
        topk_ids: chosen experts, ``[T, K]``, int32 or int64, values in ``[-1, E)``.
        num_experts: ``E``, at least 1.
        num_rows: ``R``, an int or a symbolic int, at least the number of pairs that are not dropped; ``None`` means
            ``N``. What is computed from the plan has ``R`` rows: a gate that leaves most slots empty (expert choice
            with ``K = E``: ``R = E * C``) pays for the rows it fills.
        drop_out_of_range: treat ids of ``E`` and more as dropped instead of as an error.

    Returns:
        A TokenPlan: row_to_pair ``[R]``, pair_to_row ``[T, K]``, expert_offsets ``[E + 1]``, all int32.

    Raises:
        ValueError: a shape, ``num_experts`` or ``num_rows`` does not fit.  TypeError: ``topk_ids`` is not int32 or
        int64, or ``num_rows`` no int.
        RuntimeError: an id is out of range, or more pairs are kept than there are rows (both checked on CPU; on CUDA
        with ``MOEOPS_DEBUG_CHECKS=1``, where such an id is otherwise dropped, and so are the pairs that come last in
        expert order).
    Gradients: none.  Host sync: none.  Deterministic: yes.  Cost: reads the ids twice, writes N + R + E integers.

    Example:
        >>> plan = sort_tokens(torch.tensor([[0], [2], [0], [1]]), 3)
        >>> plan.row_to_pair.tolist(), plan.expert_offsets.tolist()
        ([0, 2, 3, 1], [0, 2, 3, 4])
    """
    if not torch.compiler.is_compiling():
        op = "sort_tokens"
        _checks.check_ids(op, "topk_ids", topk_ids)
        _checks.check_int(op, "num_experts", num_experts, 1, "Pass the expert count.")
        if num_rows is not None:
            _checks.check_int(
                op, "num_rows", num_rows, 0, "Pass an upper bound of the pairs that are kept."
            )
    return TokenPlan(
        *torch.ops.moeops.sort_tokens(
            topk_ids, num_experts, num_rows, drop_out_of_range=drop_out_of_range
        )
    )


def count_tokens(topk_ids: Tensor, num_experts: int) -> Tensor:
    """Count the pairs of each expert.

    Args:
        topk_ids: chosen experts, any shape, int32 or int64, values in ``[-1, E)``; -1 counts for no expert.
        num_experts: ``E``, at least 1.

    Returns:
        tokens_per_expert ``[E]`` int32.

    Raises:
        ValueError: ``num_experts`` does not fit.  TypeError: ``topk_ids`` is not int32 or int64.  RuntimeError: an id
        is out of range (checked on CPU; on CUDA with ``MOEOPS_DEBUG_CHECKS=1``, where it otherwise counts for none).
    Gradients: none.  Host sync: none.  Deterministic: yes.  Cost: reads the ids once.

    Example:
        >>> count_tokens(torch.tensor([[0, 2], [2, -1]]), 3).tolist()
        [1, 0, 2]
    """
    if not torch.compiler.is_compiling():
        _checks.check_ids("count_tokens", "topk_ids", topk_ids, dim=None)
        _checks.check_int("count_tokens", "num_experts", num_experts, 1, "Pass the expert count.")
    return torch.ops.moeops.count_tokens(topk_ids, num_experts)


def limit_capacity(
    topk_ids: Tensor,
    num_experts: int,
    capacity: int,
    *,
    priority: Tensor | None = None,
    by_choice: bool = False,
) -> Tensor:
    """Set to -1 every pair that does not fit into its expert's capacity.

    Each expert keeps its first ``capacity`` pairs in (token, choice) order, with ``by_choice`` in (choice, token)
    order, or its ``capacity`` pairs of highest ``priority``, ties in (token, choice) order.

    Args:
        topk_ids: chosen experts, ``[T, K]``, int32 or int64, values in ``[-1, E)``.
        num_experts: ``E``, at least 1.
        capacity: ``C`` in rows per expert, at least 0.
        priority: ``[T, K]``, any float type; a larger value is kept first.
        by_choice: first choices of all tokens come before second ones; not beside ``priority``.

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
            if by_choice:
                raise ValueError(
                    f"{op}: priority must be None with by_choice, got {_checks.describe(priority)}. Pass one of them."
                )
            _checks.check_tensor(op, "priority", priority, 2)
            _checks.check_float(op, "priority", priority)
            _checks.check_size(op, "priority", priority, 0, topk_ids.shape[0], "like topk_ids")
            _checks.check_size(op, "priority", priority, 1, topk_ids.shape[1], "like topk_ids")
            _checks.check_device(op, "priority", priority, "topk_ids", topk_ids)
    return torch.ops.moeops.limit_capacity(
        topk_ids, num_experts, capacity, priority, by_choice=by_choice
    )
