"""What torch's FLOP counter counts for ops with products. R rows, D inputs, H outputs or hidden width, E experts.

Two operations for a multiplication and its addition, as torch counts ``mm``; biases, activations and sums over experts
are not counted, as torch does not count theirs. The counter asks for shapes, so rows are those of the plan, ``R``: a
dropped pair counts where it has a row, although kernels skip it. A gate that says how many rows it fills (``num_rows``)
is counted by these.

The formulas register themselves when somebody imports the counter: where Triton is installed, importing it here would
nearly double the time of ``import moeops``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from moeops._imports import when_imported


def _grouped_linear_flops(rows: Any, weight: Any, *_args: Any, **_options: Any) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def _weight_grad_flops(grad: Any, rows: Any, *_args: Any, **_options: Any) -> int:
    return 2 * rows[0] * grad[1] * rows[1]


def _block_flops(num_rows: int, w_up: Any, w_down: Any) -> tuple[int, int]:
    """One product with ``w_up`` for each row, and one with ``w_down``."""
    return 2 * num_rows * w_up[1] * w_up[2], 2 * num_rows * w_down[1] * w_down[2]


def _moe_mlp_flops(
    x: Any,
    row_to_pair: Any,
    pair_to_row: Any,
    expert_offsets: Any,
    topk_weights: Any,
    w_up: Any,
    w_down: Any,
    *_biases: Any,
    **_options: Any,
) -> int:
    return sum(_block_flops(row_to_pair[0], w_up, w_down))


def _moe_mlp_data_flops(
    grad_y: Any,
    x: Any,
    row_to_pair: Any,
    pair_to_row: Any,
    expert_offsets: Any,
    topk_weights: Any,
    w_up: Any,
    w_down: Any,
    *_rest: Any,
    need_x: bool = True,
    need_topk_weights: bool = True,
    need_grad_pre: bool = True,
    **_options: Any,
) -> int:
    up, down = _block_flops(row_to_pair[0], w_up, w_down)
    # The gradient of the hidden rows serves all three; nothing of the forward is multiplied again.
    return up * need_x + down * (need_x or need_topk_weights or need_grad_pre)


def _moe_mlp_weights_flops(
    grad_y: Any,
    x: Any,
    row_to_pair: Any,
    pair_to_row: Any,
    expert_offsets: Any,
    topk_weights: Any,
    grad_pre: Any,
    weighted_hidden: Any,
    *,
    need_w_up: bool = True,
    need_w_down: bool = True,
    **_options: Any,
) -> int:
    up = 2 * row_to_pair[0] * grad_pre[1] * x[1] if need_w_up else 0
    down = 2 * row_to_pair[0] * grad_y[1] * weighted_hidden[1] if need_w_down else 0
    return up + down


_FORMULAS = {
    "grouped_linear": _grouped_linear_flops,
    "grouped_linear_weight_grad": _weight_grad_flops,
    "moe_mlp": _moe_mlp_flops,
    "moe_mlp_backward_data": _moe_mlp_data_flops,
    "moe_mlp_backward_weights": _moe_mlp_weights_flops,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.moeops, name))(formula)


when_imported("torch.utils.flop_counter", _register)
