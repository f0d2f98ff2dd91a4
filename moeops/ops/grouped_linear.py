"""One matrix per expert over rows in expert order. R rows, E experts, D inputs, H outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from moeops import _checks
from moeops._checks import fake_check
from moeops.ops._autocast import cast_for_autocast
from moeops.ops._library import LIBRARY
from moeops.ops._lora import add_lora, check_lora
from moeops.types import LoraFactors


@torch.library.register_fake("moeops::grouped_linear")
def _grouped_linear_fake(rows, weight, expert_offsets, bias=None):
    fake_check(
        rows.shape[1] == weight.shape[2],
        "grouped_linear: weight must have as many inputs as rows have columns. Check weight.shape[2].",
    )
    return rows.new_empty((rows.shape[0], weight.shape[1]))


def _grouped_linear_setup(ctx, inputs, output):
    rows, weight, expert_offsets, _ = inputs
    need_rows, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(
        rows if need_weight else None, weight if need_rows else None, expert_offsets
    )
    ctx.transposed = need_weight and is_transposed(weight)


def is_transposed(weight: Tensor) -> bool:
    """Whether the weight is stored as [E, D, H]; autograd would copy a gradient of another layout."""
    return weight.stride(1) == 1 and weight.stride(2) >= weight.shape[1] > 1


def _grouped_linear_grad(ctx, grad):
    rows, weight, expert_offsets = ctx.saved_tensors
    need_rows, need_weight, _, *need_bias = ctx.needs_input_grad  # without a bias, of three inputs
    grad_rows = grad_weight = grad_bias = None
    if need_rows:
        grad_rows = torch.ops.moeops.grouped_linear(grad, weight.transpose(1, 2), expert_offsets)
    if need_weight:
        grad_weight = torch.ops.moeops.grouped_linear_weight_grad(
            grad, rows, expert_offsets, transposed=ctx.transposed
        )
    if any(need_bias):
        grad_bias = torch.ops.moeops.grouped_sum(grad, expert_offsets)
    return grad_rows, grad_weight, None, grad_bias


torch.library.register_autograd(
    "moeops::grouped_linear", _grouped_linear_grad, setup_context=_grouped_linear_setup, lib=LIBRARY
)


def grouped_linear(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoraFactors | tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Multiply each expert's rows by that expert's matrix.

    ``out[r] = weight[e] @ rows[r] + bias[e]`` for ``expert_offsets[e] <= r < expert_offsets[e + 1]``; rows past the
    last offset are zero. Group sizes are free, 0 included.

    Args:
        rows: rows in expert order, ``[R, D]``, any float type, any strides.
        weight: ``[E, H, D]``, dtype of ``rows``, any strides (a transposed view is not copied where the kernel can
            read it).
        expert_offsets: ``[E + 1]`` int32, rising, at most ``R``.
        bias: ``[E, H]``, dtype of ``rows``.
        lora: a low-rank addition to the weight, ``(a [E, r, D], b [E, H, r], scaling)`` or a ``LoraFactors``, cast to
            the dtype of ``rows``. No tensor of the weight's size is built, in the backward neither; a weight that needs
            no gradient costs nothing there.

    Returns:
        ``[R, H]``, dtype of ``rows``; products are summed in float32 (float64 for float64).

    Raises:
        ValueError: a shape or device does not fit.  TypeError: a dtype is wrong.
    Gradients: ``rows``, ``weight``, ``bias``, factors.  Host sync: none.  Deterministic: yes, but for dropout.
    Cost: 2 R D H operations; the factors' 2 R r (D + H), and R r elements kept.
    Under ``torch.autocast`` the float arguments are cast to the autocast type.

    Example:
        >>> offsets = torch.tensor([0, 1, 2], dtype=torch.int32)
        >>> grouped_linear(torch.ones(2, 1), torch.tensor([[[2.0]], [[3.0]]]), offsets).tolist()
        [[2.0], [3.0]]
    """
    rows, weight, bias = cast_for_autocast(rows, weight, bias)
    if not torch.compiler.is_compiling():
        check_grouped_linear("grouped_linear", rows, weight, expert_offsets, bias)
        if lora is not None:
            check_lora("grouped_linear", "lora", lora, "weight", weight)
    out = torch.ops.moeops.grouped_linear(rows, weight, expert_offsets, bias)
    return out if lora is None else add_lora(out, rows, LoraFactors(*lora), expert_offsets)


def check_grouped_linear(op, rows, weight, expert_offsets, bias):
    """Arguments of grouped_linear fit each other."""
    _checks.check_tensor(op, "rows", rows, 2)
    _checks.check_float(op, "rows", rows)
    _checks.check_tensor(op, "weight", weight, 3)
    _checks.check_float(op, "weight", weight)
    _checks.check_like(op, "weight", weight, "rows", rows)
    _checks.check_offsets(op, expert_offsets, "rows", rows)
    _checks.check_size(op, "weight", weight, 0, expert_offsets.shape[0] - 1, "one per expert")
    _checks.check_size(op, "weight", weight, 2, rows.shape[1], "columns of rows")
    if bias is not None:
        _checks.check_tensor(op, "bias", bias, 2)
        _checks.check_like(op, "bias", bias, "rows", rows)
        _checks.check_size(op, "bias", bias, 0, weight.shape[0], "one per expert")
        _checks.check_size(op, "bias", bias, 1, weight.shape[1], "outputs of weight")


@torch.library.register_fake("moeops::grouped_linear_weight_grad")
def _weight_grad_fake(grad, rows, expert_offsets, *, transposed=False):
    num_experts = expert_offsets.shape[0] - 1
    if transposed:
        return rows.new_empty((num_experts, rows.shape[1], grad.shape[1])).transpose(1, 2)
    return rows.new_empty((num_experts, grad.shape[1], rows.shape[1]))


def _weight_grad_setup(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs)


def _weight_grad_grad(ctx, grad_out):
    grad, rows, expert_offsets = ctx.saved_tensors
    need_grad, need_rows, _ = ctx.needs_input_grad
    linear = torch.ops.moeops.grouped_linear
    return (
        linear(rows, grad_out, expert_offsets) if need_grad else None,
        linear(grad, grad_out.transpose(1, 2), expert_offsets) if need_rows else None,
        None,
    )


torch.library.register_autograd(
    "moeops::grouped_linear_weight_grad",
    _weight_grad_grad,
    setup_context=_weight_grad_setup,
    lib=LIBRARY,
)


@torch.library.register_fake("moeops::grouped_sum")
def _grouped_sum_fake(rows, expert_offsets):
    return rows.new_empty((expert_offsets.shape[0] - 1, rows.shape[1]))


def _grouped_sum_setup(ctx, inputs, output):
    rows, expert_offsets = inputs
    ctx.num_rows = rows.shape[0]
    ctx.save_for_backward(expert_offsets)


def _grouped_sum_grad(ctx, grad_out):
    # Every row receives its expert's gradient: a grouped linear over a column of ones.
    (expert_offsets,) = ctx.saved_tensors
    ones = grad_out.new_ones((ctx.num_rows, 1))
    return torch.ops.moeops.grouped_linear(ones, grad_out[:, :, None], expert_offsets), None


torch.library.register_autograd(
    "moeops::grouped_sum", _grouped_sum_grad, setup_context=_grouped_sum_setup, lib=LIBRARY
)
