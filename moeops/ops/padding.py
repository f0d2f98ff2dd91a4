"""Rows to fixed capacity buffers and back. R rows, E experts, C capacity in rows per expert, D model width."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops.ops._library import LIBRARY


@torch.library.register_fake("moeops::pad_rows")
def _pad_rows_fake(rows, expert_offsets, capacity):
    return rows.new_empty((expert_offsets.shape[0] - 1, capacity, rows.shape[1]))


def _pad_rows_setup(ctx, inputs, output):
    rows, expert_offsets, _ = inputs
    ctx.num_rows = rows.shape[0]
    ctx.save_for_backward(expert_offsets)


def _pad_rows_grad(ctx, grad_padded):
    (expert_offsets,) = ctx.saved_tensors
    return torch.ops.moeops.unpad_rows(grad_padded, expert_offsets, ctx.num_rows), None, None


torch.library.register_autograd(
    "moeops::pad_rows", _pad_rows_grad, setup_context=_pad_rows_setup, lib=LIBRARY
)


def pad_rows(rows: Tensor, expert_offsets: Tensor, capacity: int) -> Tensor:
    """Copy each expert's rows into a buffer of fixed capacity.

    ``padded[e, c] = rows[expert_offsets[e] + c]``; slots past the expert's last row are zero, rows past the capacity
    are left out.

    Args:
        rows: rows in expert order, ``[R, D]``, any float type.
        expert_offsets: ``[E + 1]`` int32.
        capacity: ``C`` in rows per expert, at least 0.

    Returns:
        ``[E, C, D]``, dtype of ``rows``.

    Raises:
        ValueError: a shape or device does not fit.  TypeError: a dtype is wrong.
    Gradients: ``rows``.  Host sync: none.  Deterministic: yes.  Cost: writes E * C * D elements.

    Example:
        >>> pad_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1, 2], dtype=torch.int32), 2).tolist()
        [[[1.0], [0.0]], [[2.0], [0.0]]]
    """
    if not torch.compiler.is_compiling():
        _checks.check_tensor("pad_rows", "rows", rows, 2)
        _checks.check_float("pad_rows", "rows", rows)
        _checks.check_offsets("pad_rows", expert_offsets, "rows", rows)
        _checks.check_int("pad_rows", "capacity", capacity, 0, "Pass rows per expert.")
    return torch.ops.moeops.pad_rows(rows, expert_offsets, capacity)


@torch.library.register_fake("moeops::unpad_rows")
def _unpad_rows_fake(padded, expert_offsets, num_rows):
    return padded.new_empty((num_rows, padded.shape[2]))


def _unpad_rows_setup(ctx, inputs, output):
    padded, expert_offsets, _ = inputs
    ctx.capacity = padded.shape[1]
    ctx.save_for_backward(expert_offsets)


def _unpad_rows_grad(ctx, grad_rows):
    (expert_offsets,) = ctx.saved_tensors
    return torch.ops.moeops.pad_rows(grad_rows, expert_offsets, ctx.capacity), None, None


torch.library.register_autograd(
    "moeops::unpad_rows", _unpad_rows_grad, setup_context=_unpad_rows_setup, lib=LIBRARY
)


def unpad_rows(padded: Tensor, expert_offsets: Tensor, num_rows: int) -> Tensor:
    """Copy fixed capacity buffers back into rows: the inverse of ``pad_rows``.

    ``rows[expert_offsets[e] + c] = padded[e, c]``; rows that did not fit the capacity and rows past the last offset
    are zero.

    Args:
        padded: ``[E, C, D]``, any float type.
        expert_offsets: ``[E + 1]`` int32.
        num_rows: ``R``, at least ``expert_offsets[E]``.

    Returns:
        ``[R, D]``, dtype of ``padded``.

    Raises:
        ValueError: a shape or device does not fit.  TypeError: a dtype is wrong.
    Gradients: ``padded``.  Host sync: none.  Deterministic: yes.  Cost: writes R * D elements.

    Example:
        >>> unpad_rows(torch.tensor([[[1.0], [0.0]]]), torch.tensor([0, 1], dtype=torch.int32), 1).tolist()
        [[1.0]]
    """
    if not torch.compiler.is_compiling():
        op = "unpad_rows"
        _checks.check_tensor(op, "padded", padded, 3)
        _checks.check_float(op, "padded", padded)
        _checks.check_offsets(op, expert_offsets, "padded", padded)
        _checks.check_size(
            op, "padded", padded, 0, expert_offsets.shape[0] - 1, "one buffer per expert"
        )
        _checks.check_int(op, "num_rows", num_rows, 0, "Pass the number of rows.")
    return torch.ops.moeops.unpad_rows(padded, expert_offsets, num_rows)
