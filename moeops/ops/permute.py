"""Rows into expert order and back. T tokens, K experts per token, R rows, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.ops._library import LIBRARY, refuse_second_gradient
from moeops.types import TokenPlan


@torch.library.register_fake("moeops::permute_tokens")
def _permute_tokens_fake(x, row_to_pair, pair_to_row, expert_offsets):
    fake_check(
        x.shape[0] == pair_to_row.shape[0],
        "permute_tokens: x must have as many rows as pair_to_row. Check the plan's tokens.",
    )
    return x.new_empty((row_to_pair.shape[0], x.shape[1]))


def _permute_tokens_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _permute_tokens_grad(ctx, grad_rows):
    grad_x = torch.ops.moeops.unpermute_tokens(grad_rows, *ctx.saved_tensors)
    return grad_x, None, None, None


torch.library.register_autograd(
    "moeops::permute_tokens", _permute_tokens_grad, setup_context=_permute_tokens_setup, lib=LIBRARY
)


def permute_tokens(x: Tensor, plan: TokenPlan) -> Tensor:
    """Copy token rows into expert order, once per chosen expert.

    Row ``r < expert_offsets[E]`` is ``x[row_to_pair[r] // K]``. Later rows hold no pair that counts and are zero.

    Args:
        x: tokens, ``[T, D]``, any float type.
        plan: what ``sort_tokens`` returned for these tokens.

    Returns:
        Rows in expert order, ``[R, D]``, dtype of ``x``.

    Raises:
        ValueError: a shape or device does not fit.  TypeError: ``x`` is not float or the plan not int32.
    Gradients: ``x``.  Host sync: none.  Deterministic: yes.  Cost: reads T * D, writes R * D elements.

    Example:
        >>> plan = sort_tokens(torch.tensor([[1], [0]]), 2)
        >>> permute_tokens(torch.tensor([[1.0], [2.0]]), plan).tolist()
        [[2.0], [1.0]]
    """
    if not torch.compiler.is_compiling():
        op = "permute_tokens"
        _checks.check_tensor(op, "x", x, 2)
        _checks.check_float(op, "x", x)
        _checks.check_plan(op, plan, "x", x)
        _checks.check_size(op, "x", x, 0, plan[1].shape[0], "the plan's tokens")
    return torch.ops.moeops.permute_tokens(x, *plan)


@torch.library.register_fake("moeops::unpermute_tokens")
def _unpermute_tokens_fake(rows, row_to_pair, pair_to_row, expert_offsets, topk_weights=None):
    fake_check(
        rows.shape[0] == row_to_pair.shape[0],
        "unpermute_tokens: rows must have as many rows as row_to_pair. Check the plan's rows.",
    )
    return rows.new_empty((pair_to_row.shape[0], rows.shape[1]))


@torch.library.register_fake("moeops::unpermute_tokens_backward")
def _unpermute_tokens_backward_fake(
    grad_y, rows, row_to_pair, pair_to_row, expert_offsets, topk_weights
):
    return rows.new_empty(rows.shape), topk_weights.new_empty(topk_weights.shape)


def _unpermute_tokens_setup(ctx, inputs, output):
    rows, *plan, topk_weights = inputs
    ctx.weighted = topk_weights is not None
    ctx.save_for_backward(*((rows, *plan, topk_weights) if ctx.weighted else plan))


def _unpermute_tokens_grad(ctx, grad_y):
    if not ctx.weighted:
        grad_rows = torch.ops.moeops.permute_tokens(grad_y, *ctx.saved_tensors)
        return grad_rows, None, None, None, None
    grad_rows, grad_topk_weights = torch.ops.moeops.unpermute_tokens_backward(
        grad_y, *ctx.saved_tensors
    )
    return grad_rows, None, None, None, grad_topk_weights


torch.library.register_autograd(
    "moeops::unpermute_tokens",
    _unpermute_tokens_grad,
    setup_context=_unpermute_tokens_setup,
    lib=LIBRARY,
)
refuse_second_gradient("unpermute_tokens_backward")


def unpermute_tokens(rows: Tensor, plan: TokenPlan, topk_weights: Tensor | None = None) -> Tensor:
    """Sum each token's expert rows, weighted: the inverse of ``permute_tokens``.

    ``y[t] = sum_k topk_weights[t, k] * rows[pair_to_row[t, k]]`` over the pairs that were not dropped, summed in
    float32 (float64 for float64).

    Args:
        rows: rows in expert order, ``[R, D]``, any float type; rows from ``expert_offsets[E]`` on are not read.
        plan: what ``sort_tokens`` returned.
        topk_weights: ``[T, K]`` float, cast to float32 (float64 for float64 rows); ``None`` means all ones.

    Returns:
        ``[T, D]``, dtype of ``rows``.

    Raises:
        ValueError: a shape or device does not fit.  TypeError: a dtype is wrong.
    Gradients: ``rows`` and ``topk_weights``, from one pass.  Host sync: none.  Deterministic: yes.
    Cost: reads R * D, writes T * D elements.

    Example:
        >>> plan = sort_tokens(torch.tensor([[1, 0]]), 2)
        >>> unpermute_tokens(torch.tensor([[1.0], [2.0]]), plan, torch.tensor([[0.5, 0.25]])).tolist()
        [[1.25]]
    """
    if not torch.compiler.is_compiling():
        op = "unpermute_tokens"
        _checks.check_tensor(op, "rows", rows, 2)
        _checks.check_float(op, "rows", rows)
        _checks.check_plan(op, plan, "rows", rows)
        _checks.check_size(op, "rows", rows, 0, plan[0].shape[0], "the plan's rows")
        if topk_weights is not None:
            check_topk_weights(op, topk_weights, plan, "rows", rows)
    if topk_weights is not None:
        topk_weights = topk_weights.to(_checks.accumulate_dtype(rows.dtype))
    return torch.ops.moeops.unpermute_tokens(rows, *plan, topk_weights)


def check_topk_weights(op, topk_weights, plan, like_name, like):
    """``topk_weights`` is a float ``[T, K]`` that fits the plan."""
    _checks.check_tensor(op, "topk_weights", topk_weights, 2)
    _checks.check_float(op, "topk_weights", topk_weights)
    _checks.check_device(op, "topk_weights", topk_weights, like_name, like)
    _checks.check_size(op, "topk_weights", topk_weights, 0, plan[1].shape[0], "the plan's tokens")
    _checks.check_size(op, "topk_weights", topk_weights, 1, plan[1].shape[1], "the plan's K")
